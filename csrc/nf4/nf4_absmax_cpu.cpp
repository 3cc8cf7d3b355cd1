// Double quantisation: the blocks' absmax as 8-bit codes of the dynamic map, in blocks of 256 around their mean.
//
// One value per 32 to 4096 weights: a binary search in a 1 KiB table, without branches (which way it turns cannot be
// predicted; taking the branches cost more than quantising the weights), serves every instruction set.
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

// codes[i] = how many of the 255 midpoints lie strictly below x[i]. Eight searches go hand in hand: one alone is a chain
// of dependent loads.
constexpr int kLanes = 8;
void encode(const float* midpoints, const float* x, std::uint8_t* codes) {
  int below[kLanes] = {};
  for (int step = 128; step > 0; step /= 2)
    for (int lane = 0; lane < kLanes; ++lane) below[lane] += step & -int(midpoints[below[lane] + step - 1] < x[lane]);
  for (int lane = 0; lane < kLanes; ++lane) codes[lane] = std::uint8_t(below[lane]);
}

}  // namespace

std::int64_t nf4_quantize_absmax_cpu(const float* absmax, std::int64_t blocks, float offset, const float* nested_map,
                                     std::uint8_t* codes, float* nested_absmax) {
  constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::max();
  std::atomic<std::int64_t> first_bad{kNone};
  parallel_for(block_count(blocks, kNestedBlocksize), kGrainBlocks, [&](std::int64_t begin, std::int64_t end) {
    const KeepSubnormals keep;
    float midpoints[kNestedMapSize - 1];
    for (int i = 0; i < kNestedMapSize - 1; ++i) midpoints[i] = (nested_map[i] + nested_map[i + 1]) * 0.5f;
    for (std::int64_t nested = begin; nested < end; ++nested) {
      const std::int64_t first = nested * kNestedBlocksize, last = std::min(blocks, first + kNestedBlocksize);
      float largest = 0;
      for (std::int64_t i = first; i < last; ++i) {
        const std::uint32_t magnitude = f32_to_bits(absmax[i] - offset) & kMagnitude;
        if (magnitude >= kInfinity) {
          std::int64_t seen = first_bad.load();
          while (i < seen && !first_bad.compare_exchange_weak(seen, i)) {
          }
          return;
        }
        largest = std::max(largest, bits_to_f32(magnitude));
      }
      nested_absmax[nested] = largest;
      const float scale = 1.0f / std::max(largest, kAbsmaxFloor);
      for (std::int64_t i = first; i < last; i += kLanes) {
        const std::int64_t count = std::min<std::int64_t>(kLanes, last - i);
        float x[kLanes] = {};
        std::uint8_t code[kLanes];
        for (std::int64_t lane = 0; lane < count; ++lane) x[lane] = (absmax[i + lane] - offset) * scale;
        encode(midpoints, x, code);
        std::copy_n(code, count, codes + i);
      }
    }
  });
  return first_bad == kNone ? -1 : first_bad.load();
}

}  // namespace pyfastpeft
