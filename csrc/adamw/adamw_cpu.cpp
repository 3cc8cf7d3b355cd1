// AdamW on the CPU: the scalars of each step, the tables of the 8-bit maps, the split among threads, and stochastic
// rounding. The update itself is in adamw_kernel.h.
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "adamw/adamw_kernel.h"
#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "common/subnormals.h"

namespace pyfastpeft {
namespace {

constexpr std::int64_t kGrain = 64;  // blocks of 256 per thread at least

const AdamwKernels kScalar = adamw_kernels<VecScalar>();

const AdamwKernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case CpuIsa::scalar:
      return kScalar;
    case CpuIsa::avx2:
      return adamw_kernels_avx2;
    case CpuIsa::avx512:
    case CpuIsa::amx:
      return adamw_kernels_avx512;
  }
#endif
  return kScalar;
}

AdamwCoefficients coefficients(const AdamwOptions& options, double step) {
  return adamw_coefficients(options, step, [](double a, double b) { return a * b; });
}

std::unique_ptr<AdamwMap> make_map(const float* levels) {
  auto map = std::make_unique<AdamwMap>();
  for (int c = 0; c < 256; ++c) {
    map->level[c] = levels[c];
    map->threshold[c] = c == 255 ? std::numeric_limits<float>::infinity() : adamw_threshold(levels[c], levels[c + 1]);
  }
  const auto code_of = [&](float x) {
    return std::uint8_t(std::lower_bound(map->threshold, map->threshold + 255, x) - map->threshold);
  };
  map->zero = code_of(0.0f);
  for (std::uint32_t b = 0; b < AdamwMap::kBuckets; ++b) {
    const std::uint32_t top = (b + AdamwMap::kLowBucket) << 16;
    map->first[0][b] = code_of(b == 0 ? 0.0f : bits_to_f32(top));
    map->first[1][b] = code_of(-bits_to_f32(top | 0xffffu));  // the most negative of the bucket
  }
  return map;
}

bf16 round_stochastically(float x, std::uint32_t random, bf16*) {
  return adamw_beyond_bf16(x) ? from_f32<bf16>(x) : bf16{adamw_stochastic_bf16(x, random)};
}
f16 round_stochastically(float x, std::uint32_t random, f16*) {
  return adamw_beyond_f16(x) ? from_f32<f16>(x) : f16{adamw_stochastic_f16(x, random)};
}

template <typename T>
void round_block(const float* values, T* out, std::int64_t n, std::int64_t seed, std::int64_t index,
                 std::int64_t position) {
  for (std::int64_t i = 0; i < n; i += 4) {  // position is a multiple of 256
    const Philox4 random = philox4x32_10(std::uint64_t(position + i) / 4, std::uint64_t(index), std::uint64_t(seed));
    for (std::int64_t lane = 0; lane < std::min<std::int64_t>(4, n - i); ++lane)
      out[i + lane] = round_stochastically(values[i + lane], random.v[lane], out);
  }
}

}  // namespace

void adamw_round(const float* values, f16* out, std::int64_t n, std::int64_t seed, std::int64_t index,
                 std::int64_t position) {
  round_block(values, out, n, seed, index, position);
}
void adamw_round(const float* values, bf16* out, std::int64_t n, std::int64_t seed, std::int64_t index,
                 std::int64_t position) {
  round_block(values, out, n, seed, index, position);
}

void adamw_cpu(const AdamwTensor* tensors, std::int64_t count, const AdamwOptions& options) {
  const AdamwKernels& table = kernels();
  const auto map1 = options.map1 ? make_map(options.map1) : nullptr;
  const auto map2 = options.map2 ? make_map(options.map2) : nullptr;
  // The tensors' blocks in one row: tensor i has those from starts[i] to starts[i + 1].
  std::vector<std::int64_t> starts(std::size_t(count) + 1, 0);
  std::vector<AdamwCoefficients> scalars;  // a new entry only where the step differs from the tensor before
  std::vector<std::int32_t> scalars_of(std::size_t(count), 0);
  float last_step = std::numeric_limits<float>::quiet_NaN();
  for (std::int64_t i = 0; i < count; ++i) {
    starts[std::size_t(i) + 1] = starts[std::size_t(i)] + (tensors[i].n + kAdamwBlock - 1) / kAdamwBlock;
    const float step = *tensors[i].step += 1.0f;
    if (scalars.empty() || step != last_step) scalars.push_back(coefficients(options, double(step)));
    last_step = step;
    scalars_of[std::size_t(i)] = std::int32_t(scalars.size() - 1);
  }
  parallel_for(starts.back(), kGrain, [&](std::int64_t begin, std::int64_t end) {
    const KeepSubnormals keep;
    std::int64_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; begin < end; ++i) {
      const std::int64_t start = starts[std::size_t(i)], stop = std::min(end, starts[std::size_t(i) + 1]);
      if (begin >= stop) continue;  // a tensor without values
      const AdamwTensor& t = tensors[i];
      const bool same = t.grad_dtype == t.param_dtype;
      const AdamwKernel kernel = same ? table.same[int(t.param_dtype)] : table.f32_grad[int(t.param_dtype)];
      kernel({t, i, begin - start, stop - start, scalars[std::size_t(scalars_of[std::size_t(i)])], map1.get(),
              map2.get(), options.seed});
      begin = stop;
    }
  });
}

}  // namespace pyfastpeft
