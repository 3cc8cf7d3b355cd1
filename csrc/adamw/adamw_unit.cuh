// AdamW on one unit: 256 neighbouring values of one tensor and their state, by one warp. adamw_cuda.cu has the whole.
#pragma once

#include <cstring>

#include "adamw/adamw_codes.cuh"

namespace pyfastpeft {
namespace {

constexpr int kGroup = 4;  // neighbouring values a lane holds
constexpr int kHalf = kWarp * kGroup, kHalves = int(kAdamwBlock) / kHalf;
constexpr unsigned kAllLanes = 0xffffffffu, kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;

// One tensor of the list, as the table in device memory holds it.
struct Entry {
  void* param;
  void* exp_avg;
  void* exp_avg_sq;
  float* absmax1;
  float* absmax2;
  float* master;
  float* step;
  std::uint64_t kind_and_n;  // kind << 56 | n
};
constexpr std::int64_t kEntryWords = 8;
static_assert(sizeof(Entry) == kEntryWords * sizeof(std::uint64_t), "an entry is eight words");

enum Kind : unsigned { kF32 = 0, kF16 = 1, kF16GradF32 = 2, kBf16 = 3, kBf16GradF32 = 4, kBits8 = 8 };

// ---- four values ---------------------------------------------------------------------------------------------------
template <typename T>
struct Bits4;
template <>
struct Bits4<float> {
  using type = uint4;
};
template <>
struct Bits4<__half> {
  using type = uint2;
};
template <>
struct Bits4<__nv_bfloat16> {
  using type = uint2;
};
template <>
struct Bits4<std::uint8_t> {
  using type = unsigned;
};

// values[at, at + 4), zero from `left` on. kWhole: there are four, aligned to their size.
template <bool kWhole, typename T>
__device__ __forceinline__ void load4(const T* values, int at, int left, T (&out)[4]) {
  if constexpr (kWhole) {
    const auto bits = __ldcs(reinterpret_cast<const typename Bits4<T>::type*>(values + at));
    memcpy(out, &bits, sizeof bits);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (at + i < left)
        out[i] = values[at + i];
      else
        memset(&out[i], 0, sizeof(T));
    }
  }
}

template <bool kWhole, bool kStreaming = true, typename T>
__device__ __forceinline__ void store4(const T (&in)[4], T* values, int at, int left) {
  if constexpr (kWhole) {
    typename Bits4<T>::type bits;
    memcpy(&bits, in, sizeof bits);
    auto* to = reinterpret_cast<typename Bits4<T>::type*>(values + at);
    if (kStreaming)
      __stcs(to, bits);
    else
      *to = bits;
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (at + i < left) values[at + i] = in[i];
  }
}

// ---- the update ----------------------------------------------------------------------------------------------------
struct Scalars {
  AdamwCoefficients c;
  float step;  // they belong to: the one after this launch
};

// a / divisor, correctly rounded, from the divisor's correctly rounded reciprocal (Markstein 1990): the remainder of the
// first quotient is exact. An infinite or undefined first quotient is already the result.
__device__ __forceinline__ float divided(float a, float divisor, float reciprocal) {
  const float quotient = __fmul_rn(a, reciprocal);
  const float better = __fmaf_rn(__fmaf_rn(-quotient, divisor, a), reciprocal, quotient);
  return fabsf(quotient) < __uint_as_float(kInfinity) ? better : quotient;
}

// adamw_kernel.h: adamw_update, operation for operation.
__device__ __forceinline__ void update(const Scalars& s, float g, float& p, float& m, float& v) {
  const AdamwCoefficients& c = s.c;
  g = __fmul_rn(g, c.grad_factor);
  if (c.l2 != 0) g = __fmaf_rn(p, c.l2, g);
  p = __fmul_rn(p, c.decay);
  const float change = __fadd_rn(g, -m);
  m = c.lerp1 < 0.5f ? __fmaf_rn(c.lerp1, change, m) : __fmaf_rn(__fadd_rn(c.lerp1, -1.0f), change, g);
  v = __fmaf_rn(__fmul_rn(c.one_minus_beta2, g), g, __fmul_rn(v, c.beta2));
  const float root = divided(__fsqrt_rn(v), c.correction2_sqrt, c.correction2_reciprocal);
  p = __fadd_rn(p, __fdiv_rn(__fmul_rn(c.negative_step_size, m), __fadd_rn(root, c.eps)));
}

__device__ __forceinline__ float stochastic(float x, std::uint32_t, float) { return x; }
__device__ __forceinline__ __half stochastic(float x, std::uint32_t random, __half) {
  return adamw_beyond_f16(x) ? __float2half_rn(x) : __ushort_as_half(adamw_stochastic_f16(x, random));
}
__device__ __forceinline__ __nv_bfloat16 stochastic(float x, std::uint32_t random, __nv_bfloat16) {
  return adamw_beyond_bf16(x) ? __float2bfloat16_rn(x) : __ushort_as_bfloat16(adamw_stochastic_bf16(x, random));
}

__device__ __forceinline__ void decode(const DeviceMap& map, const std::uint8_t (&codes)[4], float absmax,
                                       float (&values)[4]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) values[i] = __fmul_rn(map.level[codes[i]], absmax);
}

