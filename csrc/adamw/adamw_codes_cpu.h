// The 8-bit maps of AdamW's state on the CPU: exact nearest codes, one at a time (the specification) and in vectors.
// Private to the adamw folder.
#pragma once

#include <algorithm>

#include "adamw/adamw_math.h"
#include "common/vec.h"

namespace pyfastpeft {

// Exact nearest code of an 8-bit map, ties to the lower: the number of thresholds strictly below x.
// threshold[c] is the midpoint of levels c and c + 1 rounded down, which compares like the midpoint itself. The top 16
// bits of x choose a bucket, whose lowest value's code is `first`; a value has at most one further threshold to pass
// in the dynamic maps (any ascending map stays exact).
//
// Vectors use that the dynamic maps are piecewise linear: within a decade of magnitudes the levels are evenly spaced, so
// that a level's number among those above zero is magnitude · slope + offset, rounded to nearest. The regions, zero's
// neighbourhood, seven decades and level 1, are told apart by the map's own thresholds between them. Where the number lies within
// kUnsure of the middle between two, or the magnitude is equal to a threshold between regions, the lane asks the
// thresholds instead. make_map (adamw_cpu.cpp) proves for each map that this is exact: the number never falls as the
// magnitude grows, and at each threshold it lies within kUnsure / 2 of the middle. (The rest of kUnsure covers the last
// bits of the variants' own arithmetic.)
struct AdamwMap {
  static constexpr std::uint32_t kLowBucket = 0x3400;             // 2^-23: below it only zero's neighbours
  static constexpr std::uint32_t kBuckets = 0x3f81 - kLowBucket;  // up to 1 + 1/128
  static constexpr float kUnsure = 1.0f / 4096;
  static constexpr int kRegions = 9, kDecades = 7;  // zero, the decades, one
  static constexpr std::int32_t kLowOctave = 104;   // exponents below it are as this one
  float level[256];
  float threshold[256];  // the last is infinite
  std::uint8_t first[2][kBuckets];
  std::uint8_t zero;  // the code of 0

