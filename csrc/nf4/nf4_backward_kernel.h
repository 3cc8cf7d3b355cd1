// dX = dY·W straight from the packed bytes, as a template over a policy of an instruction set; nf4_matmul_cpu*.cpp
// instantiate it.
//
//     dY, once     -> U [chunk of n][token][term]: what is broadcast, or an AMX A tile; padded so that tokens are apart in
//                     the cache's sets
//     per thread: for some columns of dX
//                   for a chunk of rows n of W
//                     64 columns of them, decoded once -> V [group of lanes][n][lane]     in the L1 or L2 cache
//                     C [group][token][lane] += U · V                                     P::block: every token there is
//                   dX = C, its columns put in order, rounded once
//
// Nothing is transposed: a row of W is a vector of columns of dX. vdpbf16ps and AMX multiply pairs (n, n + 1): the 16-bit
// words of two packed rows interleave into one vector, whose 32-bit lanes then hold four codes of either row, and one
// permute looks both up in one table of two times 16 levels. Columns come out in an order of their own; C is put in order
// once, after all of N. The low-rank path is R more rows: dS (= s·dY·B) behind dY, A behind W; in bf16 rounded to it once.
//
// Sums are fp32 over n in its order (fp32 products: one for each chunk, which joins the total then, since a long sum of one
// lane loses bits): bits depend neither on threads nor on the tokens computed with. Levels are scaled in fp32 and, in bf16,
// rounded once, as nf4_dequantize_cpu would.
//
// The floor, W 4096 x 4096, blocks of 64, one thread of Zen 4 (0.274 ns a vdpbf16ps or FMA, 15 GB/s):
//   bytes      N·K/2 + N·K/16 = 9.4 MB once for every 256 tokens, 0.6 ms, beside 2·M·(N + K) of dY and dX
//   products   M·N·K / 32 vdpbf16ps: 0.14 ms a token; fp32 M·N·K / 16: 0.29 ms; AVX2, two FMAs of 8 a cycle: the same
//   decoding   128 weights are 15 vector operations and 4 stores of 64 bytes, 12 to 16 cycles: 0.4 to 0.6 ms, beside what
//              the multiplier does
// so that bf16 is bound by the products from 4 tokens on. Predicted: 16 tokens 2.9 ms, 128 19, 512 76. Measured, the machine
// shared with a dozen others / dense torch / tiles for torch's matmul, as before:
//   bf16   4 tokens 1.6 / 5.5 / 7.4; 16 3.4 / 7.2 / 9.3; 36 6.9 / 10.8 / 15.4; 128 20.5 / 23.7 / 27.2; 512 82 / 87 / 94
//   fp32   16 tokens 6.3 / 13.8 / 19.1; 128 41.7 / 56.3 / 59.6; 512 169 / 196 / 198; AVX2: 16 7.9 / 13.5 / 22.5
// With V left as it is the products alone take 0.65, 2.4, 19.5 and 79.6 ms: 0.284 to 0.297 ns each, the machine's rate. What
// exceeds the prediction is decoding: 0.8 to 1.6 ms a time, half of it waiting for packed bytes, half for V's lines to come to
// the L1 cache that products use as well. Groups of V a power of two apart all fell into the same sets (16 tokens 3.48 instead
// of 3.35 ms); the next tile's tokens are fetched during a tile's products (fp32, 512 tokens: 169 instead of 199 ms).
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "common/subnormals.h"
#include "common/vec.h"
#include "nf4/nf4_matmul_cpu.h"
#include "nf4/nf4_scales.h"

