// AdamW on the CPU: the scalars of each step, the tables of the 8-bit maps, the split among threads, and stochastic
// rounding. The update itself is in adamw_kernel.h.
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "adamw/adamw_kernel.h"
#include "common/philox.h"
#include "common/tensor_units.h"

namespace pyfastpeft {
namespace {

static_assert(kAdamwBlock == kTensorUnit);

const AdamwKernels kScalar = adamw_kernels<VecScalar>();

const AdamwKernels& kernels() {
#if defined(__x86_64__)
  static const bool has_vbmi = __builtin_cpu_supports("avx512vbmi");  // all with AVX-512 BF16 but Cooper Lake
  return for_cpu_isa(kScalar, adamw_kernels_avx2, has_vbmi ? adamw_kernels_avx512 : adamw_kernels_avx2);
#else
  return kScalar;
#endif
}

AdamwCoefficients coefficients(const AdamwOptions& options, double step) {
  return adamw_coefficients(options, step, [](double a, double b) { return a * b; });
}

// The regions of a dynamic map, and the proof that they give each value's nearest code; false for other maps.
bool make_regions(AdamwMap& map) {
  const int zero = map.zero;
  if (zero != 127 && zero != 0) return false;
  const bool is_signed = zero != 0;
  constexpr int kOne = AdamwMap::kRegions - 1;
  map.top[0] = 0;
  for (int region = 1; region < kOne; ++region) {
    const int count = is_signed ? 1 << (region - 1) : 2 << (region - 1), first = map.top[region - 1] + 1;
    const double begin = std::pow(10.0, region - 1 - AdamwMap::kDecades), slope = count / (9.0 * begin);
    map.slope[region] = float(slope);
    map.offset[region] = float(first - 0.5 - begin * slope);
    map.top[region] = first + count - 1;
  }
  map.offset[kOne] = float(map.top[kOne] = map.top[kOne - 1] + 1);
  if (zero + map.top[kOne] != 255) return false;

  for (int octave = 0; octave < 32; ++octave) map.octave_bound[octave] = std::numeric_limits<float>::infinity();
  std::int32_t from = AdamwMap::kLowOctave;
  for (int region = 0; region < kOne; ++region) {
    const float bound = map.bound[region] = map.threshold[zero + map.top[region]];
    const auto octave = std::int32_t(f32_to_bits(bound) >> 23);
    if (octave < from || octave > 127) return false;
    for (; from <= octave; ++from) map.octave_region[from % 32] = region;
    map.octave_bound[octave % 32] = bound;
  }
  for (; from < AdamwMap::kLowOctave + 32; ++from) map.octave_region[from % 32] = kOne;
  // 1 has no negative: below the largest negative level there is nothing but its own code
  map.smallest = is_signed ? adamw_next(-map.bound[kOne - 1]) : 0.0f;

  // The floats on both sides of zero that part numbers k and k + 1.
  int region = 0;
  for (int k = 0; zero + k < 255; ++k) {
    const float above = map.threshold[zero + k], below = is_signed && zero > k ? -map.threshold[zero - 1 - k] : above;
    if (k == map.top[region]) {  // between regions: but for a tie both sides part the floats at the same place
      if (below != above && below != adamw_next(above)) return false;
      ++region;
      continue;
    }
    for (const float magnitude : {above, below}) {
      const float number = std::fma(magnitude, map.slope[region], map.offset[region]);
      if (!(std::abs(number - (float(k) + 0.5f)) < AdamwMap::kUnsure / 2)) return false;
      if (!(magnitude > map.bound[region - 1] && magnitude < map.bound[region])) return false;
    }
  }
  return true;
}

std::shared_ptr<const AdamwMap> make_map(const float* levels) {
  auto map = std::make_shared<AdamwMap>();
  for (int c = 0; c < 256; ++c) {
    map->level[c] = levels[c];
    for (int byte = 0; byte < 4; ++byte) map->bytes[byte][c] = std::uint8_t(f32_to_bits(levels[c]) >> 8 * byte);
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
  map->piecewise_linear = make_regions(*map);
  return map;
}

// Tables take some 0.3 ms to make, as much as a step of 100,000 values: those of the last few maps are kept.
std::shared_ptr<const AdamwMap> map_of(const float* levels) {
  if (levels == nullptr) return nullptr;
  static std::mutex mutex;
  static std::vector<std::shared_ptr<const AdamwMap>> kept;  // the latest in front
  constexpr std::size_t kKept = 4;
  const std::lock_guard<std::mutex> lock(mutex);
  for (std::size_t i = 0; i < kept.size(); ++i) {
    if (std::memcmp(kept[i]->level, levels, sizeof kept[i]->level) != 0) continue;
    std::rotate(kept.begin(), kept.begin() + std::ptrdiff_t(i), kept.begin() + std::ptrdiff_t(i) + 1);
    return kept.front();
  }
  if (kept.size() == kKept) kept.pop_back();
  kept.insert(kept.begin(), make_map(levels));
  return kept.front();
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
  const auto map1 = map_of(options.map1);
  const auto map2 = map_of(options.map2);
  std::vector<AdamwCoefficients> scalars;  // a new entry only where the step differs from the tensor before
  std::vector<std::int32_t> scalars_of(std::size_t(count), 0);
  float last_step = std::numeric_limits<float>::quiet_NaN();
  for (std::int64_t i = 0; i < count; ++i) {
    const float step = *tensors[i].step += 1.0f;
    if (scalars.empty() || step != last_step) scalars.push_back(coefficients(options, double(step)));
    last_step = step;
    scalars_of[std::size_t(i)] = std::int32_t(scalars.size() - 1);
  }
  parallel_for_units(tensor_units(tensors, count), [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
    const AdamwTensor& t = tensors[i];
    const bool same = t.grad_dtype == t.param_dtype;
    const AdamwKernel kernel = same ? table.same[int(t.param_dtype)] : table.f32_grad[int(t.param_dtype)];
    kernel({t, t.index < 0 ? i : t.index, begin, end, scalars[std::size_t(scalars_of[std::size_t(i)])], map1.get(),
            map2.get(), options.seed});
  });
}

}  // namespace pyfastpeft
