// Double quantisation: the blocks' absmax as 8-bit codes of the dynamic map, in blocks of 256 around their mean.
//
// One value per 32 to 4096 weights, and still a third of the time of quantising them when each was searched for among
// 255 midpoints. The top 16 bits of a value choose a bucket that knows the code of its lowest value; a bucket of the
// dynamic map holds one midpoint at most, so one comparison ends the search. It serves every instruction set.
#include <algorithm>
#include <atomic>
#include <limits>

#include "common/parallel.h"
#include "common/subnormals.h"
#include "nf4/nf4.h"

namespace pyfastpeft {
namespace {

constexpr std::int64_t kGrainBlocks = 16;  // nested blocks of 256 per thread at least
constexpr std::uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;

// code(x) = how many of the 255 midpoints lie strictly below x, for finite x. Exact for every ascending map; quick where
// the midpoints lie in buckets of their own.
class Codes {
 public:
  explicit Codes(const float* map) {
    for (int i = 0; i < kNestedMapSize - 1; ++i) midpoint_[i] = (map[i] + map[i + 1]) * 0.5f;
    midpoint_[kNestedMapSize - 1] = std::numeric_limits<float>::infinity();
    // upwards through all values: the negative ones by falling magnitude, then the others by a rising one
    int code = 0;
    for (std::uint32_t bucket = kBuckets; bucket-- > 0;) {
      const std::uint32_t lowest = bucket + 1 == kBuckets ? kInfinity : ((kLow + bucket) << 16 | 0xffff);
      first_[1][bucket] = std::uint8_t(code = below(code, -bits_to_f32(lowest)));
    }
    for (std::uint32_t bucket = 0; bucket < kBuckets; ++bucket)
      first_[0][bucket] = std::uint8_t(code = below(code, bucket == 0 ? 0.0f : bits_to_f32((kLow + bucket) << 16)));
  }

  std::uint8_t operator()(float x) const {
    const std::uint32_t bits = f32_to_bits(x), top = (bits & kMagnitude) >> 16;
    const int first = first_[bits >> 31][std::min(std::max(top, kLow) - kLow, kBuckets - 1)];
    return std::uint8_t(below(first + (midpoint_[first] < x), x));
  }

 private:
  static constexpr std::uint32_t kLow = 0x3400;             // magnitudes below 2^-23 share a bucket
  static constexpr std::uint32_t kBuckets = 0x3f81 - kLow;  // as do those of 1 and above
  int below(int code, float x) const {
    while (__builtin_expect(midpoint_[code] < x, 0)) ++code;
    return code;
  }
  float midpoint_[kNestedMapSize];  // the last is infinite
  std::uint8_t first_[2][kBuckets];
};

}  // namespace

std::int64_t nf4_quantize_absmax_cpu(const float* absmax, std::int64_t blocks, float offset, const float* nested_map,
                                     std::uint8_t* codes, float* nested_absmax) {
  constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::max();
  std::atomic<std::int64_t> first_bad{kNone};
  const Codes code(nested_map);
  parallel_for(block_count(blocks, kNestedBlocksize), kGrainBlocks, [&](std::int64_t begin, std::int64_t end) {
    const KeepSubnormals keep;
    for (std::int64_t nested = begin; nested < end; ++nested) {
      const std::int64_t first = nested * kNestedBlocksize, last = std::min(blocks, first + kNestedBlocksize);
      const auto magnitude = [&](std::int64_t i) { return std::int32_t(f32_to_bits(absmax[i] - offset) & kMagnitude); };
      std::int32_t largest = 0;
      for (std::int64_t i = first; i < last; ++i) largest = std::max(largest, magnitude(i));
      if (largest >= std::int32_t(kInfinity)) {
        std::int64_t bad = first, seen = first_bad.load();
        while (magnitude(bad) < std::int32_t(kInfinity)) ++bad;
        while (bad < seen && !first_bad.compare_exchange_weak(seen, bad)) {
        }
        return;
      }
      nested_absmax[nested] = bits_to_f32(std::uint32_t(largest));
      const float scale = 1.0f / std::max(nested_absmax[nested], kAbsmaxFloor);
      for (std::int64_t i = first; i < last; ++i) codes[i] = code((absmax[i] - offset) * scale);
    }
  });
  return first_bad == kNone ? -1 : first_bad.load();
}

}  // namespace pyfastpeft