namespace pyfastpeft {
namespace {

// Tokens up to which 256 columns are taken at a time, two lines of a row of W; above 128, so that what a thread uses of U, V
// and C stays near 300 KB. Measured on Zen 4, 4096 x 4096, columns 64 / 128 / 256 / 512: 4 tokens 2.2 / 1.7 / 1.6 / 2.3 ms,
// 16 3.9 / 3.6 / 3.4 / 4.1, 128 21.9 / 21.2 / 20.4 / 21.2; 512 tokens in steps of 256 96 / 85 / 93, of 512 98 / 99 / 95.
constexpr std::int64_t kNf4BackwardFew = 128;

inline float nf4_scale(const Nf4Absmax& absmax, std::int64_t block) {  // a multiply, then an add: the format's
  if (absmax.plain != nullptr) return absmax.plain[block];
  return absmax.nested_map[absmax.codes[block]] * absmax.nested_absmax[block / kNestedBlocksize] + *absmax.offset;
}

// order[i]: which of 64 columns the i-th lane of the unit's vectors holds.
template <typename P>
const std::uint8_t* nf4_backward_order(bool whole, std::uint8_t* order) {
  for (int i = 0; i < kNf4Group; ++i) order[i] = std::uint8_t(whole ? P::column(i / P::kLanes, i % P::kLanes) : i);
  return order;
}

// Terms of tokens [begin, end), those that are not there as zeros.
template <typename P>
void nf4_backward_pack(const Nf4BackwardArgs& args, std::int64_t begin, std::int64_t end) {
  using Element = typename P::Element;
  const std::int64_t N = args.w->N, tokens = nf4_backward_tokens(args.M);
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (std::int64_t m = begin; m < end; ++m)
      for (std::int64_t n = 0; n < args.terms; n += P::kChunk) {
        Element* const to = static_cast<Element*>(args.u) + (n / P::kChunk * tokens + m) * P::kStride;
        const std::int64_t count = std::min<std::int64_t>(P::kChunk, args.terms - n);
        const std::int64_t some = m < args.M ? std::max<std::int64_t>(0, std::min(count, N - n)) : 0;
        const T* const from = static_cast<const T*>(args.dy) + m * N + n;
        if constexpr (std::is_same<T, Element>::value)
          std::copy_n(from, some, to);
        else
          for (std::int64_t i = 0; i < some; ++i) to[i] = from_f32<Element>(to_f32(from[i]));
        for (std::int64_t i = some; i < count; ++i) {
          const std::int64_t rank = n + i - args.low_rank;
          const bool there = m < args.M && rank >= 0 && rank < args.R;
          to[i] = from_f32<Element>(there ? args.ds[m * args.R + rank] : 0.0f);
        }
      }
  });
}

// Rows [n, n + terms) of W, or of A behind it, columns [k, k + 64), into v.
template <typename P>
void nf4_backward_fill(const Nf4BackwardArgs& args, const P& policy, const std::uint8_t* order, bool whole,
                       std::int64_t n, std::int64_t terms, std::int64_t k, typename P::Element* v) {
  using Element = typename P::Element;
  constexpr int pair = P::kPair;
  const Nf4Matrix& w = *args.w;
  const std::int64_t columns = std::min(kNf4Group, w.K - k);
  std::int64_t i = 0;
  if constexpr (P::kDecodes) {
    const std::int64_t row_bytes = w.K / 2;
    int shift = 0;
    while (std::int64_t{1} << shift < w.blocksize) ++shift;
    for (; whole && i < terms && n + i < w.N; i += pair) {
      const std::int64_t at = (n + i) * w.K + k;
      const std::uint8_t* const row = w.packed + at / 2;
      const bool second = n + i + 1 < w.N;
      // the row's bytes of the next chunk, long before they are wanted: rows lie too far apart for the processor to guess
      __builtin_prefetch(row + P::kChunk * row_bytes, 0, 2);
      if constexpr (pair == 2) __builtin_prefetch(row + (P::kChunk + 1) * row_bytes, 0, 2);
      const float scale = nf4_scale(w.absmax, at >> shift);
      if constexpr (pair == 2)
        policy.decode(row, second ? row + row_bytes : row, scale,
                      second ? nf4_scale(w.absmax, (at + w.K) >> shift) : 0.0f, v + i * P::kLanes);
      else
        policy.decode(row, scale, v + i * P::kLanes);
    }
  }
  for (; i < terms; i += pair) {
    alignas(64) Element row[pair][kNf4Group];
    for (int r = 0; r < pair; ++r) {
      const std::int64_t rank = n + i + r - args.low_rank;
      std::int64_t some = columns;
      if (n + i + r < w.N)
        nf4_decode_values(w, (n + i + r) * w.K + k, columns, P::kDType, row[r]);
      else if (rank >= 0 && rank < args.R)
        for (std::int64_t j = 0; j < columns; ++j) row[r][j] = from_f32<Element>(args.a[rank * w.K + k + j]);
      else
        some = 0;
      for (std::int64_t j = some; j < kNf4Group; ++j) row[r][j] = from_f32<Element>(0.0f);
    }
    for (int j = 0; j < kNf4Group; ++j)
      for (int r = 0; r < pair; ++r)
        v[j / P::kLanes * P::kGroup + i * P::kLanes + j % P::kLanes * pair + r] = row[r][order[j]];
  }
}

