// NF4 / FP4 quantisation, AVX-512: 64 values at a time; the bits of the scalar kernel in nf4_quantize_cpu.cpp.
//
// Per block: an integer maximum of the magnitudes (it also shows a NaN or infinity), one reciprocal; then per 16 values
// multiply, find the bucket, one table read and one compare (nf4_encode_buckets.h).
#include <immintrin.h>

#include "nf4/nf4_cpu.h"
#include "nf4/nf4_encode_buckets.h"

namespace pyfastpeft {
namespace {

struct F32 {
  using Stored = float;
  static constexpr std::uint32_t kInfinity = 0x7f800000u;
  static __m512 load(const float* p) { return _mm512_loadu_ps(p); }
};
struct F16 {
  using Stored = std::uint16_t;
  static constexpr std::uint32_t kInfinity = 0x7c00u;
  static __m512 load(const std::uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static float magnitude(std::uint32_t bits) { return _cvtsh_ss(static_cast<unsigned short>(bits)); }
};
struct Bf16 {
  using Stored = std::uint16_t;
  static constexpr std::uint32_t kInfinity = 0x7f80u;
  static __m512 load(const std::uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
};

// The largest magnitude of `count` values (a multiple of 32), as the bits of its own type.
template <typename T>
std::uint32_t largest_magnitude(const typename T::Stored* values, std::int64_t count) {
  if constexpr (sizeof(typename T::Stored) == 4) {
    const __m512i mask = _mm512_set1_epi32(0x7fffffff);
    __m512i even = _mm512_setzero_si512(), odd = even;
    for (std::int64_t i = 0; i < count; i += 32) {
      even = _mm512_max_epu32(even, _mm512_and_si512(mask, _mm512_loadu_si512(values + i)));
      odd = _mm512_max_epu32(odd, _mm512_and_si512(mask, _mm512_loadu_si512(values + i + 16)));
    }
    return _mm512_reduce_max_epu32(_mm512_max_epu32(even, odd));
  } else {
    const __m512i mask = _mm512_set1_epi16(0x7fff);
    __m512i largest = _mm512_setzero_si512();
    for (std::int64_t i = 0; i < count; i += 32)
      largest = _mm512_max_epu16(largest, _mm512_and_si512(mask, _mm512_loadu_si512(values + i)));
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1));
    const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    // the horizontal instruction is a minimum: complement, take it, complement back
    const __m128i smallest = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
    return static_cast<std::uint16_t>(~_mm_extract_epi16(smallest, 0));
  }
}

template <typename T>
float as_float(std::uint32_t magnitude) {
  if constexpr (sizeof(typename T::Stored) == 4)
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(magnitude)));
  else if constexpr (T::kInfinity == F16::kInfinity)
    return F16::magnitude(magnitude);
  else
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(magnitude << 16)));
}

struct Nf4 {
  __m512 thresholds[2];
  __m512i below[2];
  Nf4() {
    for (int i = 0; i < 2; ++i) {
      thresholds[i] = _mm512_load_ps(kNf4Buckets.threshold + 16 * i);
      below[i] = _mm512_load_si512(kNf4Buckets.below + 16 * i);
    }
  }
  __m512i encode(__m512 x) const {
    const __m512i bucket =
        _mm512_cvttps_epi32(_mm512_fmadd_ps(x, _mm512_set1_ps(kNf4BucketScale), _mm512_set1_ps(kNf4BucketShift)));
    const __m512 threshold = _mm512_permutex2var_ps(thresholds[0], bucket, thresholds[1]);
    const __m512i code = _mm512_permutex2var_epi32(below[0], bucket, below[1]);
    return _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(threshold, x, _CMP_LT_OQ), code, _mm512_set1_epi32(1));
  }
};

struct Fp4 {
  __m512 thresholds[2];
  __m512i below[2], above[2];
  Fp4() {
    for (int i = 0; i < 2; ++i) {
      thresholds[i] = _mm512_load_ps(kFp4Buckets.threshold + 16 * i);
      below[i] = _mm512_load_si512(kFp4Buckets.below + 16 * i);
      above[i] = _mm512_load_si512(kFp4Buckets.above + 16 * i);
    }
  }
  __m512i encode(__m512 x) const {
    const __m512 magnitude = _mm512_abs_ps(x);
    const __m512i bucket = _mm512_cvttps_epi32(_mm512_mul_ps(magnitude, _mm512_set1_ps(kFp4BucketScale)));
    const __m512 threshold = _mm512_permutex2var_ps(thresholds[0], bucket, thresholds[1]);
    const __mmask16 is_above = _mm512_cmp_ps_mask(threshold, magnitude, _CMP_LT_OQ);
    const __m512i code = _mm512_mask_blend_epi32(is_above, _mm512_permutex2var_epi32(below[0], bucket, below[1]),
                                                 _mm512_permutex2var_epi32(above[0], bucket, above[1]));
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-kFp4Thresholds[0]), _CMP_LT_OQ);
    return _mm512_mask_add_epi32(code, negative, code, _mm512_set1_epi32(8));
  }
};

