// NF4 / FP4 quantisation, AVX2 + F16C: 32 values at a time; the bits of the scalar kernel in nf4_quantize_cpu.cpp.
//
// The code is found by a binary search whose tables all fit an 8-lane permute: step s of four needs 2^s thresholds.
#include <immintrin.h>

#include "nf4/nf4_cpu.h"

namespace pyfastpeft {
namespace {

struct F32 {
  using Stored = float;
  static __m256 load(const float* p) { return _mm256_loadu_ps(p); }
};
struct F16 {
  using Stored = std::uint16_t;
  static __m256 load(const std::uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};
struct Bf16 {
  using Stored = std::uint16_t;
  static __m256 load(const std::uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
};

// The bits of the largest magnitude as fp32, of `count` values (a multiple of 8).
template <typename T>
std::uint32_t largest_magnitude(const typename T::Stored* values, std::int64_t count) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  for (std::int64_t i = 0; i < count; i += 8)
    largest = _mm256_max_epu32(largest, _mm256_and_si256(mask, _mm256_castps_si256(T::load(values + i))));
  __m128i half = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(1, 0, 3, 2)));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(2, 3, 0, 1)));
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(half));
}

__m256i is_below(__m256 threshold, __m256 x) {  // -1 where it is: subtracting it counts
  return _mm256_castps_si256(_mm256_cmp_ps(threshold, x, _CMP_LT_OQ));
}
__m256i twice(__m256i a) { return _mm256_add_epi32(a, a); }

struct Nf4 {
  __m256 root, second, third, fourth;
  Nf4() {
    const float* t = kNf4Thresholds;
    root = _mm256_set1_ps(t[7]);
    second = _mm256_setr_ps(t[3], t[11], 0, 0, 0, 0, 0, 0);
    third = _mm256_setr_ps(t[1], t[5], t[9], t[13], 0, 0, 0, 0);
    fourth = _mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14]);
  }
  __m256i encode(__m256 x) const {
    __m256i code = _mm256_sub_epi32(_mm256_setzero_si256(), is_below(root, x));
    for (const __m256& table : {second, third, fourth})
      code = _mm256_sub_epi32(twice(code), is_below(_mm256_permutevar8x32_ps(table, code), x));
    return code;
  }
};

struct Fp4 {
  __m256 root, second, third;
  __m256i codes;
  Fp4() {
    const float* t = kFp4Thresholds;
    root = _mm256_set1_ps(t[3]);
    second = _mm256_setr_ps(t[1], t[5], 0, 0, 0, 0, 0, 0);
    third = _mm256_setr_ps(t[0], t[2], t[4], t[6], 0, 0, 0, 0);
    codes = _mm256_setr_epi32(PYFASTPEFT_FP4_ASCENDING);
  }
  __m256i encode(__m256 x) const {
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    __m256i rank = _mm256_sub_epi32(_mm256_setzero_si256(), is_below(root, magnitude));
    for (const __m256& table : {second, third})
      rank = _mm256_sub_epi32(twice(rank), is_below(_mm256_permutevar8x32_ps(table, rank), magnitude));
    const __m256i negative = is_below(x, _mm256_set1_ps(-kFp4Thresholds[0]));
    const __m256i code = _mm256_permutevar8x32_epi32(codes, rank);
    return _mm256_or_si256(code, _mm256_and_si256(negative, _mm256_set1_epi32(8)));
  }
};

// 32 codes in four vectors to 16 bytes.
void store_packed(std::uint8_t* out, const __m256i (&code)[4]) {
  // byte k of dword j: code j of vector k
  const __m256i low = _mm256_or_si256(code[0], _mm256_slli_epi32(code[1], 8));
  const __m256i high = _mm256_or_si256(_mm256_slli_epi32(code[2], 16), _mm256_slli_epi32(code[3], 24));
  const __m256i all = _mm256_or_si256(low, high);
  // the even code of a pair stands in the lower dword of a quadword: shift it up a nibble, bring the odd one beside it
  const __m256i pairs = _mm256_or_si256(_mm256_slli_epi32(all, 4), _mm256_srli_epi64(all, 32));
  const __m256i gathered = _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  const __m128i transpose = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(_mm256_castsi256_si128(gathered), transpose));
}

template <typename T, typename Type>
std::int64_t quantize(const Nf4QuantizeArgs& args, std::int64_t begin, std::int64_t end) {
  constexpr std::uint32_t kInfinity = 0x7f800000u;
  const auto* weight = static_cast<const typename T::Stored*>(args.weight);
  const Type type;
  const std::int64_t whole = args.n / args.blocksize;  // blocks that are not ragged
  std::int64_t block = begin;
  for (; block < end && block < whole; ++block) {
    const std::int64_t first = block * args.blocksize, last = first + args.blocksize;
    const std::uint32_t largest = largest_magnitude<T>(weight + first, args.blocksize);
    if (largest >= kInfinity) break;  // the scalar kernel finds the position
    const float absmax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(largest))));
    args.absmax[block] = absmax;
    const __m256 scale = _mm256_set1_ps(1.0f / (absmax > kAbsmaxFloor ? absmax : kAbsmaxFloor));
    for (std::int64_t i = first; i < last; i += 32) {
      __m256i code[4];
      for (int k = 0; k < 4; ++k) code[k] = type.encode(_mm256_mul_ps(T::load(weight + i + 8 * k), scale));
      store_packed(args.packed + i / 2, code);
    }
  }
  return block < end ? nf4_quantize_blocks_scalar(args, block, end) : -1;
}

template <typename T>
std::int64_t quantize(const Nf4QuantizeArgs& args, std::int64_t begin, std::int64_t end) {
  return args.type == QuantType::nf4 ? quantize<T, Nf4>(args, begin, end) : quantize<T, Fp4>(args, begin, end);
}

}  // namespace

std::int64_t nf4_quantize_blocks_avx2(const Nf4QuantizeArgs& args, std::int64_t begin, std::int64_t end) {
  if (args.dtype == DType::f32) return quantize<F32>(args, begin, end);
  if (args.dtype == DType::f16) return quantize<F16>(args, begin, end);
  return quantize<Bf16>(args, begin, end);
}

}  // namespace pyfastpeft
