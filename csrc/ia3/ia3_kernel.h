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

template <typename V, typename T>
void ia3_forward_tile(const Ia3Tile& t) {
  for (std::int64_t r = 0; r < t.rows; ++r) {
    const T* x = static_cast<const T*>(t.x) + r * t.x_stride;
    T* y = static_cast<T*>(t.out) + r * t.out_stride;
    std::int64_t d = 0;
    for (; d + V::width <= t.columns; d += V::width) (V::load(x + d) * V::load(t.scale + d)).store(y + d);
    if (const std::int64_t rest = t.columns - d)
      store_part(load_part<V>(x + d, rest) * load_part<V>(t.scale + d, rest), y + d, rest);
  }
}

template <typename V, typename T>
void ia3_backward_tile(const Ia3Tile& t) {
  for (std::int64_t r = 0; r < t.rows; ++r) {
    const T* dy = static_cast<const T*>(t.grad_y) + r * t.grad_stride;
    const T* x = t.sums ? static_cast<const T*>(t.x) + r * t.x_stride : nullptr;
    T* dx = t.out ? static_cast<T*>(t.out) + r * t.out_stride : nullptr;
    std::int64_t d = 0;
    for (; d + V::width <= t.columns; d += V::width) {
      const V g = V::load(dy + d);
      if (dx) (g * V::load(t.scale + d)).store(dx + d);
      if (x) V::fma(g, V::load(x + d), V::load(t.sums + d)).store(t.sums + d);
    }
    if (const std::int64_t rest = t.columns - d) {
      const V g = load_part<V>(dy + d, rest);
      if (dx) store_part(g * load_part<V>(t.scale + d, rest), dx + d, rest);
      if (x) store_part(V::fma(g, load_part<V>(x + d, rest), load_part<V>(t.sums + d, rest)), t.sums + d, rest);
    }
  }
}

template <typename V>
constexpr Ia3Kernels ia3_kernels() {
  return {{ia3_forward_tile<V, float>, ia3_forward_tile<V, f16>, ia3_forward_tile<V, bf16>},
          {ia3_backward_tile<V, float>, ia3_backward_tile<V, f16>, ia3_backward_tile<V, bf16>}};
}

}  // namespace
}  // namespace pyfastpeft
