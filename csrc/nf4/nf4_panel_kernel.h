// y = x·Wᵀ for many rows of x, in bf16, as a template over how one block is multiplied; nf4_matmul_cpu_avx512.cpp and
// nf4_matmul_cpu_amx.cpp instantiate it.
//
//     x, once      -> V [token group of 16][pair of columns][16 tokens][2]: what vdpbf16ps and an AMX B tile read
//     per thread: for a panel of kNf4PanelRows rows of W
//                   for kNf4PanelColumns columns: decoded once, row-major, into a scratch in the L2 cache
//                     C [token group][row][16 tokens] += panel · V           P::block: everything of x that is there
//                   y = transposed C + bias, rounded once
//
// The low-rank path is R more columns: S (= scaling · drop(x)·Aᵀ) behind x, B behind W, each rounded to bf16 once. Sums are
// fp32, each over the columns in their order: an output's bits depend neither on threads nor on the rows and tokens it
// was computed with. Columns and tokens are filled up with zeros, rows of W with whatever was there.
//
// Memory: V, bounded by the launcher, and for each thread 72 KiB of panel and C (256 KiB for 512 tokens).
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "common/subnormals.h"
#include "common/vec.h"
#include "nf4/nf4_matmul_cpu.h"
#include "nf4/nf4_scales.h"
#if defined(__AVX512BF16__)
#include "nf4/nf4_bf16_avx512.h"
#endif

namespace pyfastpeft {
namespace {

// 32-bit elements: to[j][i] = from[i][j], i, j < 16.
inline void nf4_transpose_16x16(const void* from, std::int64_t from_stride, void* to, std::int64_t to_stride) {
  const auto* in = static_cast<const char*>(from);
  auto* out = static_cast<char*>(to);
#if defined(__AVX512F__)
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + i * from_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // 4x4 in each quarter of the vectors
    const __m512i p = _mm512_unpacklo_epi32(a[i], a[i + 1]), q = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    const __m512i r = _mm512_unpacklo_epi32(a[i + 2], a[i + 3]), s = _mm512_unpackhi_epi32(a[i + 2], a[i + 3]);
    b[i] = _mm512_unpacklo_epi64(p, r);
    b[i + 1] = _mm512_unpackhi_epi64(p, r);
    b[i + 2] = _mm512_unpacklo_epi64(q, s);
    b[i + 3] = _mm512_unpackhi_epi64(q, s);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // and the quarters
    const __m512i p = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), q = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    const __m512i r = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    const __m512i s = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    _mm512_storeu_si512(out + i * to_stride, _mm512_shuffle_i32x4(p, r, 0x88));
    _mm512_storeu_si512(out + (i + 4) * to_stride, _mm512_shuffle_i32x4(q, s, 0x88));
    _mm512_storeu_si512(out + (i + 8) * to_stride, _mm512_shuffle_i32x4(p, r, 0xdd));
    _mm512_storeu_si512(out + (i + 12) * to_stride, _mm512_shuffle_i32x4(q, s, 0xdd));
  }
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) std::memcpy(out + j * to_stride + 4 * i, in + i * from_stride + 4 * j, 4);
#endif
}

// Whether columns stand in the order that AVX-512 decodes them in, 128 at a time.
inline bool nf4_panel_shuffled([[maybe_unused]] const Nf4Matrix& w) {
#if defined(__AVX512BF16__)
  return nf4_whole_groups(w);
#else
  return false;
#endif
}

// Tokens [16·group, …) of x and S as V's group.
void nf4_panel_pack(const Nf4PanelArgs& args, std::int64_t group) {
  const std::int64_t K = args.w->K, R = args.R, first = 16 * group;
  const int tokens = int(std::min<std::int64_t>(16, args.M - first));
  const bool shuffled = nf4_panel_shuffled(*args.w);
#if defined(__AVX512BF16__)
  const Bf16Order order;
#endif
  alignas(64) bf16 part[16][128];
  std::memset(static_cast<void*>(part), 0, sizeof part);  // the tokens that are not there
  bf16* to = args.v + group * args.columns * 16;
  for (std::int64_t k = 0; k < args.columns;) {
    const std::int64_t columns = shuffled && k < args.low_rank ? 128 : 32, rank = k - args.low_rank;
    const std::int64_t some = std::min(columns, rank < 0 ? K - k : R - rank);
    for (int m = 0; m < tokens; ++m) {
      if (rank < 0) {
        const bf16* const from = args.x + (first + m) * K + k;
#if defined(__AVX512BF16__)
        if (shuffled) {
          order.pack(from, some, part[m], 32);
          continue;
        }
#endif
        std::copy_n(from, some, part[m]);
      } else {
        for (std::int64_t i = 0; i < some; ++i) part[m][i] = from_f32<bf16>(args.s[(first + m) * R + rank + i]);
      }
      std::memset(static_cast<void*>(part[m] + some), 0, std::size_t(columns - some) * sizeof(bf16));
    }
    for (std::int64_t i = 0; i < columns; i += 32, to += 512) nf4_transpose_16x16(part[0] + i, sizeof part[0], to, 64);
    k += columns;
  }
}