// dX [tokens, k : k + 64·units) = C in order.
template <typename P>
void nf4_backward_finish(const Nf4BackwardArgs& args, const std::uint8_t* order, bool whole, std::int64_t k,
                         std::int64_t units, const float* c) {
  using V = typename P::V;
  constexpr std::int64_t kGroups = kNf4Group / P::kLanes, kGroupFloats = kNf4PanelRows * P::kLanes;
  const std::int64_t K = args.w->K;
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    alignas(64) float row[kNf4Group];
    for (std::int64_t m = 0; m < args.M; ++m)
      for (std::int64_t u = 0; u < units; ++u) {
        const float* const from =
            c + ((m / kNf4PanelRows * units + u) * kGroups) * kGroupFloats + m % kNf4PanelRows * P::kLanes;
        bool done = false;
        if constexpr (P::kDecodes) {
          if ((done = whole)) P::in_order(from, kGroupFloats, row);
        }
        for (int j = 0; !done && j < kNf4Group; ++j) row[order[j]] = from[j / P::kLanes * kGroupFloats + j % P::kLanes];
        const std::int64_t at = k + u * kNf4Group, columns = std::min(kNf4Group, K - at);
        T* const to = static_cast<T*>(args.dx) + m * K + at;
        std::int64_t j = 0;
        for (; j + V::width <= columns; j += V::width) V::load(row + j).store(to + j);
        if (j < columns) store_part(V::load(row + j), to + j, columns - j);
      }
  });
}

// Units [begin, end) of 64 columns.
template <typename P>
void nf4_backward_columns(const Nf4BackwardArgs& args, std::int64_t begin, std::int64_t end) {
  if (begin >= end) return;
  using Element = typename P::Element;
  const KeepSubnormals keep;
  const typename P::Use use;  // of the unit's state
  const P policy(args.w->type);
  const bool whole = P::kDecodes && nf4_whole_groups(*args.w);
  std::uint8_t place[kNf4Group];
  const std::uint8_t* const order = nf4_backward_order<P>(whole, place);
  constexpr std::int64_t kGroups = kNf4Group / P::kLanes, kBlock = kGroups * kNf4PanelRows * P::kLanes;
  const std::int64_t tokens = nf4_backward_tokens(args.M), blocks = (args.M + kNf4PanelRows - 1) / kNf4PanelRows;
  const std::int64_t most = std::min<std::int64_t>(args.M <= kNf4BackwardFew ? 4 : 2, end - begin);
  const std::int64_t v_bytes = kGroups * P::kGroup * std::int64_t(sizeof(Element));
  const std::unique_ptr<char[]> space(new char[std::size_t(v_bytes + blocks * most * kBlock * 4 + 64)]);
  char* const aligned = space.get() + (64 - reinterpret_cast<std::uintptr_t>(space.get()) % 64) % 64;
  Element* const v = reinterpret_cast<Element*>(aligned);
  float* const c = reinterpret_cast<float*>(aligned + v_bytes);
  for (std::int64_t first = begin; first < end; first += most) {
    const std::int64_t units = std::min(most, end - first);
    for (std::int64_t n = 0; n < args.terms; n += P::kChunk) {
      const std::int64_t terms = std::min<std::int64_t>(P::kChunk, args.terms - n);
      const Element* const from = static_cast<const Element*>(args.u) + n / P::kChunk * tokens * P::kStride;
      for (std::int64_t u = 0; u < units; ++u) {
        nf4_backward_fill<P>(args, policy, order, whole, n, terms, (first + u) * kNf4Group, v);
        for (std::int64_t b = 0; b < blocks; ++b)
          P::block(from + b * kNf4PanelRows * P::kStride, std::min(kNf4PanelRows, args.M - b * kNf4PanelRows), v,
                   P::kGroup, kGroups, terms / P::kPair, c + (b * units + u) * kBlock, n == 0);
      }
    }
    nf4_backward_finish<P>(args, order, whole, first * kNf4Group, units, c);
  }
}

