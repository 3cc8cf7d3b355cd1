// y = x·Wᵀ for weights of any shape, as a template over one vector type of common/vec.h; nf4_matmul_cpu*.cpp instantiate
// it. Weights whose rows are whole groups of 64 values take nf4_dots_kernel.h, which is several times as fast.
//
// Four rows of W are decoded to fp32 into a scratch that stays in the L2 cache, then multiplied with every row of x, some
// columns at a time so that those of x stay in the L1 cache. Bytes from memory: N·K/2 + 4·N·K/blocksize, once, whatever
// M is. Each output is one vector of sums over k in a fixed order, then one fixed tree: its bits depend neither on M nor
// on which rows it was computed with.
#pragma once

#include <algorithm>
#include <vector>

#include "common/subnormals.h"
#include "common/vec.h"
#include "nf4/nf4_matmul_cpu.h"

namespace pyfastpeft {
namespace {

constexpr int kNf4Rows = 4;                // of W at a time
constexpr std::int64_t kNf4Columns = 512;  // of x at a time: 8 rows are 16 KiB

template <typename V>
void nf4_pack_any(const void* x, DType dtype, std::int64_t K, std::int64_t stride, std::int64_t tokens, void* to) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (std::int64_t m = 0; m < tokens; ++m) {
      const T* from = static_cast<const T*>(x) + m * K;
      float* out = static_cast<float*>(to) + m * stride;
      std::int64_t k = 0;
      for (; k + V::width <= K; k += V::width) V::load(from + k).store(out + k);
      for (; k < K; ++k) out[k] = to_f32(from[k]);
      std::fill(out + K, out + stride, 0.0f);
    }
  });
}

template <typename V>
float nf4_sum(const float* sums) {
  float lanes[V::width];
  std::copy(sums, sums + V::width, lanes);
  for (int step = V::width / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// sums[m][r] += x[m] · w[r] over `count` columns, for `tokens` rows of x and kNf4Rows of W; sums are vectors.
template <typename V, int tokens>
void nf4_dots(const float* const* w, const float* x, std::int64_t stride, std::int64_t count, float* sums) {
  V sum[tokens][kNf4Rows];
  for (int m = 0; m < tokens; ++m)
    for (int r = 0; r < kNf4Rows; ++r) sum[m][r] = V::set(0.0f);
  for (std::int64_t k = 0; k < count; k += V::width) {
    V right[kNf4Rows];
    for (int r = 0; r < kNf4Rows; ++r) right[r] = V::load(w[r] + k);
    for (int m = 0; m < tokens; ++m) {
      const V left = V::load(x + m * stride + k);
      for (int r = 0; r < kNf4Rows; ++r) sum[m][r] = V::fma(left, right[r], sum[m][r]);
    }
  }
  for (int m = 0; m < tokens; ++m)
    for (int r = 0; r < kNf4Rows; ++r) {
      float* total = sums + (m * kNf4Rows + r) * V::width;
      (V::load(total) + sum[m][r]).store(total);
    }
}

template <typename V>
void nf4_matvec_rows(const Nf4MatvecArgs& args, std::int64_t begin, std::int64_t end) {
  const KeepSubnormals keep;
  constexpr int kTokens = V::width >= 16 ? 4 : 2;  // as many sums as there are registers for
  // a long sum of one lane loses bits: the narrower the vector, the fewer columns are summed before they join the total
  constexpr std::int64_t kColumns = V::width > 1 ? kNf4Columns : 64;
  const Nf4Matrix& w = *args.w;
  const Nf4Added& added = args.added;
  const float* const x = static_cast<const float*>(args.x);
  const std::int64_t row_size = w.K + 2 * w.blocksize + kNf4MatvecPad;
  std::vector<float> scratch(std::size_t(kNf4Rows * row_size)), sums(std::size_t(args.M * kNf4Rows * V::width));
  for (std::int64_t n = begin; n < end; n += kNf4Rows) {
    const float* rows[kNf4Rows];
    for (int r = 0; r < kNf4Rows; ++r) {
      const std::int64_t i = std::min(n + r, end - 1);  // the last group repeats its last row
      const std::int64_t first = i * w.K / w.blocksize, last = ((i + 1) * w.K + w.blocksize - 1) / w.blocksize;
      float* to = scratch.data() + r * row_size;
      nf4_decode_blocks(w, first, last - first, DType::f32, to);
      to += i * w.K - first * w.blocksize;
      std::fill(to + w.K, to + args.stride, 0.0f);  // what follows belongs to the next row
      rows[r] = to;
    }
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (std::int64_t k = 0; k < args.stride; k += kColumns) {
      const std::int64_t count = std::min(kColumns, args.stride - k);
      const float* part[kNf4Rows];
      for (int r = 0; r < kNf4Rows; ++r) part[r] = rows[r] + k;
      std::int64_t m = 0;
      for (; m + kTokens <= args.M; m += kTokens)
        nf4_dots<V, kTokens>(part, x + m * args.stride + k, args.stride, count, sums.data() + m * kNf4Rows * V::width);
      for (; m < args.M; ++m)
        nf4_dots<V, 1>(part, x + m * args.stride + k, args.stride, count, sums.data() + m * kNf4Rows * V::width);
    }
    for (std::int64_t m = 0; m < args.M; ++m)
      for (std::int64_t r = 0; r < std::min<std::int64_t>(kNf4Rows, end - n); ++r) {
        float dot = nf4_sum<V>(sums.data() + (m * kNf4Rows + r) * V::width), low = 0.0f;
        for (std::int64_t k = 0; k < added.R; ++k)
          low += added.s[m * added.s_stride + k] * added.b[(n + r) * added.R + k];
        if (added.R > 0) dot += low;
        if (added.bias != nullptr) dot += added.bias[n + r];
        dispatch(args.dtype, [&](auto tag) {
          using T = typename decltype(tag)::type;
          static_cast<T*>(args.y)[m * w.N + n + r] = from_f32<T>(dot);
        });
      }
  }
}

}  // namespace
}  // namespace pyfastpeft
