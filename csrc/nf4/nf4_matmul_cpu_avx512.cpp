// The 4-bit matrix product on AVX-512: bf16 by vdpbf16ps, fp32 and fp16 by fp32 FMA.
#include "nf4/nf4_backward_kernel.h"
#include "nf4/nf4_bf16_avx512.h"
#include "nf4/nf4_dots_kernel.h"
#include "nf4/nf4_matvec_kernel.h"
#include "nf4/nf4_panel_kernel.h"

namespace pyfastpeft {
namespace {

void pack_bf16(const void* x, DType, std::int64_t K, std::int64_t stride, std::int64_t tokens, void* to) {
  const Bf16Order order;
  for (std::int64_t m = 0; m < tokens; ++m) {
    const bf16* from = static_cast<const bf16*>(x) + m * K;
    bf16* out = static_cast<bf16*>(to) + 32 * m;  // [chunk][vector][token][lane]
    for (std::int64_t k = 0; k < stride; k += 128, out += 128 * tokens) order.pack(from + k, K - k, out, 32 * tokens);
  }
}

// A chunk is 32 bytes, 64 columns, one block's levels in fp32. 32-bit lane i < 8 of vector j holds the code 4j bits up
// in the i-th 4 bytes, column 8i + (j ^ 1); lane 8 + i the one 16 bits further, column 8i + 4 + (j ^ 1).
struct F32Avx512 {
  using V = VecAvx512;
  using Element = float;
  using Sum = __m512;
  using Weights = __m512;
  struct Chunk {
    __m512i bytes;
    __m512 levels;
  };
  static constexpr std::int64_t bytes = 32, columns = 64, kStrip = 1024;
  static constexpr int vectors = 4;
  static constexpr int rows(int tokens) { return tokens <= 2 ? 4 : 2; }

  __m512 table;
  __m512i far = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(16), 1);
  explicit F32Avx512(QuantType type) : table(_mm512_loadu_ps(type == QuantType::nf4 ? kNf4Table : kFp4Table)) {}

  template <bool nested>
  Chunk chunk(const std::uint8_t* packed, const Nf4Scales& scales, std::int64_t group, std::int64_t c,
              std::int64_t) const {
    const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
    return {_mm512_srlv_epi32(both, far), _mm512_mul_ps(table, _mm512_set1_ps(scales.at<nested>(group + c)))};
  }
  Weights weights(const Chunk& chunk, int j) const {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(chunk.bytes, unsigned(4 * j)), chunk.levels);
  }
  static __m512 load(const float* x) { return _mm512_load_ps(x); }
  static void dot(Weights w, __m512 x, Sum& sum) { sum = _mm512_fmadd_ps(w, x, sum); }
  static Sum load_sum(const float* p) { return _mm512_loadu_ps(p); }
  static void store_sum(Sum sum, float* p) { _mm512_storeu_ps(p, sum); }
  static void add_lanes(const V* v, float* total) { add_lanes_avx512(v, total); }
};

void pack_f32(const void* x, DType dtype, std::int64_t K, std::int64_t stride, std::int64_t tokens, void* to) {
  alignas(64) std::int32_t pick[4][16];
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 16; ++i) pick[j][i] = 8 * (i % 8) + 4 * (i / 8) + (j ^ 1);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (std::int64_t m = 0; m < tokens; ++m) {
      const T* from = static_cast<const T*>(x) + m * K;
      float* out = static_cast<float*>(to) + 16 * m;  // [chunk][vector][token][lane]
      for (std::int64_t k = 0; k < stride; k += 64, out += 64 * tokens) {
        alignas(64) float wide[64];
        for (int i = 0; i < 4; ++i) VecAvx512::load(from + k + 16 * i).store(wide + 16 * i);
        for (int j = 0; j < 4; ++j)
          _mm512_store_ps(out + 16 * j * tokens, _mm512_i32gather_ps(_mm512_load_si512(pick[j]), wide, 4));
      }
    }
  });
}