// ---- bf16, in pairs: Block is the forward's product of a panel, with U for its rows and V for its tokens ------------------

template <typename Block>
struct BackwardBf16 {
  using V = typename Block::V;
  using Use = typename Block::Use;
  using Element = bf16;
  static constexpr DType kDType = DType::bf16;
  static constexpr int kPair = 2, kLanes = 16;
  static constexpr std::int64_t kChunk = kNf4PanelColumns, kStride = kNf4PanelStride, kGroup = kChunk * kLanes + 32;
  static void block(const bf16* u, std::int64_t count, const bf16* v, std::int64_t v_group, std::int64_t groups,
                    std::int64_t terms, float* c, bool first) {
    Block::block(u, count, v, v_group, groups, terms, c, first);
  }
  // lane i of vector j holds four times i, and these
  static constexpr int kPlace[4] = {1, 3, 0, 2};
  static int column(int j, int lane) { return 4 * lane + kPlace[j]; }
#if defined(__AVX512BF16__)
  static constexpr bool kDecodes = true;

  __m512 table;
  __m512i nibbles = _mm512_set1_epi8(15), second = _mm512_set1_epi32(0x10100000), interleave;
  explicit BackwardBf16(QuantType type) : table(_mm512_loadu_ps(type == QuantType::nf4 ? kNf4Table : kFp4Table)) {
    alignas(64) std::uint16_t pick[32];
    for (int i = 0; i < 32; ++i) pick[i] = std::uint16_t(i / 2 + i % 2 * 16);
    interleave = _mm512_load_si512(pick);
  }

  // 64 columns of rows a and b into four vectors of pairs, kGroup apart
  void decode(const std::uint8_t* a, const std::uint8_t* b, float scale_a, float scale_b, bf16* v) const {
    const __m512i bytes =
        _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a))),
                           _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)), 1);
    const __m512i codes = _mm512_permutexvar_epi16(interleave, bytes);
    const __m512i levels = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(
        _mm512_mul_ps(table, _mm512_set1_ps(scale_b)), _mm512_mul_ps(table, _mm512_set1_ps(scale_a))));
    // (codes & nibbles) | second: the permute reads the low 5 bits of an index
    const __m512i low = _mm512_ternarylogic_epi32(codes, nibbles, second, 0xEA);
    const __m512i high = _mm512_ternarylogic_epi32(_mm512_srli_epi16(codes, 4), nibbles, second, 0xEA);
    _mm512_store_si512(v, _mm512_permutexvar_epi16(low, levels));
    _mm512_store_si512(v + kGroup, _mm512_permutexvar_epi16(_mm512_srli_epi16(low, 8), levels));
    _mm512_store_si512(v + 2 * kGroup, _mm512_permutexvar_epi16(high, levels));
    _mm512_store_si512(v + 3 * kGroup, _mm512_permutexvar_epi16(_mm512_srli_epi16(high, 8), levels));
  }
  static void in_order(const float* c, std::int64_t group, float* row) {
    const __m512 at1 = _mm512_load_ps(c), at3 = _mm512_load_ps(c + group);
    const __m512 at0 = _mm512_load_ps(c + 2 * group), at2 = _mm512_load_ps(c + 3 * group);
    const __m512i lanes = _mm512_setr_epi32(0, 16, 0, 16, 1, 17, 1, 17, 2, 18, 2, 18, 3, 19, 3, 19);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i pick = _mm512_add_epi32(lanes, _mm512_set1_epi32(4 * i));
      const __m512 even = _mm512_permutex2var_ps(at0, pick, at1);
      _mm512_store_ps(row + 16 * i, _mm512_mask_blend_ps(0xCCCC, even, _mm512_permutex2var_ps(at2, pick, at3)));
    }
  }
#else
  static constexpr bool kDecodes = false;
  explicit BackwardBf16(QuantType) {}
#endif
};

// ---- fp32: any vector of common/vec.h, a row at a time ----------------------------------------------------------------------

