// Many Philox numbers in a row: philox_fill(counter, blocks, key, out) writes, for each of the kPhiloxCounters · blocks
// counters from `counter` on (high word 0), its four numbers. Which instructions do it is decided by the flags of the
// including file; the numbers are those of common/philox.h.
//
// A vector lane is 64 bits: the multiplication reads the low half of each, so what stands in the high halves (the rest of
// a product) need never be cleared. A round of 8 or 4 counters is 2 multiplications, 2 shifts and 4 xors (2 in AVX-512).
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "common/vec.h"  // the one place that includes immintrin.h

namespace pyfastpeft {
namespace {

#if defined(__AVX512F__)
constexpr std::int64_t kPhiloxCounters = 8;

inline void philox_block(std::uint64_t counter, std::uint64_t key, std::uint32_t* out) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  // lane order 0 4 1 5 2 6 3 7: the 64-bit unpacks below then give the counters in order
  const __m512i count =
      _mm512_add_epi64(_mm512_set1_epi64(std::int64_t(counter)), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
  __m512i c0 = count, c1 = _mm512_srli_epi64(count, 32), c2 = _mm512_setzero_si512(), c3 = c2;
  std::uint32_t k0 = std::uint32_t(key), k1 = std::uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), 0x96);
    c1 = p1;
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), 0x96);
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const __m512i low = _mm512_mask_shuffle_epi32(c0, 0xAAAA, c1, _MM_PERM_CCAA);   // c0 c1 of each counter
  const __m512i high = _mm512_mask_shuffle_epi32(c2, 0xAAAA, c3, _MM_PERM_CCAA);  // c2 c3
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(low, high));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(low, high));
}
#elif defined(__AVX2__)
constexpr std::int64_t kPhiloxCounters = 4;

inline void philox_block(std::uint64_t counter, std::uint64_t key, std::uint32_t* out) {
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
  const __m256i count = _mm256_add_epi64(_mm256_set1_epi64x(std::int64_t(counter)), _mm256_setr_epi64x(0, 2, 1, 3));
  __m256i c0 = count, c1 = _mm256_srli_epi64(count, 32), c2 = _mm256_setzero_si256(), c3 = c2;
  std::uint32_t k0 = std::uint32_t(key), k1 = std::uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(k0));
    c1 = p1;
    c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(k1));
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const __m256i low = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
  const __m256i high = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(low, high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_unpackhi_epi64(low, high));
}
#else
constexpr std::int64_t kPhiloxCounters = 1;

inline void philox_block(std::uint64_t counter, std::uint64_t key, std::uint32_t* out) {
  const Philox4 random = philox4x32_10(counter, 0, key);
  for (int lane = 0; lane < 4; ++lane) out[lane] = random.v[lane];
}
#endif

inline void philox_fill(std::uint64_t counter, std::int64_t blocks, std::uint64_t key, std::uint32_t* out) {
  for (std::int64_t i = 0; i < blocks; ++i)
    philox_block(counter + std::uint64_t(i * kPhiloxCounters), key, out + 4 * i * kPhiloxCounters);
}

}  // namespace
}  // namespace pyfastpeft
