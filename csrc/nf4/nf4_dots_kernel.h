// y = x·Wᵀ straight from the packed bytes, as a template over a policy of an instruction set; nf4_matmul_cpu_avx*.cpp
// instantiate it.
//
// A row of W is read in chunks of one vector of packed bytes. Shifting the vector by 0, 4, 8, … bits puts another code
// into the low bits of every lane, where a permute of the block's 16 levels (times absmax: once per block) looks them all
// up at once. Codes come out in an order of their own, so x is packed in that order once; nothing is ever shuffled back.
//
//     for 8 rows of x (few columns at a time: they stay in the L1 cache)
//       for 2 rows of W (more when x has fewer rows)
//         for each chunk, for each shift:  decode 2 vectors of weights, multiply each with 8 of x
//
// A decoded vector never leaves its register. Decoding W again for every 8 rows of x costs less than a panel of it written
// to and read from the L1 cache: shifts and permutes run beside the multiplications.
//
// An output is one vector of sums, added to in the order of columns (fp32: one for each P::kStrip columns, which joins the
// total then, since a long sum of one lane loses bits), then one fixed tree: its bits depend neither on M,
// nor on the rows it was computed with, nor on threads. Bytes from memory: N·K/2 and the scales, once per kNf4Tokens rows.
#pragma once

#include <algorithm>
#include <vector>

#include "common/subnormals.h"
#include "common/vec.h"
#include "nf4/nf4_matmul_cpu.h"
#include "nf4/nf4_scales.h"

namespace pyfastpeft {
namespace {

constexpr std::int64_t kNf4Panel = 32;         // rows of W whose sums are kept between blocks of columns
constexpr std::int64_t kNf4Parts = 8;          // parts of x for which they are
constexpr std::int64_t kNf4XBytes = 16 << 10;  // of a part of x at a time: half of the smallest L1 cache

// The same columns of rows of W that come later are fetched ahead: with few rows of x, when memory is the limit, two tiles
// ahead into the L2 cache, else one into the L1 cache. Measured on Zen 4 with 117 MB of packed bytes, one thread (none / L1 /
// L2): M = 1 12.9 / 10.4 / 7.8 ms, 15 of the 17.5 GB/s that reading alone reaches; M = 4 24.6 / 16.7 / 16.2; M = 8 33.8 /
// 26.7 / 28.3.
constexpr int kNf4FewTokens = 4;

// Chunks [begin, end) of some rows of W and of one part of x.
template <typename P>
struct Nf4Strip {
  const P& policy;
  const Nf4Scales& scales;
  const std::uint8_t* packed;  // of the first row
  std::int64_t row_bytes;
  std::int64_t group, per_row;   // the first row's first group in W, and how many a row has
  const typename P::Element* x;  // [chunk][vector][token][lane]
  std::int64_t begin, end;
  float* sums;  // [row][token][lane]
  std::int64_t sums_stride;
};

// sums[r][m] += W[n + r] · x[m] over the strip's columns, for `rows` rows of W from its row n on.
template <typename P, int rows, int tokens, bool nested>
__attribute__((noinline)) void nf4_tile(const Nf4Strip<P>& strip, std::int64_t n) {
  constexpr std::int64_t kLanes = P::columns / P::vectors;
  const P policy = strip.policy;
  const Nf4Scales scales = strip.scales;
  const std::int64_t row_bytes = strip.row_bytes, per_row = strip.per_row, group = strip.group + n * per_row;
  const std::uint8_t* packed = strip.packed + n * row_bytes + strip.begin * P::bytes;
  const typename P::Element* x = strip.x + strip.begin * P::columns * tokens;
  float* const sums = strip.sums + n * strip.sums_stride;
  typename P::Sum sum[rows][tokens];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < tokens; ++m) {
      if (P::kStrip > 0)
        sum[r][m] = typename P::Sum{};
      else
        sum[r][m] = P::load_sum(sums + r * strip.sums_stride + m * P::V::width);
    }
  for (std::int64_t c = strip.begin; c < strip.end; ++c) {
    typename P::Chunk chunk[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
      chunk[r] = policy.template chunk<nested>(packed + r * row_bytes, scales, group + r * per_row, c, per_row);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      if (tokens <= kNf4FewTokens)
        __builtin_prefetch(packed + (r + 2 * rows) * row_bytes, 0, 2);
      else
        __builtin_prefetch(packed + (r + rows) * row_bytes);
    }
#pragma GCC unroll 8
    for (int j = 0; j < P::vectors; ++j) {
      typename P::Weights weights[rows];
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) weights[r] = policy.weights(chunk[r], j);
#pragma GCC unroll 8
      for (int m = 0; m < tokens; ++m) {
        const auto value = P::load(x + (j * tokens + m) * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) P::dot(weights[r], value, sum[r][m]);
      }
    }
    packed += P::bytes;
    x += P::columns * tokens;
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < tokens; ++m) {
      float* const total = sums + r * strip.sums_stride + m * P::V::width;
      if (P::kStrip > 0) sum[r][m] += P::load_sum(total);
      P::store_sum(sum[r][m], total);
    }
}

// nf4_tile over `count` rows of W.
template <typename P, int tokens, bool nested>
void nf4_tiles(const Nf4Strip<P>& strip, std::int64_t count) {
  constexpr int rows = P::rows(tokens);
  std::int64_t r = 0;
  for (; r + rows <= count; r += rows) nf4_tile<P, rows, tokens, nested>(strip, r);
  for (; r < count; ++r) nf4_tile<P, 1, tokens, nested>(strip, r);
}