template <typename V, int groups, int rows, std::int64_t stride, std::int64_t ahead>
__attribute__((noinline)) void nf4_backward_tile(const float* u, const float* v, std::int64_t v_group,
                                                 std::int64_t terms, float* c, bool first) {
  V sum[rows][groups];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int g = 0; g < groups; ++g) sum[r][g] = V::set(0.0f);
  const char* const next = reinterpret_cast<const char*>(u + rows * stride);  // the next tile's tokens
  for (std::int64_t i = 0; i < terms; ++i) {
    __builtin_prefetch(next + i * (rows * stride * 4 / ahead));
    V right[groups];
#pragma GCC unroll 2
    for (int g = 0; g < groups; ++g) right[g] = V::load(v + g * v_group + i * V::width);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const V left = V::set(u[r * stride + i]);
#pragma GCC unroll 2
      for (int g = 0; g < groups; ++g) sum[r][g] = V::fma(left, right[g], sum[r][g]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int g = 0; g < groups; ++g) {
      float* const total = c + (g * kNf4PanelRows + r) * V::width;
      (first ? sum[r][g] : V::load(total) + sum[r][g]).store(total);
    }
}

// Rows: tokens whose sums stay in registers, with two vectors each.
template <typename Vector, int kRows>
struct BackwardF32 {
  using V = Vector;
  using Element = float;
  struct Use {
    ~Use() {}
  };
  static constexpr DType kDType = DType::f32;
  static constexpr int kPair = 1, kLanes = V::width;
  static constexpr std::int64_t kChunk = 128, kStride = kChunk + 16, kGroup = kChunk * kLanes + 16;
  static void block(const float* u, std::int64_t count, const float* v, std::int64_t v_group, std::int64_t groups,
                    std::int64_t terms, float* c, bool first) {
    for (std::int64_t g = 0; g < groups; g += 2, v += 2 * v_group, c += 2 * kNf4PanelRows * kLanes) {
      std::int64_t r = 0;
      for (; r + kRows <= count; r += kRows)
        nf4_backward_tile<V, 2, kRows, kStride, kChunk>(u + r * kStride, v, v_group, terms, c + r * kLanes, first);
      for (; r + 2 < count; r += 4)
        nf4_backward_tile<V, 2, 4, kStride, kChunk>(u + r * kStride, v, v_group, terms, c + r * kLanes, first);
      if (r < count)
        nf4_backward_tile<V, 2, 2, kStride, kChunk>(u + r * kStride, v, v_group, terms, c + r * kLanes, first);
    }
  }
};

// With the decoder of nf4_dots_kernel.h's policy, whose vector j holds column(j, lane) in its lanes.
template <typename Decoder, int kRows>
struct BackwardF32Decoded : BackwardF32<typename Decoder::V, kRows> {
  using Base = BackwardF32<typename Decoder::V, kRows>;
  static constexpr bool kDecodes = true;
  static int column(int j, int lane) { return 8 * (lane % 8) + 4 * (lane / 8) + (j ^ 1); }
  Decoder decoder;
  explicit BackwardF32Decoded(QuantType type) : decoder(type) {}
  void decode(const std::uint8_t* packed, float scale, float* v) const {
    const auto chunk = decoder.template chunk<false>(packed, Nf4Scales{&scale, nullptr, 0, 0}, 0, 0, 1);
#pragma GCC unroll 8
    for (int j = 0; j < Decoder::vectors; ++j) Decoder::store_sum(decoder.weights(chunk, j), v + j * Base::kGroup);
  }
  static void in_order(const float* c, std::int64_t group, float* row) {
    for (int j = 0; j < Decoder::vectors; ++j)
      for (int i = 0; i < Base::kLanes; ++i) row[column(j, i)] = c[j * group + i];
  }
};

// Any machine; the specification.
template <typename V>
struct BackwardF32Any : BackwardF32<V, 4> {
  static constexpr bool kDecodes = false;
  static int column(int j, int lane) { return j * V::width + lane; }
  explicit BackwardF32Any(QuantType) {}
};

template <typename P>
constexpr Nf4BackwardVariant nf4_backward_variant(std::int64_t tokens) {
  return {nf4_backward_pack<P>,
          nf4_backward_columns<P>,
          P::kChunk,
          P::kStride,
          std::int64_t(sizeof(typename P::Element)),
          P::kPair == 2 ? 32 : 1,
          tokens};
}

}  // namespace
}  // namespace pyfastpeft
