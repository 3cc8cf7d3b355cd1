// The two loops over a tile of rows × columns, as templates over the vector and the dtype; one table of them per
// instruction set. Private to the ia3 folder.
#pragma once

#include <algorithm>

#include "common/vec.h"

namespace pyfastpeft {

// A tile's rows all have the same number of columns. Strides in elements.
struct Ia3Tile {
  const void* grad_y;  // backward only
  std::int64_t grad_stride;
  const void* x;
  std::int64_t x_stride;
  const float* scale;
  void* out;  // y or grad_x; backward: null when not wanted
  std::int64_t out_stride;
  float* sums;  // backward: [columns], += Σ grad_y · x; null when not wanted
  std::int64_t rows, columns;
};

using Ia3Kernel = void (*)(const Ia3Tile&);
struct Ia3Kernels {  // indexed by DType
  Ia3Kernel forward[3], backward[3];
};
extern const Ia3Kernels ia3_kernels_avx2, ia3_kernels_avx512;

namespace {

// Long rows go four at a time: their scale, and their sums, do not stay in the L1 beside the rows themselves, and are
// then read once for four of them (16384 columns of bf16: 1.3 times as fast). Shorter ones stay in it, and go one at a
// time, in the order of memory that prefetching likes (1024 columns: 1.6 times as fast as by fours). The order of the
// sums is that of one row after the other in both.
constexpr int kRows = 4;
constexpr std::int64_t kLongRow = 4096;  // columns

template <int rows, typename V, typename T>
void ia3_forward_rows(const Ia3Tile& t, std::int64_t first) {
  const T* x = static_cast<const T*>(t.x) + first * t.x_stride;
  T* y = static_cast<T*>(t.out) + first * t.out_stride;
  std::int64_t d = 0;
  for (; d + V::width <= t.columns; d += V::width) {
    const V scale = V::load(t.scale + d);
    V product[rows];
    for (int r = 0; r < rows; ++r) product[r] = V::load(x + r * t.x_stride + d) * scale;
    for (int r = 0; r < rows; ++r) product[r].store(y + r * t.out_stride + d);
  }
  if (const std::int64_t rest = t.columns - d) {
    const V scale = load_part<V>(t.scale + d, rest);
    for (int r = 0; r < rows; ++r)
      store_part(load_part<V>(x + r * t.x_stride + d, rest) * scale, y + r * t.out_stride + d, rest);
  }
}

template <typename V, typename T>
void ia3_forward_tile(const Ia3Tile& t) {
  std::int64_t r = 0;
  if (t.columns >= kLongRow)
    for (; r + kRows <= t.rows; r += kRows) ia3_forward_rows<kRows, V, T>(t, r);
  for (; r < t.rows; ++r) ia3_forward_rows<1, V, T>(t, r);
}

template <int rows, bool wants_x, bool wants_sums, typename V, typename T>
void ia3_backward_rows(const Ia3Tile& t, std::int64_t first) {
  const T* dy = static_cast<const T*>(t.grad_y) + first * t.grad_stride;
  const T* x = wants_sums ? static_cast<const T*>(t.x) + first * t.x_stride : nullptr;
  T* dx = wants_x ? static_cast<T*>(t.out) + first * t.out_stride : nullptr;
  std::int64_t d = 0;
  for (; d + V::width <= t.columns; d += V::width) {
    const V scale = wants_x ? V::load(t.scale + d) : V::set(0.0f);
    V sum = wants_sums ? V::load(t.sums + d) : V::set(0.0f);
    V product[rows];
    for (int r = 0; r < rows; ++r) {
      const V g = V::load(dy + r * t.grad_stride + d);
      if constexpr (wants_x) product[r] = g * scale;
      if constexpr (wants_sums) sum = V::fma(g, V::load(x + r * t.x_stride + d), sum);
    }
    if constexpr (wants_x)
      for (int r = 0; r < rows; ++r) product[r].store(dx + r * t.out_stride + d);
    if constexpr (wants_sums) sum.store(t.sums + d);
  }
  if (const std::int64_t rest = t.columns - d) {
    const V scale = wants_x ? load_part<V>(t.scale + d, rest) : V::set(0.0f);
    V sum = wants_sums ? load_part<V>(t.sums + d, rest) : V::set(0.0f);
    for (int r = 0; r < rows; ++r) {
      const V g = load_part<V>(dy + r * t.grad_stride + d, rest);
      if constexpr (wants_x) store_part(g * scale, dx + r * t.out_stride + d, rest);
      if constexpr (wants_sums) sum = V::fma(g, load_part<V>(x + r * t.x_stride + d, rest), sum);
    }
    if constexpr (wants_sums) store_part(sum, t.sums + d, rest);
  }
}

template <bool wants_x, bool wants_sums, typename V, typename T>
void ia3_backward_rows(const Ia3Tile& t) {
  std::int64_t r = 0;
  if (t.columns >= kLongRow)
    for (; r + kRows <= t.rows; r += kRows) ia3_backward_rows<kRows, wants_x, wants_sums, V, T>(t, r);
  for (; r < t.rows; ++r) ia3_backward_rows<1, wants_x, wants_sums, V, T>(t, r);
}

template <typename V, typename T>
void ia3_backward_tile(const Ia3Tile& t) {
  if (t.out && t.sums)
    ia3_backward_rows<true, true, V, T>(t);
  else if (t.out)
    ia3_backward_rows<true, false, V, T>(t);
  else if (t.sums)
    ia3_backward_rows<false, true, V, T>(t);
}

template <typename V>
constexpr Ia3Kernels ia3_kernels() {
  return {{ia3_forward_tile<V, float>, ia3_forward_tile<V, f16>, ia3_forward_tile<V, bf16>},
          {ia3_backward_tile<V, float>, ia3_backward_tile<V, f16>, ia3_backward_tile<V, bf16>}};
}

}  // namespace
}  // namespace pyfastpeft