// 64 codes in four vectors to 32 bytes.
void store_packed(std::uint8_t* out, const __m512i (&code)[4]) {
  // byte k of dword j: code j of vector k
  const __m512i low = _mm512_or_si512(code[0], _mm512_slli_epi32(code[1], 8));
  const __m512i high = _mm512_or_si512(_mm512_slli_epi32(code[2], 16), _mm512_slli_epi32(code[3], 24));
  const __m512i all = _mm512_or_si512(low, high);
  // the even code of a pair stands in the lower dword of a quadword: shift it up a nibble, bring the odd one beside it
  const __m512i pairs = _mm512_or_si512(_mm512_slli_epi32(all, 4), _mm512_srli_epi64(all, 32));
  const __m256i bytes = _mm512_cvtepi64_epi32(pairs);  // byte k of dword j: pair j of vector k; transpose that
  const __m256i transpose =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m256i halves = _mm256_shuffle_epi8(bytes, transpose);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(halves, order));
}

// Scales of a group of blocks first, then their codes: the reductions and divisions of a group overlap, where one
// block's would be waited for. 64 values are one step: a part of a block, or two blocks of 32.
constexpr std::int64_t kGroupValues = 512;

template <typename T, typename Type>
std::int64_t quantize(const Nf4QuantizeArgs& args, std::int64_t begin, std::int64_t end) {
  const auto* weight = static_cast<const typename T::Stored*>(args.weight);
  const std::int64_t blocksize = args.blocksize, group = blocksize < kGroupValues ? kGroupValues / blocksize : 1;
  const std::int64_t whole = end * blocksize <= args.n ? end : end - 1;           // blocks that are not ragged
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(blocksize));  // a division costs as much as a code
  const Type type;
  std::int64_t block = begin;
  for (; block + group <= whole; block += group) {
    float scale[kGroupValues / kMinBlocksize];
    for (std::int64_t i = 0; i < group; ++i) {
      const std::uint32_t largest = largest_magnitude<T>(weight + (block + i) * blocksize, blocksize);
      if (largest >= T::kInfinity) return nf4_quantize_blocks_scalar(args, block, end);  // finds the position
      const float absmax = as_float<T>(largest);
      args.absmax[block + i] = absmax;
      scale[i] = 1.0f / (absmax > kAbsmaxFloor ? absmax : kAbsmaxFloor);
    }
    const std::int64_t first = block * blocksize, count = group * blocksize;
    const auto* from = weight + first;
    std::uint8_t* to = args.packed + first / 2;
    for (std::int64_t i = 0; i < count; i += 64) {
      const __m512 low = _mm512_set1_ps(scale[i >> shift]), high = _mm512_set1_ps(scale[(i + 32) >> shift]);
      const __m512i code[4] = {type.encode(_mm512_mul_ps(T::load(from + i), low)),
                               type.encode(_mm512_mul_ps(T::load(from + i + 16), low)),
                               type.encode(_mm512_mul_ps(T::load(from + i + 32), high)),
                               type.encode(_mm512_mul_ps(T::load(from + i + 48), high))};
      store_packed(to + i / 2, code);
    }
  }
  return block < end ? nf4_quantize_blocks_scalar(args, block, end) : -1;
}

template <typename T>
std::int64_t quantize(const Nf4QuantizeArgs& args, std::int64_t begin, std::int64_t end) {
  return args.type == QuantType::nf4 ? quantize<T, Nf4>(args, begin, end) : quantize<T, Fp4>(args, begin, end);
}

}  // namespace

std::int64_t nf4_quantize_blocks_avx512(const Nf4QuantizeArgs& args, std::int64_t begin, std::int64_t end) {
  if (args.dtype == DType::f32) return quantize<F32>(args, begin, end);
  if (args.dtype == DType::f16) return quantize<F16>(args, begin, end);
  return quantize<Bf16>(args, begin, end);
}

}  // namespace pyfastpeft