template <typename P, bool nested>
void nf4_tiles_of(int tokens, const Nf4Strip<P>& strip, std::int64_t count) {
  static_assert(kNf4MaxTokens == 8, "one case each");
  switch (tokens) {
    case 1:
      return nf4_tiles<P, 1, nested>(strip, count);
    case 2:
      return nf4_tiles<P, 2, nested>(strip, count);
    case 3:
      return nf4_tiles<P, 3, nested>(strip, count);
    case 4:
      return nf4_tiles<P, 4, nested>(strip, count);
    case 5:
      return nf4_tiles<P, 5, nested>(strip, count);
    case 6:
      return nf4_tiles<P, 6, nested>(strip, count);
    case 7:
      return nf4_tiles<P, 7, nested>(strip, count);
    default:
      return nf4_tiles<P, 8, nested>(strip, count);
  }
}

// sum[i] += S[m] · B[n + i] by lanes, for 4 rows of W; the ranks that fill no vector come from `tail`, padded with zeros.
template <typename V>
void nf4_add_low_rank(const Nf4Added& added, std::int64_t m, std::int64_t n, int rows, const float* tail, V* sum) {
  const float* const s = added.s + m * added.s_stride;
  const std::int64_t whole = added.R / V::width * V::width;
  for (std::int64_t k = 0; k < whole; k += V::width) {
    const V left = V::load(s + k);
    for (int i = 0; i < rows; ++i) sum[i] = V::fma(left, V::load(added.b + (n + i) * added.R + k), sum[i]);
  }
  if (whole == added.R) return;
  const V left = V::load(s + whole);
  for (int i = 0; i < rows; ++i) sum[i] = V::fma(left, V::load(tail + i * V::width), sum[i]);
}

// y[m, n + r] = (lanes of the sums and of the low-rank product, by one tree) + bias, for a panel of `count` rows of W.
template <typename P, typename T>
void nf4_finish(const Nf4MatvecArgs& args, std::int64_t n, std::int64_t count, std::int64_t first_m, std::int64_t M,
                const float* sums) {
  using V = typename P::V;
  constexpr int kOut = V::width;
  const Nf4Added& added = args.added;
  const std::int64_t whole = added.R / kOut * kOut;
  float tail[kOut * kOut] = {}, total[kOut], bias[kOut] = {};
  for (std::int64_t r = 0; r < count; r += kOut) {
    const int some = int(std::min<std::int64_t>(kOut, count - r));
    for (int i = 0; i < some && whole < added.R; ++i)
      std::copy_n(added.b + (n + r + i) * added.R + whole, added.R - whole, tail + i * kOut);
    if (added.bias != nullptr) std::copy_n(added.bias + n + r, some, bias);
    for (std::int64_t m = 0; m < M; ++m) {
      for (int i = 0; i < some; i += 4) {
        V sum[4];
        for (int q = 0; q < 4; ++q) sum[q] = V::load(sums + ((r + std::min(i + q, some - 1)) * M + m) * kOut);
        if (added.R > 0) nf4_add_low_rank(added, first_m + m, n + r + i, std::min(4, some - i), tail + i * kOut, sum);
        P::add_lanes(sum, total + i);
      }
      T* const y = static_cast<T*>(args.y) + (first_m + m) * args.w->N + n + r;
      V value = V::load(total);
      if (added.bias != nullptr) value = value + V::load(bias);
      if (some == kOut)
        value.store(y);
      else
        store_part(value, y, some);
    }
  }
}

template <typename P>
void nf4_dots_rows(const Nf4MatvecArgs& args, std::int64_t begin, std::int64_t end) {
  const KeepSubnormals keep;
  using Element = typename P::Element;
  const Nf4Matrix& w = *args.w;
  const P policy(w.type);
  const std::int64_t per_row = w.K / kNf4Group, row_bytes = w.K / 2, chunks = args.stride / P::columns;
  const std::int64_t part = nf4_part(args.M), block = kNf4Parts * part;
  // a fixed length where a strip is a sum of its own: bits must not depend on M
  const std::int64_t by_cache = kNf4XBytes / (part * P::columns * std::int64_t(sizeof(Element)));
  const std::int64_t step = P::kStrip > 0 ? P::kStrip / P::columns : std::max<std::int64_t>(1, by_cache);
  std::vector<float> table(std::size_t(nf4_scale_table(w, kNf4Panel)));
  std::vector<float> sums(std::size_t(kNf4Panel * std::min(args.M, block) * P::V::width));
  for (std::int64_t n = begin; n < end; n += kNf4Panel) {
    const std::int64_t count = std::min(kNf4Panel, end - n);
    const Nf4Scales scales = nf4_scales<typename P::V>(w, n, count, table.data());
    for (std::int64_t first_m = 0; first_m < args.M; first_m += block) {
      const std::int64_t M = std::min(block, args.M - first_m), sums_stride = M * P::V::width;
      std::fill_n(sums.begin(), count * sums_stride, 0.0f);
      for (std::int64_t c = 0; c < chunks; c += step)
        for (std::int64_t m = 0; m < M; m += part) {
          const Element* x = static_cast<const Element*>(args.x) + (first_m + m) * args.stride;
          const Nf4Strip<P> strip{policy,
                                  scales,
                                  w.packed + n * row_bytes,
                                  row_bytes,
                                  n * per_row,
                                  per_row,
                                  x,
                                  c,
                                  std::min(chunks, c + step),
                                  sums.data() + m * P::V::width,
                                  sums_stride};
          const int tokens = int(std::min(part, M - m));
          if (scales.codes != nullptr)
            nf4_tiles_of<P, true>(tokens, strip, count);
          else
            nf4_tiles_of<P, false>(tokens, strip, count);
        }
      dispatch(args.dtype,
               [&](auto tag) { nf4_finish<P, typename decltype(tag)::type>(args, n, count, first_m, M, sums.data()); });
    }
  }
}

}  // namespace
}  // namespace pyfastpeft
