// NF4 / FP4 dequantisation, AVX-512; the bits of the scalar kernel in nf4_dequantize_cpu.cpp.
//
// Per block the 16 levels are multiplied by absmax and rounded to the output type once; then one permute looks up 32
// 16-bit values (16 of fp32). The permute reads only the low bits of an index, so the two nibbles of a byte become two
// indices by two shifts: x >> 4 in the low half of a lane, x shifted up into its high half, with no mask.
#include <immintrin.h>

#include "nf4/nf4_cpu.h"

namespace pyfastpeft {
namespace {

// to nearest even in integers: the bf16 conversion instruction would flush subnormals
__m256i to_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}

__m256i to_f16(__m512 value) {
  const __m256i rounded = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m256i sign = _mm256_and_si256(rounded, _mm256_set1_epi16(short(0x8000)));
  return _mm256_mask_mov_epi16(rounded, nan, _mm256_or_si256(sign, _mm256_set1_epi16(0x7e00)));
}

template <bool is_bf16>
void dequantize_16bit(const Nf4DequantizeArgs& args, __m512 table, const float* absmax, std::int64_t begin,
                      std::int64_t end) {
  auto* out = static_cast<std::uint16_t*>(args.out);
  for (std::int64_t block = begin; block < end; ++block) {
    const __m512 level = _mm512_mul_ps(table, _mm512_set1_ps(absmax[block - begin]));
    const __m512i lookup = _mm512_broadcast_i64x4(is_bf16 ? to_bf16(level) : to_f16(level));
    const std::int64_t first = block * args.blocksize;
    for (std::int64_t i = first; i < first + args.blocksize; i += 32) {
      const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(args.packed + i / 2)));
      const __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
      _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, lookup));
    }
  }
}

void dequantize_f32(const Nf4DequantizeArgs& args, __m512 table, const float* absmax, std::int64_t begin,
                    std::int64_t end) {
  auto* out = static_cast<float*>(args.out);
  for (std::int64_t block = begin; block < end; ++block) {
    const __m512 level = _mm512_mul_ps(table, _mm512_set1_ps(absmax[block - begin]));
    const std::int64_t first = block * args.blocksize;
    for (std::int64_t i = first; i < first + args.blocksize; i += 16) {
      const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(args.packed + i / 2)));
      const __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
      _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(index, level));
    }
  }
}

}  // namespace

void nf4_dequantize_blocks_avx512(const Nf4DequantizeArgs& args, const float* absmax, std::int64_t begin,
                                  std::int64_t end) {
  const std::int64_t whole = end * args.blocksize <= args.n ? end : end - 1;
  const __m512 table = _mm512_loadu_ps(args.type == QuantType::nf4 ? kNf4Table : kFp4Table);
  if (args.dtype == DType::f32)
    dequantize_f32(args, table, absmax, begin, whole);
  else if (args.dtype == DType::f16)
    dequantize_16bit<false>(args, table, absmax, begin, whole);
  else
    dequantize_16bit<true>(args, table, absmax, begin, whole);
  if (whole < end) nf4_dequantize_blocks_scalar(args, absmax + (whole - begin), whole, end);
}

}  // namespace pyfastpeft
