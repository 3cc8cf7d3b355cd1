// Many tensors of any sizes shared among threads as if they were one, in units of 256 values; and the variant of a kernel
// that this machine runs. For kernels over lists of tensors.
#pragma once

#include <algorithm>
#include <vector>

#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "common/subnormals.h"

namespace pyfastpeft {

constexpr std::int64_t kTensorUnit = 256;

// The tensors' units in one row: tensor i has those from starts[i] to starts[i + 1].
template <typename T>
std::vector<std::int64_t> tensor_units(const T* tensors, std::int64_t count) {
  std::vector<std::int64_t> starts(std::size_t(count) + 1, 0);
  for (std::int64_t i = 0; i < count; ++i)
    starts[std::size_t(i) + 1] = starts[std::size_t(i)] + (tensors[i].n + kTensorUnit - 1) / kTensorUnit;
  return starts;
}

// Calls f(i, begin, end) for units [begin, end) of tensor i, on all threads, subnormals kept.
template <typename F>
void parallel_for_units(const std::vector<std::int64_t>& starts, F&& f) {
  constexpr std::int64_t kGrain = 64;  // units per thread at least
  parallel_for(starts.back(), kGrain, [&](std::int64_t begin, std::int64_t end) {
    const KeepSubnormals keep;
    std::int64_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; begin < end; ++i) {
      const std::int64_t start = starts[std::size_t(i)], stop = std::min(end, starts[std::size_t(i) + 1]);
      if (begin >= stop) continue;  // a tensor without values
      f(i, begin - start, stop - start);
      begin = stop;
    }
  });
}

#if defined(__x86_64__)
template <typename Kernels>
const Kernels& for_cpu_isa(const Kernels& scalar, const Kernels& avx2, const Kernels& avx512) {
  const CpuIsa isa = cpu_isa();
  return isa >= CpuIsa::avx512 ? avx512 : isa == CpuIsa::avx2 ? avx2 : scalar;
}
#endif

}  // namespace pyfastpeft
