// The AdamW update of a run of 256-value blocks of one tensor, as a template over the vector and the dtypes.
// Private to the adamw folder; one table of its instances per instruction set.
//
// fp32 state: 4 + 4·2 bytes read and 4·2 + 4 written of p, m, v, and 4 read of g: 28 a value, in one pass. 8-bit state:
// the block's moments are decoded into 2 KiB on the stack, updated there by the same loop, and encoded again. In AVX-512
// on a Zen 4 core: 0.29 ns a value for the update, 0.08 for decoding a moment, 0.30 for encoding m and 0.22 for v, 0.025 for
// finding an absmax. All are bound by the vectors issued, two a cycle: encoding one block beside the next one's update,
// whose divider leaves slots, took 0.85 ns in place of 0.87 and was left out.
#pragma once

#include <algorithm>

#include "adamw/adamw_codes_cpu.h"
#include "common/vec.h"

namespace pyfastpeft {

struct AdamwRange {
  AdamwTensor tensor;
  std::int64_t index;  // of the tensor in the call: part of the random numbers' counter
  std::int64_t first_block, last_block;
  AdamwCoefficients c;
  const AdamwMap* map1;
  const AdamwMap* map2;
  const std::int64_t* seed;
};

using AdamwKernel = void (*)(const AdamwRange&);
struct AdamwKernels {
  AdamwKernel same[3], f32_grad[3];  // by the parameter's DType; the gradient of the same dtype, or fp32
};
extern const AdamwKernels adamw_kernels_avx2, adamw_kernels_avx512;

// Stochastic rounding of values [position, position + n) of tensor `index`; in adamw_cpu.cpp.
void adamw_round(const float* values, f16* out, std::int64_t n, std::int64_t seed, std::int64_t index,
                 std::int64_t position);
void adamw_round(const float* values, bf16* out, std::int64_t n, std::int64_t seed, std::int64_t index,
                 std::int64_t position);
inline void adamw_round(const float*, float*, std::int64_t, std::int64_t, std::int64_t, std::int64_t) {}

namespace {

// In the order and with the roundings of torch.optim.adam._single_tensor_adam on fp32.
template <typename V>
inline void adamw_update(const AdamwCoefficients& c, V g, V& p, V& m, V& v) {
  g = g * V::set(c.grad_factor);
  if (c.l2 != 0) g = V::fma(p, V::set(c.l2), g);
  p = p * V::set(c.decay);
  m = c.lerp1 < 0.5f ? V::fma(V::set(c.lerp1), g - m, m) : V::fma(V::set(c.lerp1 - 1.0f), g - m, g);
  v = v * V::set(c.beta2);
  v = V::fma(V::set(c.one_minus_beta2) * g, g, v);
  // sqrt(v) / correction2_sqrt, correctly rounded, from the divisor's correctly rounded reciprocal (Markstein 1990): the
  // remainder of the first quotient is exact. An infinite or undefined first quotient is already the result.
  const V root = V::sqrt(v), quotient = root * V::set(c.correction2_reciprocal);
  const V remainder = V::fma(quotient, V::set(-c.correction2_sqrt), root);
  const V better = V::fma(remainder, V::set(c.correction2_reciprocal), quotient);
  const V denominator = V::where_finite(quotient, better) + V::set(c.eps);
  p = p + (V::set(c.negative_step_size) * m) / denominator;
}

// The block's absmax and codes. A block that holds a NaN or an infinity becomes NaN as a whole: its codes have no other
// way to say so.
template <typename V>
void adamw_encode(const float* x, const AdamwMap& map, std::uint8_t* codes, float* absmax, std::int64_t n) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < n; ++i) largest = std::max(largest, adamw_bits(x[i]) & 0x7fffffffu);
  const float scale = adamw_float(largest);
  *absmax = largest >= 0x7f800000u ? __builtin_nanf("") : scale;
  if (largest == 0 || largest >= 0x7f800000u) {
    std::memset(codes, map.zero, std::size_t(n));
    return;
  }
  if (largest < 0x00800000u) {  // the reciprocal of a subnormal overflows
    for (std::int64_t i = 0; i < n; ++i) codes[i] = adamw_nearest(map, x[i] / scale);
    return;
  }
  const float reciprocal = 1.0f / scale;
  if (map.piecewise_linear)
    AdamwCodes<V>::encode(x, map, reciprocal, codes, n);
  else
    adamw_encode_rest(x, map, reciprocal, codes, 0, n);
}

