// Decoding packed bytes to bf16 on AVX-512, for the kernels that read them directly and those that fill a panel. Only files
// compiled for AVX-512 include this.
#pragma once

#include "common/vec.h"
#include "nf4/nf4_scales.h"

namespace pyfastpeft {
namespace {

// The sums of the lanes of 4 vectors: halves, then quarters, then pairs, for every vector the same tree.
void add_lanes_avx512(const VecAvx512* v, float* total) {
  __m128 q[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v[i].v), _mm512_extractf32x8_ps(v[i].v, 1));
    q[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  _MM_TRANSPOSE4_PS(q[0], q[1], q[2], q[3]);
  _mm_storeu_ps(total, _mm_add_ps(_mm_add_ps(q[0], q[2]), _mm_add_ps(q[1], q[3])));
}

// A chunk is 64 bytes, 128 columns: two blocks' levels, scaled in fp32 and rounded to bf16 once, stand in one register,
// and bit 4 of an index says whose. Codes 0 and 2 of each 16 bits come out of one masking, 1 and 3 of another: lane i of
// vector j holds column 4i + (1, 3, 0, 2)[j].
struct Bf16Avx512 {
  using V = VecAvx512;
  using Element = bf16;
  using Sum = __m512;
  using Weights = __m512i;
  struct Chunk {
    __m512i bytes, levels, index;
  };
  static constexpr std::int64_t bytes = 64, columns = 128, kStrip = 0;
  static constexpr int vectors = 4;
  static constexpr int rows(int tokens) { return tokens <= 2 ? 4 : 2; }

  __m512 table;
  __m512i nibbles = _mm512_set1_epi8(15);
  __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(16), 1);
  explicit Bf16Avx512(QuantType type) : table(_mm512_loadu_ps(type == QuantType::nf4 ? kNf4Table : kFp4Table)) {}

  template <bool nested>
  Chunk chunk(const std::uint8_t* packed, const Nf4Scales& scales, std::int64_t group, std::int64_t c,
              std::int64_t per_row) const {
    Chunk chunk;
    const __m512 low = _mm512_mul_ps(table, _mm512_set1_ps(scales.at<nested>(group + 2 * c)));
    __m512 high = _mm512_setzero_ps();
    if (2 * c + 1 < per_row) {
      high = _mm512_mul_ps(table, _mm512_set1_ps(scales.at<nested>(group + 2 * c + 1)));
      chunk.bytes = _mm512_loadu_si512(packed);
    } else {  // the row's last group alone
      chunk.bytes = _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
    }
    chunk.levels = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    return chunk;
  }
  Weights weights(Chunk& chunk, int j) const {  // the permute reads the low 5 bits of an index
    if (j % 2 != 0)
      chunk.index = _mm512_srli_epi16(chunk.index, 8);
    else  // (codes & nibbles) | second
      chunk.index =
          _mm512_ternarylogic_epi32(j == 0 ? chunk.bytes : _mm512_srli_epi16(chunk.bytes, 4), nibbles, second, 0xEA);
    return _mm512_permutexvar_epi16(chunk.index, chunk.levels);
  }
  static __m512i load(const bf16* x) { return _mm512_load_si512(x); }
  // not _mm512_dpbf16_ps: gcc 12 sends what it takes through the stack
  static void dot(__m512i w, __m512i x, Sum& sum) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x)); }
  static Sum load_sum(const float* p) { return _mm512_loadu_ps(p); }
  static void store_sum(Sum sum, float* p) { _mm512_storeu_ps(p, sum); }
  static void add_lanes(const V* v, float* total) { add_lanes_avx512(v, total); }
};

// Writes 128 columns of x (zeros after the first `columns`, a multiple of 32) in the order of a chunk's four vectors.
struct Bf16Order {
  __m512i first, last;
  Bf16Order() {
    constexpr int kLane[4] = {1, 3, 0, 2};
    alignas(64) std::uint16_t pick[2][32];
    for (int i = 0; i < 32; ++i)  // of two vectors: two of the four columns of each lane
      for (int half = 0; half < 2; ++half) pick[half][i] = std::uint16_t(4 * (i % 16) + kLane[2 * half + i / 16]);
    first = _mm512_load_si512(pick[0]);
    last = _mm512_load_si512(pick[1]);
  }
  void pack(const bf16* from, std::int64_t columns, bf16* to, std::int64_t vector) const {
    __m512i v[4];
    for (int i = 0; i < 4; ++i) v[i] = 32 * i < columns ? _mm512_loadu_si512(from + 32 * i) : _mm512_setzero_si512();
    for (int half = 0; half < 2; ++half) {
      const __m512i index = half == 0 ? first : last;
      const __m512i a = _mm512_permutex2var_epi16(v[0], index, v[1]), b = _mm512_permutex2var_epi16(v[2], index, v[3]);
      _mm512_store_si512(to + 2 * half * vector, _mm512_shuffle_i64x2(a, b, 0x44));
      _mm512_store_si512(to + (2 * half + 1) * vector, _mm512_shuffle_i64x2(a, b, 0xEE));
    }
  }
};

}  // namespace
}  // namespace pyfastpeft
