// The 8-bit maps of AdamW's state on the GPU: levels and thresholds in shared memory, exact nearest codes.
//
// A code is the number of thresholds strictly below x. The dynamic maps are piecewise linear: decade i, the magnitudes
// 10^(i-7) to 10^(i-6), holds 2^i (signed) or 2^(i+1) (unsigned) evenly spaced levels. So the position among the levels
// is one FMA with the decade's slope, and rounding that position down leaves two codes to choose from: one comparison
// with the exact threshold decides. Errors of the position below half a level do not matter.
//
// A loaded map may be any ascending one. Position never falls as x grows, so it is enough to look at both sides of each
// threshold c: position(c's threshold) <= c <= position(the next float above). Each block proves that for its maps as it
// loads them, and searches the thresholds (8 comparisons) where it does not hold.
#pragma once

#include "adamw/adamw_math.h"
#include "common/cuda_vec.cuh"

namespace pyfastpeft {
namespace {

constexpr int kLevels = 256, kDecades = 7;

struct DeviceMap {
  float level[kLevels];
  float threshold[kLevels];     // the last is infinite
  float2 decade[kDecades + 1];  // position = magnitude · x + y
  bool piecewise_linear;
};

// In [2^15, 2^16) neighbouring floats differ by 1/256: adding this leaves a number's floor in bits 8 and up.
constexpr float kFixedPoint = 49152.0f;
constexpr unsigned kFixedPointBits = 0x47400000u;

// The lower of the two codes that x may have, x scaled to [-1, 1].
template <bool kSigned>
__device__ __forceinline__ int map_position(const DeviceMap& map, float x) {
  const float magnitude = kSigned ? fabsf(x) : fmaxf(x, 0.0f);
  int decade = 0;
#pragma unroll
  for (const float start : {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f}) decade += magnitude >= start;
  const float2 line = map.decade[decade];
  const int at = (__float_as_int(__fmaf_rn(magnitude, line.x, line.y)) - int(kFixedPointBits)) >> 8;
  if (!kSigned) return min(max(at, 0), kLevels - 2);
  return __float_as_int(x) < 0 ? max(126 - at, 0) : min(127 + at, kLevels - 2);
}

template <bool kSigned>
__device__ __forceinline__ unsigned map_code(const DeviceMap& map, float x, bool piecewise_linear) {
  if (piecewise_linear) {
    const int code = map_position<kSigned>(map, x);
    return unsigned(code + (x > map.threshold[code]));
  }
  int code = 0;
#pragma unroll
  for (int half = kLevels / 2; half > 0; half /= 2)
    if (x > map.threshold[code + half - 1]) code += half;
  return unsigned(code);
}

// Fills `map` from 256 ascending levels; all threads of a block of kLevels call it.
template <bool kSigned>
__device__ __forceinline__ void load_map(DeviceMap& map, const float* levels) {
  const int i = int(threadIdx.x);
  const float level = levels[i];
  const float threshold = i == kLevels - 1 ? __uint_as_float(0x7f800000u) : adamw_threshold(level, levels[i + 1]);
  map.level[i] = level;
  map.threshold[i] = threshold;
  if (i <= kDecades) {
    // levels of the decade, and the code (signed: above that of zero) of its first
    const float count = float(kSigned ? 1 << i : 2 << i), first = kSigned ? count : count - 1.0f;
    float slope = count / 0.9f;
    for (int d = i; d < kDecades - 1; ++d) slope *= 10.0f;
    map.decade[i] = make_float2(slope, kFixedPoint + (first - 0.5f - count * (0.1f / 0.9f)));
  }
  __syncthreads();
  bool linear = true;
  if (i < kLevels - 1)
    linear = map_position<kSigned>(map, threshold) <= i && map_position<kSigned>(map, adamw_next(threshold)) >= i;
  const bool all = __syncthreads_and(linear);
  if (i == 0) map.piecewise_linear = all;
  __syncthreads();
}

}  // namespace
}  // namespace pyfastpeft