template <typename V, typename P, typename G>
void adamw_kernel(const AdamwRange& r) {
  const AdamwTensor& t = r.tensor;
  constexpr bool kRoundable = sizeof(P) < sizeof(float);
  const bool stochastic = kRoundable && r.seed != nullptr && t.master == nullptr;
  float m_decoded[kAdamwBlock], v_decoded[kAdamwBlock], p_exact[kAdamwBlock];
  for (std::int64_t block = r.first_block; block < r.last_block; ++block) {
    const std::int64_t begin = block * kAdamwBlock, n = std::min(t.n - begin, kAdamwBlock);
    P* param = static_cast<P*>(t.param) + begin;
    const G* grad = static_cast<const G*>(t.grad) + begin;
    float* master = t.master ? t.master + begin : nullptr;
    float *m_at, *v_at;
    if (t.bits8) {
      AdamwCodes<V>::decode(static_cast<std::uint8_t*>(t.exp_avg) + begin, *r.map1, t.absmax1[block], m_decoded, n);
      AdamwCodes<V>::decode(static_cast<std::uint8_t*>(t.exp_avg_sq) + begin, *r.map2, t.absmax2[block], v_decoded, n);
      m_at = m_decoded;
      v_at = v_decoded;
    } else {
      m_at = static_cast<float*>(t.exp_avg) + begin;
      v_at = static_cast<float*>(t.exp_avg_sq) + begin;
    }

    std::int64_t i = 0;
    for (; i + V::width <= n; i += V::width) {
      V p = master ? V::load(master + i) : V::load(param + i), m = V::load(m_at + i), v = V::load(v_at + i);
      adamw_update(r.c, V::load(grad + i), p, m, v);
      m.store(m_at + i);
      v.store(v_at + i);
      if (master) p.store(master + i);
      if (stochastic)
        p.store(p_exact + i);
      else
        p.store(param + i);
    }
    if (const std::int64_t rest = n - i) {
      V p = master ? load_part<V>(master + i, rest) : load_part<V>(param + i, rest);
      V m = load_part<V>(m_at + i, rest), v = load_part<V>(v_at + i, rest);
      adamw_update(r.c, load_part<V>(grad + i, rest), p, m, v);
      store_part(m, m_at + i, rest);
      store_part(v, v_at + i, rest);
      if (master) store_part(p, master + i, rest);
      if (stochastic)
        store_part(p, p_exact + i, rest);
      else
        store_part(p, param + i, rest);
    }

    if (stochastic) adamw_round(p_exact, param, n, *r.seed, r.index, t.first + begin);
    if (t.bits8) {
      adamw_encode<V>(m_at, *r.map1, static_cast<std::uint8_t*>(t.exp_avg) + begin, t.absmax1 + block, n);
      adamw_encode<V>(v_at, *r.map2, static_cast<std::uint8_t*>(t.exp_avg_sq) + begin, t.absmax2 + block, n);
    }
  }
}

template <typename V>
constexpr AdamwKernels adamw_kernels() {
  return {{adamw_kernel<V, float, float>, adamw_kernel<V, f16, f16>, adamw_kernel<V, bf16, bf16>},
          {adamw_kernel<V, float, float>, adamw_kernel<V, f16, float>, adamw_kernel<V, bf16, float>}};
}

}  // namespace
}  // namespace pyfastpeft
