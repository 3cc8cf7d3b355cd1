// A run of values of one tensor, as a template over the vector and the dtypes. Private to the momentum folder; one table of
// its instances per instruction set. 20 bytes a value of fp32: p and the momentum read and written, g read.
#pragma once

#include "common/vec.h"
#include "momentum/momentum.h"

namespace pyfastpeft {

struct MomentumCoefficients {
  float sign, lr, decay, l2, first, one_minus_first, second, one_minus_second;
  bool decays, first_step, nesterov;
};

using MomentumKernel = void (*)(const MomentumTensor&, const MomentumCoefficients&, std::int64_t begin,
                                std::int64_t end);
struct MomentumKernels {
  MomentumKernel same[2][3], f32_grad[2][3];  // by MomentumRule and the parameter's DType
};
extern const MomentumKernels momentum_kernels_avx2, momentum_kernels_avx512;

namespace {

// c ← β1 m + (1 - β1) g;  p ← (1 - lr·λ) p - lr · sign(c);  m ← β2 m + (1 - β2) g
struct LionUpdate {
  template <typename V>
  static void run(const MomentumCoefficients& c, V g, V& p, V& m) {
    const V direction = V::sign(m * V::set(c.first) + g * V::set(c.one_minus_first));
    if (c.decays) p = p * V::set(c.decay);
    p = p - direction * V::set(c.lr);
    m = m * V::set(c.second) + g * V::set(c.one_minus_second);
  }
};

// g ← g + λ p;  b ← g at the first step, then μ b + (1 - τ) g;  p ← p - lr · (g + μ b if nesterov else b)
struct SgdUpdate {
  template <typename V>
  static void run(const MomentumCoefficients& c, V g, V& p, V& b) {
    if (c.decays) g = g + p * V::set(c.l2);
    b = c.first_step ? g : b * V::set(c.first) + g * V::set(c.one_minus_second);
    p = p - (c.nesterov ? g + b * V::set(c.first) : b) * V::set(c.lr);
  }
};

template <typename Update, typename V, typename P, typename G>
void momentum_kernel(const MomentumTensor& t, const MomentumCoefficients& c, std::int64_t begin, std::int64_t end) {
  P* param = static_cast<P*>(t.param);
  const G* grad = static_cast<const G*>(t.grad);
  std::int64_t i = begin;
  for (; i + V::width <= end; i += V::width) {
    V p = V::load(param + i), m = V::load(t.momentum + i);
    Update::run(c, V::load(grad + i) * V::set(c.sign), p, m);
    p.store(param + i);
    m.store(t.momentum + i);
  }
  if (const std::int64_t rest = end - i) {
    V p = load_part<V>(param + i, rest), m = load_part<V>(t.momentum + i, rest);
    Update::run(c, load_part<V>(grad + i, rest) * V::set(c.sign), p, m);
    store_part(p, param + i, rest);
    store_part(m, t.momentum + i, rest);
  }
}

template <typename V>
constexpr MomentumKernels momentum_kernels() {
  using L = LionUpdate;
  using S = SgdUpdate;
  return {
      {{momentum_kernel<L, V, float, float>, momentum_kernel<L, V, f16, f16>, momentum_kernel<L, V, bf16, bf16>},
       {momentum_kernel<S, V, float, float>, momentum_kernel<S, V, f16, f16>, momentum_kernel<S, V, bf16, bf16>}},
      {{momentum_kernel<L, V, float, float>, momentum_kernel<L, V, f16, float>, momentum_kernel<L, V, bf16, float>},
       {momentum_kernel<S, V, float, float>, momentum_kernel<S, V, f16, float>, momentum_kernel<S, V, bf16, float>}}};
}

}  // namespace
}  // namespace pyfastpeft
