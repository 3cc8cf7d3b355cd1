// The 4-bit matrix product on AVX2: fp32 FMA whatever the type of x.
#include "nf4/nf4_backward_kernel.h"
#include "nf4/nf4_dots_kernel.h"
#include "nf4/nf4_matvec_kernel.h"

namespace pyfastpeft {
namespace {

// A chunk is 32 bytes, 64 columns, one block's levels in fp32, in two registers: bits 0 to 2 of a code choose the lane of
// both, bit 3 which of the two. 32-bit lane i of the vector shifted by 4j holds column 8i + (j ^ 1).
struct F32Avx2 {
  using V = VecAvx2;
  using Element = float;
  using Sum = __m256;
  using Weights = __m256;
  struct Chunk {
    __m256i bytes;
    __m256 low, high;
  };
  static constexpr std::int64_t bytes = 32, columns = 64, kStrip = 1024;
  static constexpr int vectors = 8;
  static constexpr int rows(int tokens) { return tokens <= 3 ? 2 : 1; }

  __m256 table_low, table_high;
  explicit F32Avx2(QuantType type) {
    const float* table = type == QuantType::nf4 ? kNf4Table : kFp4Table;
    table_low = _mm256_loadu_ps(table);
    table_high = _mm256_loadu_ps(table + 8);
  }

  template <bool nested>
  Chunk chunk(const std::uint8_t* packed, const Nf4Scales& scales, std::int64_t group, std::int64_t c,
              std::int64_t) const {
    const __m256 scale = _mm256_set1_ps(scales.at<nested>(group + c));
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)), _mm256_mul_ps(table_low, scale),
            _mm256_mul_ps(table_high, scale)};
  }
  Weights weights(const Chunk& chunk, int j) const {
    const __m256i index = _mm256_srli_epi32(chunk.bytes, 4 * j), which = _mm256_slli_epi32(chunk.bytes, 28 - 4 * j);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(chunk.low, index), _mm256_permutevar8x32_ps(chunk.high, index),
                            _mm256_castsi256_ps(which));
  }
  static __m256 load(const float* x) { return _mm256_load_ps(x); }
  static void dot(Weights w, __m256 x, Sum& sum) { sum = _mm256_fmadd_ps(w, x, sum); }
  static Sum load_sum(const float* p) { return _mm256_loadu_ps(p); }
  static void store_sum(Sum sum, float* p) { _mm256_storeu_ps(p, sum); }
  static void add_lanes(const V* v, float* total) {
    __m128 q[4];
    for (int i = 0; i < 4; ++i) q[i] = _mm_add_ps(_mm256_castps256_ps128(v[i].v), _mm256_extractf128_ps(v[i].v, 1));
    _MM_TRANSPOSE4_PS(q[0], q[1], q[2], q[3]);
    _mm_storeu_ps(total, _mm_add_ps(_mm_add_ps(q[0], q[2]), _mm_add_ps(q[1], q[3])));
  }
};

void pack_f32(const void* x, DType dtype, std::int64_t K, std::int64_t stride, std::int64_t tokens, void* to) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (std::int64_t m = 0; m < tokens; ++m) {
      const T* from = static_cast<const T*>(x) + m * K;
      float* out = static_cast<float*>(to) + 8 * m;  // [chunk][vector][token][lane]
      for (std::int64_t k = 0; k < stride; k += 64, out += 64 * tokens) {
        alignas(32) float wide[64];
        for (int i = 0; i < 8; ++i) VecAvx2::load(from + k + 8 * i).store(wide + 8 * i);
        for (int j = 0; j < 8; ++j)
          for (int i = 0; i < 8; ++i) out[8 * j * tokens + i] = wide[8 * i + (j ^ 1)];
      }
    }
  });
}

}  // namespace

const Nf4BackwardVariant nf4_backward_f32_avx2 = nf4_backward_variant<BackwardF32Decoded<F32Avx2, 6>>(256);
const Nf4MatvecVariant nf4_matvec_any_avx2 = {nf4_pack_any<VecAvx2>, nf4_matvec_rows<VecAvx2>, kNf4MatvecPad, 4};
const Nf4MatvecVariant nf4_matvec_f32_avx2 = {pack_f32, nf4_dots_rows<F32Avx2>, F32Avx2::columns, 4};

}  // namespace pyfastpeft
