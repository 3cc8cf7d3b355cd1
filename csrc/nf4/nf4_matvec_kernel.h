// The body of nf4_matvec_cpu as a template over one vector type of common/vec.h; nf4_matmul_cpu*.cpp instantiate it.
//
// A row of W is decoded to fp32 in a scratch of K floats that stays in the L1 or L2 cache, then multiplied with every
// row of x. Bytes from memory: N·K/2 + 4·N·K/blocksize, once, whatever M is.
#pragma once

#include <algorithm>
#include <vector>

#include "common/subnormals.h"
#include "common/vec.h"
#include "nf4/nf4_matmul_cpu.h"

namespace pyfastpeft {
namespace {

template <typename V>
float nf4_sum(V value) {
  float lanes[V::width];
  value.store(lanes);
  for (int step = V::width / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// One row of x with one row of W. Four sums hide the latency of the multiply-add; their order is fixed.
template <typename V>
float nf4_dot(const float* x, const float* w, std::int64_t count) {
  V sum[4] = {V::set(0.0f), V::set(0.0f), V::set(0.0f), V::set(0.0f)};
  std::int64_t k = 0;
  for (; k + 4 * V::width <= count; k += 4 * V::width)
    for (int j = 0; j < 4; ++j)
      sum[j] = V::fma(V::load(x + k + j * V::width), V::load(w + k + j * V::width), sum[j]);
  for (; k < count; k += V::width) sum[0] = V::fma(V::load(x + k), V::load(w + k), sum[0]);
  return nf4_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <typename V>
void nf4_matvec_rows(const Nf4MatvecArgs& args, std::int64_t begin, std::int64_t end) {
  const KeepSubnormals keep;
  const Nf4Matrix& w = *args.w;
  std::vector<float> scratch(std::size_t(w.K + 2 * w.blocksize + kNf4MatvecPad));
  for (std::int64_t n = begin; n < end; ++n) {
    const std::int64_t first = n * w.K / w.blocksize, last = ((n + 1) * w.K + w.blocksize - 1) / w.blocksize;
    nf4_decode_blocks(w, first, last - first, DType::f32, scratch.data());
    float* row = scratch.data() + (n * w.K - first * w.blocksize);
    std::fill(row + w.K, row + args.stride, 0.0f);  // what follows belongs to the next row
    for (std::int64_t m = 0; m < args.M; ++m) {
      const float dot = nf4_dot<V>(args.x + m * args.stride, row, args.stride);
      args.y[m * w.N + n] = args.bias != nullptr ? dot + args.bias[n] : dot;
    }
  }
}

}  // namespace
}  // namespace pyfastpeft