// C += rows · V for a tile of `rows` rows of W and 16·groups tokens: each dword of W is broadcast once for `groups`
// products, and 24 sums stay in registers. 14 loads for 24 products run at the rate of vdpbf16ps alone (Zen 4: 0.275 and 0.274 ns a
// product). The whole, 4096 x 4096, one thread of Zen 4, CPU milliseconds (floor: 2·M·N·K at that rate) / dense torch / tiles and
// torch's matmul: 48 tokens 8.2 (7.2) / 9.5 / 10.8, 64 10.8 (9.6) / 12.0 / 13.6, 256 40.2 (38.9) / 40.0 / 42.6.
template <int groups, int rows>
__attribute__((noinline)) void panel_tile(const bf16* w, const bf16* v, std::int64_t v_group, std::int64_t pairs,
                                          float* c, bool first) {
  __m512 sum[rows][groups];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g)
      sum[r][g] = first ? _mm512_setzero_ps() : _mm512_load_ps(c + (g * kNf4PanelRows + r) * 16);
  // the next tile's rows come from the L2 or L3 cache, meanwhile: with 512 tokens 82 ms instead of 90 (dX), 128 20.4 and 21.8
  constexpr std::int64_t kAhead = rows * kNf4PanelStride * std::int64_t(sizeof(bf16)) / (kNf4PanelColumns / 2);
  const char* const next = reinterpret_cast<const char*>(w + rows * kNf4PanelStride);
  for (std::int64_t p = 0; p < pairs; ++p) {
    __builtin_prefetch(next + p * kAhead);
    __m512i tokens[groups];
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) tokens[g] = _mm512_load_si512(v + g * v_group + 32 * p);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      std::int32_t pair;
      std::memcpy(&pair, w + r * kNf4PanelStride + 2 * p, 4);
      const __m512i weight = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int g = 0; g < groups; ++g) Bf16Avx512::dot(weight, tokens[g], sum[r][g]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) _mm512_store_ps(c + (g * kNf4PanelRows + r) * 16, sum[r][g]);
}

struct PanelAvx512 {
  using V = VecAvx512;
  struct Use {
    ~Use() {}
  };
  template <int groups>
  static void tiles(const bf16* w, std::int64_t count, const bf16* v, std::int64_t v_group, std::int64_t pairs,
                    float* c, bool first) {
    constexpr int most = groups == 3 ? 8 : 12;
    std::int64_t r = 0;
    for (; r + most <= count; r += most)
      panel_tile<groups, most>(w + r * kNf4PanelStride, v, v_group, pairs, c + 16 * r, first);
    for (; r + 4 < count; r += 8) panel_tile<groups, 8>(w + r * kNf4PanelStride, v, v_group, pairs, c + 16 * r, first);
    if (r < count) panel_tile<groups, 4>(w + r * kNf4PanelStride, v, v_group, pairs, c + 16 * r, first);
  }
  static void block(const bf16* w, std::int64_t count, const bf16* v, std::int64_t v_group, std::int64_t groups,
                    std::int64_t pairs, float* c, bool first) {
    std::int64_t g = 0;
    if (groups == 1) return tiles<1>(w, count, v, v_group, pairs, c, first);
    if (groups % 2 != 0) {
      tiles<3>(w, count, v, v_group, pairs, c, first);
      g = 3;
    }
    for (; g < groups; g += 2) tiles<2>(w, count, v + g * v_group, v_group, pairs, c + g * kNf4PanelRows * 16, first);
  }
};

}  // namespace

const Nf4PanelVariant nf4_panel_avx512 = {nf4_panel_pack, nf4_panel_rows<PanelAvx512>, 256};
const Nf4BackwardVariant nf4_backward_bf16_avx512 = nf4_backward_variant<BackwardBf16<PanelAvx512>>(256);
const Nf4BackwardVariant nf4_backward_f32_avx512 = nf4_backward_variant<BackwardF32Decoded<F32Avx512, 12>>(256);
const Nf4MatvecVariant nf4_matvec_any_avx512 = {nf4_pack_any<VecAvx512>, nf4_matvec_rows<VecAvx512>, kNf4MatvecPad, 4};
const Nf4MatvecVariant nf4_matvec_bf16_avx512 = {pack_bf16, nf4_dots_rows<Bf16Avx512>, Bf16Avx512::columns, 2};
const Nf4MatvecVariant nf4_matvec_f32_avx512 = {pack_f32, nf4_dots_rows<F32Avx512>, F32Avx512::columns, 4};

}  // namespace pyfastpeft