  bool piecewise_linear;           // what follows holds
  float smallest;                  // what values below it have the code of, and no bound is equal to
  float bound[kRegions - 1];       // the magnitudes above which regions 1, 2, … begin
  float slope[16], offset[16];     // by region
  std::int32_t top[16];            // the region's largest number
  float octave_bound[32];          // by a magnitude's exponent, modulo 32: the bound in that octave, or infinity
  std::int32_t octave_region[32];  // and the region at its lower end
  std::uint8_t bytes[4][256];      // the levels' bytes, the lowest first
};

namespace {

inline std::uint8_t adamw_nearest(const AdamwMap& map, float x) {
  const std::uint32_t bits = adamw_bits(x), top = (bits & 0x7fffffffu) >> 16;
  const std::uint32_t bucket = std::max(top, AdamwMap::kLowBucket) - AdamwMap::kLowBucket;
  unsigned code = map.first[bits >> 31][bucket];
  code += x > map.threshold[code];
  while (__builtin_expect(x > map.threshold[code], 0)) ++code;
  return std::uint8_t(code);
}

// A block's values = level[code] · absmax, and the codes of values · factor; vectors where there is a whole one.
inline void adamw_decode_rest(const std::uint8_t* codes, const AdamwMap& map, float absmax, float* out, std::int64_t i,
                              std::int64_t n) {
  for (; i < n; ++i) out[i] = map.level[codes[i]] * absmax;
}
inline void adamw_encode_rest(const float* x, const AdamwMap& map, float factor, std::uint8_t* codes, std::int64_t i,
                              std::int64_t n) {
  for (; i < n; ++i) codes[i] = adamw_nearest(map, x[i] * factor);
}
template <typename V>
struct AdamwCodes {
  static void decode(const std::uint8_t* codes, const AdamwMap& map, float absmax, float* out, std::int64_t n) {
    adamw_decode_rest(codes, map, absmax, out, 0, n);
  }
  static void encode(const float* x, const AdamwMap& map, float factor, std::uint8_t* codes, std::int64_t n) {
    adamw_encode_rest(x, map, factor, codes, 0, n);
  }
};

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
template <>
struct AdamwCodes<VecAvx2> {
  static void decode(const std::uint8_t* codes, const AdamwMap& map, float absmax, float* out, std::int64_t n) {
    const __m256 scale = _mm256_set1_ps(absmax);
    std::int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
      _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_i32gather_ps(map.level, index, 4), scale));
    }
    adamw_decode_rest(codes, map, absmax, out, i, n);
  }

  static void encode(const float* values, const AdamwMap& map, float factor, std::uint8_t* codes, std::int64_t n) {
    const __m256 sign = _mm256_set1_ps(-0.0f), scale = _mm256_set1_ps(factor);
    const __m256 slopes = _mm256_loadu_ps(map.slope), offsets = _mm256_loadu_ps(map.offset);
    const __m256i tops = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(map.top));
    const __m256 sure = _mm256_set1_ps(0.5f - AdamwMap::kUnsure);
    const __m256i zero = _mm256_set1_epi32(map.zero);
    std::int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(values + i), scale), magnitude = _mm256_andnot_ps(sign, x);
      __m256i region = _mm256_setzero_si256();
      __m256 unsure = _mm256_setzero_ps();
      for (int r = 0; r < AdamwMap::kRegions - 2; ++r) {
        const __m256 bound = _mm256_set1_ps(map.bound[r]);
        region = _mm256_sub_epi32(region, _mm256_castps_si256(_mm256_cmp_ps(magnitude, bound, _CMP_GT_OQ)));
        unsure = _mm256_or_ps(unsure, _mm256_cmp_ps(magnitude, bound, _CMP_EQ_OQ));
      }
      const __m256 exact = _mm256_fmadd_ps(magnitude, _mm256_permutevar8x32_ps(slopes, region),
                                           _mm256_permutevar8x32_ps(offsets, region));
      const __m256 nearest = _mm256_round_ps(exact, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const __m256 off = _mm256_andnot_ps(sign, _mm256_sub_ps(exact, nearest));
      unsure = _mm256_or_ps(unsure, _mm256_cmp_ps(off, sure, _CMP_GT_OQ));
      // the eighth region is level 1 alone: it follows the seventh's largest number
      const __m256 last = _mm256_set1_ps(map.bound[AdamwMap::kRegions - 2]);
      unsure = _mm256_or_ps(unsure, _mm256_cmp_ps(magnitude, last, _CMP_EQ_OQ));
      __m256i number = _mm256_min_epi32(_mm256_cvtps_epi32(nearest), _mm256_permutevar8x32_epi32(tops, region));
      number = _mm256_sub_epi32(number, _mm256_castps_si256(_mm256_cmp_ps(magnitude, last, _CMP_GT_OQ)));
      const __m256i negative = _mm256_srai_epi32(_mm256_castps_si256(x), 31);
      number = _mm256_sub_epi32(_mm256_xor_si256(number, negative), negative);
      // packing saturates: -1 has no level, and an unsigned map no negative ones
      const __m256i code = _mm256_add_epi32(number, zero), words = _mm256_packs_epi32(code, code);
      const __m256i bytes = _mm256_packus_epi16(words, words);
      const int low = _mm256_extract_epi32(bytes, 0), high = _mm256_extract_epi32(bytes, 4);
      std::memcpy(codes + i, &low, 4);
      std::memcpy(codes + i + 4, &high, 4);
      unsigned lanes = unsigned(_mm256_movemask_ps(unsure));
      if (__builtin_expect(lanes != 0, 0))
        for (; lanes != 0; lanes &= lanes - 1) {
          const int lane = __builtin_ctz(lanes);
          codes[i + lane] = adamw_nearest(map, values[i + lane] * factor);
        }
    }
    adamw_encode_rest(values, map, factor, codes, i, n);
  }
};
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VBMI__)
template <>
struct AdamwCodes<VecAvx512> {
  // 64 values at a time. Each of a level's four bytes is looked up in a table of 256: the byte permutation takes seven bits
  // of a code, a blend the eighth.
  static void decode(const std::uint8_t* codes, const AdamwMap& map, float absmax, float* out, std::int64_t n) {
    __m512i table[4][4];
    for (int byte = 0; byte < 4; ++byte)
      for (int i = 0; i < 4; ++i) table[byte][i] = _mm512_loadu_si512(map.bytes[byte] + 64 * i);
    // bytes are interleaved within 128 bits, twice: the codes are put where that brings them in order
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512 scale = _mm512_set1_ps(absmax);
    std::int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
      const __m512i code = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes + i));
      const __mmask64 upper = _mm512_movepi8_mask(code);
      __m512i byte[4];
      for (int b = 0; b < 4; ++b) {
        const __m512i(&t)[4] = table[b];
        byte[b] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(t[0], code, t[1]),
                                         _mm512_permutex2var_epi8(t[2], code, t[3]));
      }
      const __m512i low[2] = {_mm512_unpacklo_epi8(byte[0], byte[1]), _mm512_unpackhi_epi8(byte[0], byte[1])};
      const __m512i high[2] = {_mm512_unpacklo_epi8(byte[2], byte[3]), _mm512_unpackhi_epi8(byte[2], byte[3])};
      for (int half = 0; half < 2; ++half) {
        const __m512 first = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low[half], high[half]));
        const __m512 second = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low[half], high[half]));
        _mm512_storeu_ps(out + i + 32 * half, _mm512_mul_ps(first, scale));
        _mm512_storeu_ps(out + i + 32 * half + 16, _mm512_mul_ps(second, scale));
      }
    }
    adamw_decode_rest(codes, map, absmax, out, i, n);
  }

  // No two bounds share an octave: the exponent finds the region below and the one bound to compare with. 256.5 are
  // added to a number: the eight bits below the leading one are then the number rounded, and the fifteen below those tell
  // how far from a middle it was.
  static void encode(const float* values, const AdamwMap& map, float factor, std::uint8_t* codes, std::int64_t n) {
    if (map.zero != 0)
      encode_by<true>(values, map, factor, codes, n);
    else
      encode_by<false>(values, map, factor, codes, n);
  }
  template <bool kSigned>
  static void encode_by(const float* values, const AdamwMap& map, float factor, std::uint8_t* codes, std::int64_t n) {
    const __m512 bound_low = _mm512_loadu_ps(map.octave_bound), bound_high = _mm512_loadu_ps(map.octave_bound + 16);
    const __m512i region_low = _mm512_loadu_si512(map.octave_region);
    const __m512i region_high = _mm512_loadu_si512(map.octave_region + 16);
    const __m512 slopes = _mm512_loadu_ps(map.slope);
    const __m512 offsets = _mm512_add_ps(_mm512_loadu_ps(map.offset), _mm512_set1_ps(256.5f));
    const __m512i leading = _mm512_set1_epi32(0x43800000 >> 15);
    const __m512i tops = _mm512_or_si512(_mm512_loadu_si512(map.top), leading);
    const __m512i one = _mm512_set1_epi32(1), zero = _mm512_set1_epi32(map.zero);
    constexpr int kFraction = int(AdamwMap::kUnsure * 32768);
    const __m512i unsure_below = _mm512_set1_epi32(kFraction), unsure_bits = _mm512_set1_epi32(0x7fff & -2 * kFraction);
    const __m512 scale = _mm512_set1_ps(factor), smallest = _mm512_set1_ps(map.smallest);
    // what is less has the code of zero, as this has (the lowest bound is in its octave or above)
    const __m512 lowest = _mm512_castsi512_ps(_mm512_set1_epi32(AdamwMap::kLowOctave << 23));
    std::int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      __m512 x = _mm512_mul_ps(_mm512_loadu_ps(values + i), scale);
      if (kSigned) x = _mm512_max_ps(x, smallest);
      const __m512 magnitude = _mm512_max_ps(kSigned ? _mm512_abs_ps(x) : x, lowest);
      const __m512i octave = _mm512_srli_epi32(_mm512_castps_si512(magnitude), 23);
      const __m512 bound = _mm512_permutex2var_ps(bound_low, octave, bound_high);
      __m512i region = _mm512_permutex2var_epi32(region_low, octave, region_high);
      region = _mm512_mask_add_epi32(region, _mm512_cmp_ps_mask(magnitude, bound, _CMP_GT_OQ), region, one);
      const __m512i exact = _mm512_castps_si512(
          _mm512_fmadd_ps(magnitude, _mm512_permutexvar_ps(region, slopes), _mm512_permutexvar_ps(region, offsets)));
      __mmask16 unsure = _mm512_testn_epi32_mask(_mm512_add_epi32(exact, unsure_below), unsure_bits);
      if (kSigned) unsure |= _mm512_cmp_ps_mask(magnitude, bound, _CMP_EQ_OQ);  // a tie goes down, on both sides of 0
      __m512i code = _mm512_min_epi32(_mm512_srli_epi32(exact, 15), _mm512_permutexvar_epi32(region, tops));
      if (kSigned) {
        const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
        code = _mm512_mask_sub_epi32(_mm512_add_epi32(zero, code), negative, zero, code);
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(code));  // its low eight bits
      if (__builtin_expect(unsure != 0, 0)) settle(values + i, map, factor, codes + i, unsure);
    }
    adamw_encode_rest(values, map, factor, codes, i, n);
  }
  static void settle(const float* values, const AdamwMap& map, float factor, std::uint8_t* codes, unsigned lanes) {
    for (; lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      codes[lane] = adamw_nearest(map, values[lane] * factor);
    }
  }
};
#endif

}  // namespace
}  // namespace pyfastpeft