#if defined(__AVX512BF16__)
// Columns [k, k + columns) of rows of whole groups, in the order that Bf16Avx512 decodes them in. The next columns of the
// row are asked for while these are multiplied: rows lie too far apart for the processor to guess it.
template <bool nested>
void nf4_panel_decode(const Nf4Matrix& w, const Nf4Scales& scales, std::int64_t n, std::int64_t count, std::int64_t k,
                      std::int64_t columns, bf16* panel) {
  const Bf16Avx512 policy(w.type);
  const std::int64_t per_row = w.K / kNf4Group;
  for (std::int64_t r = 0; r < count; ++r) {
    const std::uint8_t* const row = w.packed + (n + r) * w.K / 2;
    bf16* to = panel + r * kNf4PanelStride;
    for (std::int64_t at = k / 2; at < (k + columns) / 2; at += 64) __builtin_prefetch(row + at + columns / 2, 0, 2);
    for (std::int64_t c = k / 128; c < (k + columns) / 128; ++c, to += 128) {
      auto chunk = policy.chunk<nested>(row + 64 * c, scales, (n + r) * per_row, c, per_row);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) _mm512_store_si512(to + 32 * j, policy.weights(chunk, j));
    }
  }
}
#endif

// Columns [k, k + columns) of `count` rows of W, or of B behind them, into the panel.
inline void nf4_panel_fill(const Nf4PanelArgs& args, [[maybe_unused]] const Nf4Scales& scales, std::int64_t n,
                           std::int64_t count, std::int64_t k, std::int64_t columns, bf16* panel) {
  const std::int64_t K = args.w->K, rank = k - args.low_rank;
#if defined(__AVX512BF16__)
  if (rank < 0 && nf4_panel_shuffled(*args.w))
    return scales.codes != nullptr ? nf4_panel_decode<true>(*args.w, scales, n, count, k, columns, panel)
                                   : nf4_panel_decode<false>(*args.w, scales, n, count, k, columns, panel);
#endif
  const std::int64_t some = std::min(columns, rank < 0 ? K - k : args.R - rank);
  for (std::int64_t r = 0; r < count; ++r) {
    bf16* const to = panel + r * kNf4PanelStride;
    if (rank < 0)
      nf4_decode_values(*args.w, (n + r) * K + k, some, DType::bf16, to);
    else
      for (std::int64_t i = 0; i < some; ++i) to[i] = from_f32<bf16>(args.b[(n + r) * args.R + rank + i]);
    std::memset(static_cast<void*>(to + some), 0, std::size_t(columns - some) * sizeof(bf16));
  }
}

// y = C + bias for `count` rows of W from n on.
template <typename V>
void nf4_panel_finish(const Nf4PanelArgs& args, std::int64_t n, std::int64_t count, const float* c) {
  alignas(64) float turned[16][16];
  alignas(64) bf16 out[16];
  for (std::int64_t r = 0; r < count; r += 16) {
    const std::int64_t some = std::min<std::int64_t>(16, count - r);
    alignas(64) float bias[16] = {};
    if (args.bias != nullptr) std::copy_n(args.bias + n + r, some, bias);
    for (std::int64_t m = 0; m < args.M; ++m) {
      if (m % 16 == 0) nf4_transpose_16x16(c + (m / 16 * kNf4PanelRows + r) * 16, 64, turned, 64);
      bf16* const y = args.y + m * args.w->N + n + r;
      for (int i = 0; i < 16; i += V::width)
        (V::load(turned[m % 16] + i) + V::load(bias + i)).store((some == 16 ? y : out) + i);
      if (some < 16) std::copy_n(out, some, y);
    }
  }
}

// Rows [begin, end) of W.
template <typename P>
void nf4_panel_rows(const Nf4PanelArgs& args, std::int64_t begin, std::int64_t end) {
  if (begin >= end) return;
  const KeepSubnormals keep;
  const typename P::Use use;  // of the unit's state
  const std::int64_t groups = (args.M + 15) / 16;
  const std::int64_t panel_values = kNf4PanelRows * kNf4PanelStride, c_values = groups * kNf4PanelRows * 16;
  const std::unique_ptr<char[]> space(new char[std::size_t(panel_values * 2 + c_values * 4 + 64)]);
  char* const aligned = space.get() + (64 - reinterpret_cast<std::uintptr_t>(space.get()) % 64) % 64;
  bf16* const panel = reinterpret_cast<bf16*>(aligned);
  float* const c = reinterpret_cast<float*>(aligned + panel_values * 2);
  // what stands behind the last row is multiplied too, and thrown away
  std::memset(static_cast<void*>(panel), 0, std::size_t(panel_values * 2));
  if (args.columns == 0) std::fill_n(c, c_values, 0.0f);  // no product writes it: y is the bias
  const bool whole = nf4_whole_groups(*args.w);
  std::vector<float> table(whole ? std::size_t(nf4_scale_table(*args.w, kNf4PanelRows)) : 0);
  Nf4Scales scales{};
  for (std::int64_t n = begin; n < end; n += kNf4PanelRows) {
    const std::int64_t count = std::min(kNf4PanelRows, end - n);
    if (whole) scales = nf4_scales<typename P::V>(*args.w, n, count, table.data());
    for (std::int64_t k = 0; k < args.columns;) {
      // a chunk ends where the low-rank columns begin
      const std::int64_t stop = k < args.low_rank ? args.low_rank : args.columns;
      const std::int64_t columns = std::min(kNf4PanelColumns, stop - k);
      nf4_panel_fill(args, scales, n, count, k, columns, panel);
      P::block(panel, count, args.v + k * 16, args.columns * 16, groups, columns / 2, c, k == 0);
      k += columns;
    }
    nf4_panel_finish<typename P::V>(args, n, count, c);
  }
}

}  // namespace
}  // namespace pyfastpeft
