// NF4 / FP4 dequantisation, AVX2 + F16C; the bits of the scalar kernel in nf4_dequantize_cpu.cpp.
//
// Per block the 16 levels are multiplied by absmax and rounded to the output type once. 16-bit levels are looked up by
// two byte shuffles (a table of low bytes and one of high bytes), fp32 levels by two 8-lane permutes and a blend.
#include <immintrin.h>

#include "nf4/nf4_cpu.h"

namespace pyfastpeft {
namespace {

// 16 bytes to their 32 codes in order, one per byte.
struct Codes {
  __m128i first, last;
  explicit Codes(const std::uint8_t* packed) {
    const __m128i byte = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)), nibble = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(_mm_srli_epi16(byte, 4), nibble), odd = _mm_and_si128(byte, nibble);
    first = _mm_unpacklo_epi8(even, odd);
    last = _mm_unpackhi_epi8(even, odd);
  }
};

// to nearest even in integers; 8 values in the low halves of 32-bit lanes
__m256i to_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
}

__m256i to_f16(__m256 value) {
  const __m256i rounded = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  const __m256i sign = _mm256_and_si256(rounded, _mm256_set1_epi32(0x8000));
  const __m256i quiet = _mm256_or_si256(sign, _mm256_set1_epi32(0x7e00));
  const __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
}

template <bool is_bf16>
void dequantize_16bit(const Nf4DequantizeArgs& args, const float* table, const float* absmax, std::int64_t begin,
                      std::int64_t end) {
  auto* out = static_cast<std::uint16_t*>(args.out);
  const __m256 table_low = _mm256_loadu_ps(table), table_high = _mm256_loadu_ps(table + 8);
  const __m256i split = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                         0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  for (std::int64_t block = begin; block < end; ++block) {
    const __m256 scale = _mm256_set1_ps(absmax[block - begin]);
    const __m256 low = _mm256_mul_ps(table_low, scale), high = _mm256_mul_ps(table_high, scale);
    const __m256i a = is_bf16 ? to_bf16(low) : to_f16(low), b = is_bf16 ? to_bf16(high) : to_f16(high);
    // quadwords 0 2 1 3 put the 16 levels in order; per 128-bit lane the low bytes then go first, the high ones second
    const __m256i level = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), _MM_SHUFFLE(3, 1, 2, 0));
    const __m256i bytes = _mm256_shuffle_epi8(level, split);
    const __m256i low_bytes = _mm256_permute4x64_epi64(bytes, _MM_SHUFFLE(2, 0, 2, 0));
    const __m256i high_bytes = _mm256_permute4x64_epi64(bytes, _MM_SHUFFLE(3, 1, 3, 1));
    const std::int64_t first = block * args.blocksize;
    for (std::int64_t i = first; i < first + args.blocksize; i += 32) {
      const Codes codes(args.packed + i / 2);
      const __m256i both = _mm256_set_m128i(codes.last, codes.first);
      const __m256i x = _mm256_shuffle_epi8(low_bytes, both), y = _mm256_shuffle_epi8(high_bytes, both);
      const __m256i lower = _mm256_unpacklo_epi8(x, y), upper = _mm256_unpackhi_epi8(x, y);
      auto* to = reinterpret_cast<__m256i*>(out + i);
      _mm256_storeu_si256(to, _mm256_permute2x128_si256(lower, upper, 0x20));
      _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(lower, upper, 0x31));
    }
  }
}

void dequantize_f32(const Nf4DequantizeArgs& args, const float* table, const float* absmax, std::int64_t begin,
                    std::int64_t end) {
  auto* out = static_cast<float*>(args.out);
  const __m256 table_low = _mm256_loadu_ps(table), table_high = _mm256_loadu_ps(table + 8);
  for (std::int64_t block = begin; block < end; ++block) {
    const __m256 scale = _mm256_set1_ps(absmax[block - begin]);
    const __m256 low = _mm256_mul_ps(table_low, scale), high = _mm256_mul_ps(table_high, scale);
    const auto look_up = [&](__m128i code) {
      const __m256i index = _mm256_cvtepu8_epi32(code);  // bit 3 chooses the table, bits 0 to 2 the lane
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                              _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    };
    const std::int64_t first = block * args.blocksize;
    for (std::int64_t i = first; i < first + args.blocksize; i += 32) {
      const Codes codes(args.packed + i / 2);
      _mm256_storeu_ps(out + i, look_up(codes.first));
      _mm256_storeu_ps(out + i + 8, look_up(_mm_srli_si128(codes.first, 8)));
      _mm256_storeu_ps(out + i + 16, look_up(codes.last));
      _mm256_storeu_ps(out + i + 24, look_up(_mm_srli_si128(codes.last, 8)));
    }
  }
}

}  // namespace

void nf4_dequantize_blocks_avx2(const Nf4DequantizeArgs& args, const float* absmax, std::int64_t begin,
                                std::int64_t end) {
  const std::int64_t whole = end * args.blocksize <= args.n ? end : end - 1;
  const float* table = args.type == QuantType::nf4 ? kNf4Table : kFp4Table;
  if (args.dtype == DType::f32)
    dequantize_f32(args, table, absmax, begin, whole);
  else if (args.dtype == DType::f16)
    dequantize_16bit<false>(args, table, absmax, begin, whole);
  else
    dequantize_16bit<true>(args, table, absmax, begin, whole);
  if (whole < end) nf4_dequantize_blocks_scalar(args, absmax + (whole - begin), whole, end);
}

}  // namespace pyfastpeft