// The unit's absmax and codes. One that holds a NaN or an infinity becomes NaN as a whole.
template <bool kSigned, bool kWhole>
__device__ __forceinline__ void encode(const DeviceMap& map, const float (&values)[kHalves][4], std::uint8_t* codes,
                                       float* absmax, int lane_at, int left) {
  unsigned largest = 0;
#pragma unroll
  for (int h = 0; h < kHalves; ++h)
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (kWhole || lane_at + h * kHalf + i < left) largest = max(largest, __float_as_uint(values[h][i]) & kMagnitude);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, offset));

  const float scale = __uint_as_float(largest);
  const bool usable = largest != 0 && largest < kInfinity;
  const bool divide = largest < 0x00800000u;  // the reciprocal of a subnormal overflows
  const float reciprocal = __fdiv_rn(1.0f, scale);
  if (threadIdx.x % kWarp == 0) *absmax = largest >= kInfinity ? __uint_as_float(0x7fc00000u) : scale;
  const bool linear = map.piecewise_linear;
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    std::uint8_t out[4];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float scaled = divide ? __fdiv_rn(values[h][i], scale) : __fmul_rn(values[h][i], reciprocal);
      if (!usable) scaled = 0.0f;
      out[i] = std::uint8_t(map_code<kSigned>(map, scaled, linear));
    }
    store4<kWhole>(out, codes, lane_at + h * kHalf, left);
  }
}

// ---- one unit ------------------------------------------------------------------------------------------------------
struct Tensor {
  Entry entry;
  const void* grad;
  std::int64_t n, index, begin, units;  // units in all, the first of them
  bool aligned;                         // every array to the size of four of its values
};

// Four neighbouring values with their moments decoded: reads the parameter and the gradient, writes the parameter.
template <typename P, typename G, bool kWhole>
__device__ __forceinline__ void update4(const Tensor& t, std::int64_t begin, int at, int left, const Scalars& s,
                                        const std::int64_t* seed, float (&m)[4], float (&v)[4]) {
  P* const param = static_cast<P*>(t.entry.param) + begin;
  const bool has_master = t.entry.master != nullptr;
  float* const master = t.entry.master + (has_master ? begin : 0);
  P p_raw[4];
  G g_raw[4];
  float p[4];
  load4<kWhole>(static_cast<const G*>(t.grad) + begin, at, left, g_raw);
  if (has_master) {
    load4<kWhole>(master, at, left, p);
  } else {
    load4<kWhole>(param, at, left, p_raw);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) p[i] = as_f32(p_raw[i]);
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) update(s, as_f32(g_raw[i]), p[i], m[i], v[i]);
  if (has_master) store4<kWhole>(p, master, at, left);
  if (sizeof(P) < 4 && seed != nullptr && !has_master) {
    const std::uint64_t position = std::uint64_t(begin + at) / kGroup;
    const Philox4 random = philox4x32_10(position, std::uint64_t(t.index), std::uint64_t(*seed));
#pragma unroll
    for (int i = 0; i < kGroup; ++i) p_raw[i] = stochastic(p[i], random.v[i], P());
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) p_raw[i] = rounded<P>(p[i]);
  }
  store4<kWhole, false>(p_raw, param, at, left);
}

