// Lion and SGD on the CPU: the scalars of a step and the split among threads. The updates are in momentum_kernel.h.
#include "common/tensor_units.h"
#include "momentum/momentum_kernel.h"

namespace pyfastpeft {
namespace {

const MomentumKernels kScalar = momentum_kernels<VecScalar>();

const MomentumKernels& kernels() {
#if defined(__x86_64__)
  return for_cpu_isa(kScalar, momentum_kernels_avx2, momentum_kernels_avx512);
#else
  return kScalar;
#endif
}

}  // namespace

void momentum_cpu(const MomentumTensor* tensors, std::int64_t count, const MomentumOptions& o) {
  const MomentumKernels& table = kernels();
  const MomentumCoefficients later{o.maximize ? -1.0f : 1.0f,
                                   float(o.lr),
                                   float(1 - o.lr * o.weight_decay),
                                   float(o.weight_decay),
                                   float(o.first),
                                   float(1 - o.first),
                                   float(o.second),
                                   float(1 - o.second),
                                   o.weight_decay != 0,
                                   false,
                                   o.nesterov};
  MomentumCoefficients at_first = later;
  at_first.first_step = true;
  for (std::int64_t i = 0; i < count; ++i) *tensors[i].step += 1.0f;
  parallel_for_units(tensor_units(tensors, count), [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
    const MomentumTensor& t = tensors[i];
    const auto& kernel_of = t.grad_dtype == t.param_dtype ? table.same : table.f32_grad;
    kernel_of[int(o.rule)][int(t.param_dtype)](t, *t.step == 1.0f ? at_first : later, begin * kTensorUnit,
                                               std::min(end * kTensorUnit, t.n));
  });
}

}  // namespace pyfastpeft
