// Lion and SGD on the CPU: the scalars of a step and the split among threads. The updates are in momentum_kernel.h.
#include <algorithm>
#include <vector>

#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "common/subnormals.h"
#include "momentum/momentum_kernel.h"

namespace pyfastpeft {
namespace {

constexpr std::int64_t kUnit = 256, kGrain = 64;  // values shared as one, and units per thread at least

const MomentumKernels kScalar = momentum_kernels<VecScalar>();

const MomentumKernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case CpuIsa::scalar:
      return kScalar;
    case CpuIsa::avx2:
      return momentum_kernels_avx2;
    case CpuIsa::avx512:
    case CpuIsa::amx:
      return momentum_kernels_avx512;
  }
#endif
  return kScalar;
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
  // The tensors' units in one row: tensor i has those from starts[i] to starts[i + 1].
  std::vector<std::int64_t> starts(std::size_t(count) + 1, 0);
  for (std::int64_t i = 0; i < count; ++i) {
    starts[std::size_t(i) + 1] = starts[std::size_t(i)] + (tensors[i].n + kUnit - 1) / kUnit;
    *tensors[i].step += 1.0f;
  }
  parallel_for(starts.back(), kGrain, [&](std::int64_t begin, std::int64_t end) {
    const KeepSubnormals keep;
    std::int64_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; begin < end; ++i) {
      const std::int64_t start = starts[std::size_t(i)], stop = std::min(end, starts[std::size_t(i) + 1]);
      if (begin >= stop) continue;  // a tensor without values
      const MomentumTensor& t = tensors[i];
      const auto& kernel_of = t.grad_dtype == t.param_dtype ? table.same : table.f32_grad;
      kernel_of[int(o.rule)][int(t.param_dtype)](t, *t.step == 1.0f ? at_first : later, (begin - start) * kUnit,
                                                 std::min((stop - start) * kUnit, t.n));
      begin = stop;
    }
  });
}

}  // namespace pyfastpeft
