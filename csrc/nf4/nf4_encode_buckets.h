// The encoder's lookup tables for 16-lane vectors: one table read and one compare instead of a search.
//
// Split the range of x into 32 equal buckets narrower than any gap between thresholds: a bucket then holds at most one
// threshold. bucket(x) is monotone in x (a rounded multiply-add, truncated), so every threshold of a lower bucket lies
// below x and every one of a higher bucket above: code = base[bucket] + (threshold[bucket] < x), exactly.
#pragma once

#include <cstdint>

#include "nf4/nf4_format.h"

namespace pyfastpeft {

struct EncodeBuckets {
  float threshold[32];     // the one in this bucket, or infinity
  std::int32_t below[32];  // the code when x is not above it
  std::int32_t above[32];  // the code when it is
};

// bucket(x) = trunc(x · scale + shift); NF4 over [-1, 1], FP4 over |x| in [0, 1]. Both leave room for an x that exceeds
// 1 by rounding (1/absmax is subnormal, thus coarse, for absmax above 2^126).
constexpr float kNf4BucketScale = 15.5f, kNf4BucketShift = 15.5f;
constexpr float kFp4BucketScale = 31.0f, kFp4BucketShift = 0.0f;

template <int count>
static constexpr EncodeBuckets encode_buckets(const float (&thresholds)[count], float scale, float shift,
                                              const std::uint8_t* codes) {
  EncodeBuckets buckets{};
  int rank = 0;
  for (int bucket = 0; bucket < 32; ++bucket) {
    buckets.threshold[bucket] = __builtin_inff();
    buckets.below[bucket] = buckets.above[bucket] = codes[rank];
    if (rank < count && int(thresholds[rank] * scale + shift) == bucket) {
      buckets.threshold[bucket] = thresholds[rank];
      buckets.above[bucket] = codes[++rank];
    }
  }
  return buckets;
}

// No threshold shares its bucket, and none sits so close to a bucket's edge that the rounding of the multiply-add
// (fused or not) could move it across.
template <int count>
static constexpr bool one_threshold_per_bucket(const float (&thresholds)[count], float scale, float shift) {
  int previous = -1;
  for (float threshold : thresholds) {
    const double position = double(threshold) * scale + shift;
    const int bucket = int(position);
    if (bucket <= previous || bucket > 31 || position - bucket < 1e-4 || position - bucket > 1 - 1e-4) return false;
    previous = bucket;
  }
  return true;
}
static_assert(one_threshold_per_bucket(kNf4Thresholds, kNf4BucketScale, kNf4BucketShift), "NF4");
static_assert(one_threshold_per_bucket(kFp4Thresholds, kFp4BucketScale, kFp4BucketShift), "FP4");

constexpr std::uint8_t kNf4Codes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
alignas(64) constexpr EncodeBuckets kNf4Buckets = encode_buckets(kNf4Thresholds, kNf4BucketScale, kNf4BucketShift,
                                                                 kNf4Codes);
alignas(64) constexpr EncodeBuckets kFp4Buckets = encode_buckets(kFp4Thresholds, kFp4BucketScale, kFp4BucketShift,
                                                                 kFp4Ascending);

}  // namespace pyfastpeft
