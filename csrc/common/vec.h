// One vector of fp32 lanes per instruction set, behind the same names: an elementwise kernel is written once as a
// template over it, and a suffixed file (*_avx2.cpp, *_avx512.cpp) instantiates it. Every operation is a single IEEE
// operation, so all variants give the same bits.
//
// Everything is in an anonymous namespace: code compiled with one file's flags must never be merged with another's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own header (its bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace pyfastpeft {
namespace {

struct VecScalar {
  static constexpr int width = 1;
  float v;
  static VecScalar set(float x) { return {x}; }
  template <typename T>
  static VecScalar load(const T* p) {
    return {to_f32(*p)};
  }
  template <typename T>
  void store(T* p) const {
    *p = from_f32<T>(v);
  }
  friend VecScalar operator+(VecScalar a, VecScalar b) { return {a.v + b.v}; }
  friend VecScalar operator-(VecScalar a, VecScalar b) { return {a.v - b.v}; }
  friend VecScalar operator*(VecScalar a, VecScalar b) { return {a.v * b.v}; }
  friend VecScalar operator/(VecScalar a, VecScalar b) { return {a.v / b.v}; }
  static VecScalar fma(VecScalar a, VecScalar b, VecScalar c) { return {std::fma(a.v, b.v, c.v)}; }
  static VecScalar sqrt(VecScalar a) { return {std::sqrt(a.v)}; }
  static VecScalar negate(VecScalar a) { return {-a.v}; }
  static VecScalar sign(VecScalar a) { return {float((a.v > 0) - (a.v < 0))}; }  // 0 of a NaN
  // b where a is finite, else a
  static VecScalar where_finite(VecScalar a, VecScalar b) { return std::isfinite(a.v) ? b : a; }
  // the lanes of two vectors by turns, in two vectors: a's and b's first halves, then their second halves
  static void interleave(VecScalar a, VecScalar b, VecScalar& low, VecScalar& high) { low = a, high = b; }
  // the lanes whose bit is set, 0 in the others
  static VecScalar keep(VecScalar a, std::uint32_t bits) { return {bits & 1 ? a.v : 0.0f}; }
};

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
struct VecAvx2 {
  static constexpr int width = 8;
  __m256 v;
  static VecAvx2 set(float x) { return {_mm256_set1_ps(x)}; }
  static VecAvx2 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static VecAvx2 load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static VecAvx2 load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i wide = _mm256_blendv_epi8(rounded, nan, is_nan);
    const __m256i narrow = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(narrow));
  }
  void store(f16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  friend VecAvx2 operator+(VecAvx2 a, VecAvx2 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend VecAvx2 operator-(VecAvx2 a, VecAvx2 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend VecAvx2 operator*(VecAvx2 a, VecAvx2 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend VecAvx2 operator/(VecAvx2 a, VecAvx2 b) { return {_mm256_div_ps(a.v, b.v)}; }
  static VecAvx2 fma(VecAvx2 a, VecAvx2 b, VecAvx2 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static VecAvx2 sqrt(VecAvx2 a) { return {_mm256_sqrt_ps(a.v)}; }
  static VecAvx2 negate(VecAvx2 a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
  static VecAvx2 sign(VecAvx2 a) {
    const __m256 zero = _mm256_setzero_ps(), one = _mm256_set1_ps(1.0f);
    return {_mm256_sub_ps(_mm256_and_ps(_mm256_cmp_ps(a.v, zero, _CMP_GT_OQ), one),
                          _mm256_and_ps(_mm256_cmp_ps(a.v, zero, _CMP_LT_OQ), one))};
  }
  static VecAvx2 where_finite(VecAvx2 a, VecAvx2 b) {
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v);
    const __m256 finite = _mm256_cmp_ps(magnitude, _mm256_set1_ps(__builtin_inff()), _CMP_LT_OQ);
    return {_mm256_blendv_ps(a.v, b.v, finite)};
  }
  static void interleave(VecAvx2 a, VecAvx2 b, VecAvx2& low, VecAvx2& high) {
    const __m256 even = _mm256_unpacklo_ps(a.v, b.v), odd = _mm256_unpackhi_ps(a.v, b.v);  // of each half
    low.v = _mm256_permute2f128_ps(even, odd, 0x20), high.v = _mm256_permute2f128_ps(even, odd, 0x31);
  }
  static VecAvx2 keep(VecAvx2 a, std::uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lane), lane);
    return {_mm256_and_ps(a.v, _mm256_castsi256_ps(kept))};
  }
};
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
struct VecAvx512 {
  static constexpr int width = 16;
  __m512 v;
  static VecAvx512 set(float x) { return {_mm512_set1_ps(x)}; }
  static VecAvx512 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static VecAvx512 load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static VecAvx512 load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const {  // not vcvtneps2bf16: that flushes subnormals
    const __m512i u = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i up = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_mask_sub_epi32(up, odd, up, _mm512_set1_epi32(-1));
    const __m512i wide = _mm512_mask_or_epi32(rounded, is_nan, u, _mm512_set1_epi32(0x400000));
    const __m512i high_halves =
        _mm512_set_epi64(0, 0, 0, 0, 0x001f001d001b0019, 0x0017001500130011, 0x000f000d000b0009, 0x0007000500030001);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_castsi512_si256(_mm512_permutexvar_epi16(high_halves, wide)));
  }
  void store(f16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  friend VecAvx512 operator+(VecAvx512 a, VecAvx512 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend VecAvx512 operator-(VecAvx512 a, VecAvx512 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend VecAvx512 operator*(VecAvx512 a, VecAvx512 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend VecAvx512 operator/(VecAvx512 a, VecAvx512 b) { return {_mm512_div_ps(a.v, b.v)}; }
  static VecAvx512 fma(VecAvx512 a, VecAvx512 b, VecAvx512 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static VecAvx512 sqrt(VecAvx512 a) { return {_mm512_sqrt_ps(a.v)}; }
  static VecAvx512 negate(VecAvx512 a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
  static VecAvx512 sign(VecAvx512 a) {
    const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.0f);
    const __m512 positive = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, zero, _CMP_GT_OQ), one);
    return {_mm512_mask_mov_ps(positive, _mm512_cmp_ps_mask(a.v, zero, _CMP_LT_OQ), _mm512_set1_ps(-1.0f))};
  }
  static VecAvx512 where_finite(VecAvx512 a, VecAvx512 b) {
    return {_mm512_mask_blend_ps(_mm512_fpclass_ps_mask(a.v, 0x99), b.v, a.v)};  // infinities and NaNs
  }
  static void interleave(VecAvx512 a, VecAvx512 b, VecAvx512& low, VecAvx512& high) {
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    low.v = _mm512_permutex2var_ps(a.v, first, b.v), high.v = _mm512_permutex2var_ps(a.v, second, b.v);
  }
  static VecAvx512 keep(VecAvx512 a, std::uint32_t bits) { return {_mm512_maskz_mov_ps(__mmask16(bits), a.v)}; }
};
#endif

// The last n < width values: through a padded copy, so no kernel needs a second, scalar body.
template <typename V, typename T>
V load_part(const T* p, std::int64_t n) {
  T padded[V::width] = {};
  std::memcpy(padded, p, sizeof(T) * std::size_t(n));
  return V::load(padded);
}
template <typename V, typename T>
void store_part(V value, T* p, std::int64_t n) {
  T padded[V::width];
  value.store(padded);
  std::memcpy(p, padded, sizeof(T) * std::size_t(n));
}

// The same for fp32, without the copy.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
alignas(32) constexpr std::int32_t kFirstLanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
template <>
inline VecAvx2 load_part<VecAvx2, float>(const float* p, std::int64_t n) {
  return {_mm256_maskload_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kFirstLanes + 8 - n)))};
}
inline void store_part(VecAvx2 value, float* p, std::int64_t n) {
  _mm256_maskstore_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kFirstLanes + 8 - n)), value.v);
}
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
template <>
inline VecAvx512 load_part<VecAvx512, float>(const float* p, std::int64_t n) {
  return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)};
}
inline void store_part(VecAvx512 value, float* p, std::int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), value.v);
}
#endif

// rows[i] lane j <-> rows[j] lane i. After each round a lane's number, row and lane taken as one, is turned by a bit.
template <typename V>
void transpose(V (&rows)[V::width]) {
  constexpr int kHalf = V::width / 2;
#pragma GCC unroll 4
  for (int round = 1; round < V::width; round *= 2) {
    V turned[V::width];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) V::interleave(rows[i], rows[i + kHalf], turned[2 * i], turned[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < V::width; ++i) rows[i] = turned[i];
  }
}

}  // namespace
}  // namespace pyfastpeft