template <typename P, typename G, bool kBits8, bool kWhole>
__device__ __forceinline__ void process(const Tensor& t, std::int64_t unit, const Scalars& s, const DeviceMap* maps,
                                        const std::int64_t* seed) {
  const std::int64_t begin = unit * kAdamwBlock;
  const int left = int(min(t.n - begin, kAdamwBlock));
  const int lane_at = int(threadIdx.x) % kWarp * kGroup;
  if constexpr (!kBits8) {
    float* const exp_avg = static_cast<float*>(t.entry.exp_avg) + begin;
    float* const exp_avg_sq = static_cast<float*>(t.entry.exp_avg_sq) + begin;
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const int at = lane_at + h * kHalf;
      float m[4], v[4];
      load4<kWhole>(exp_avg, at, left, m);
      load4<kWhole>(exp_avg_sq, at, left, v);
      update4<P, G, kWhole>(t, begin, at, left, s, seed, m, v);
      store4<kWhole>(m, exp_avg, at, left);
      store4<kWhole>(v, exp_avg_sq, at, left);
    }
  } else {
    std::uint8_t* const codes1 = static_cast<std::uint8_t*>(t.entry.exp_avg) + begin;
    std::uint8_t* const codes2 = static_cast<std::uint8_t*>(t.entry.exp_avg_sq) + begin;
    float *const absmax1 = t.entry.absmax1 + unit, *const absmax2 = t.entry.absmax2 + unit;
    float m[kHalves][4], v[kHalves][4];
    const float largest1 = *absmax1, largest2 = *absmax2;
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      std::uint8_t m_codes[4], v_codes[4];
      load4<kWhole>(codes1, lane_at + h * kHalf, left, m_codes);
      load4<kWhole>(codes2, lane_at + h * kHalf, left, v_codes);
      decode(maps[0], m_codes, largest1, m[h]);
      decode(maps[1], v_codes, largest2, v[h]);
    }
#pragma unroll
    for (int h = 0; h < kHalves; ++h) update4<P, G, kWhole>(t, begin, lane_at + h * kHalf, left, s, seed, m[h], v[h]);
    __syncwarp();  // every lane has read the maxima before the first writes new ones
    encode<true, kWhole>(maps[0], m, codes1, absmax1, lane_at, left);
    encode<false, kWhole>(maps[1], v, codes2, absmax2, lane_at, left);
  }
}

template <bool kWhole>
__device__ __forceinline__ void process(const Tensor& t, std::int64_t unit, const Scalars& s, const DeviceMap* maps,
                                        const std::int64_t* seed) {
  switch (unsigned(t.entry.kind_and_n >> 56)) {  // the same for the whole warp
    case kF32:
      return process<float, float, false, kWhole>(t, unit, s, maps, seed);
    case kF16:
      return process<__half, __half, false, kWhole>(t, unit, s, maps, seed);
    case kF16GradF32:
      return process<__half, float, false, kWhole>(t, unit, s, maps, seed);
    case kBf16:
      return process<__nv_bfloat16, __nv_bfloat16, false, kWhole>(t, unit, s, maps, seed);
    case kBf16GradF32:
      return process<__nv_bfloat16, float, false, kWhole>(t, unit, s, maps, seed);
    case kF32 | kBits8:
      return process<float, float, true, kWhole>(t, unit, s, maps, seed);
    case kF16 | kBits8:
      return process<__half, __half, true, kWhole>(t, unit, s, maps, seed);
    case kF16GradF32 | kBits8:
      return process<__half, float, true, kWhole>(t, unit, s, maps, seed);
    case kBf16 | kBits8:
      return process<__nv_bfloat16, __nv_bfloat16, true, kWhole>(t, unit, s, maps, seed);
    case kBf16GradF32 | kBits8:
      return process<__nv_bfloat16, float, true, kWhole>(t, unit, s, maps, seed);
  }
}

}  // namespace
}  // namespace pyfastpeft
