// The bodies of both products as templates over one vector type of common/vec.h, from the inner loops of
// lora/lora_kernels.h; segmented_lora_cpu*.cpp instantiate them.
#pragma once

#include "lora/lora_kernels.h"
#include "segmented_lora/segmented_lora_cpu.h"

namespace pyfastpeft {
namespace {

// S of up to four rows and sixteen ranks: x goes through an fp32 panel, A is read in place where it is fp32.
template <typename V, typename T, typename F>
void segmented_shrink(const SegmentedCpuArgs& args, std::int64_t begin, std::int64_t end) {
  // one lane sums what sixteen would: a shorter run keeps the error of its long chain down
  constexpr std::int64_t kChunk = V::width == 1 ? 64 : kLoraChunk;
  std::vector<float> panel(kLoraRows * kChunk), right;
  for (std::int64_t p = begin; p < end; ++p) {
    const SegmentedShrinkPiece& piece = args.shrink[p];
    const SegmentedAdapter& adapter = args.adapters[piece.adapter];
    const std::int64_t ranks = std::min<std::int64_t>(kSegmentedRanks, adapter.rank - piece.rank);
    const F* a = static_cast<const F*>(adapter.a) + piece.rank * args.K;
    float sums[kLoraRows * kSegmentedRanks] = {};
    for (std::int64_t k = 0; k < args.K; k += kChunk) {
      const std::int64_t count = std::min(kChunk, args.K - k), padded = (count + V::width - 1) / V::width * V::width;
      for (int i = 0; i < piece.rows; ++i) {
        float* row = panel.data() + i * kChunk;
        std::fill(row + count, row + padded, 0.0f);
        lora_load_panel<V>(static_cast<const T*>(args.x), args.row(piece.position + i) * args.K + k, count, row);
      }
      const float* factor = nullptr;
      std::int64_t stride = 0;
      if constexpr (std::is_same_v<F, float>) {
        if (padded == count) factor = a + k, stride = args.K;
      }
      if (factor == nullptr) {
        if (const auto size = std::size_t(kSegmentedRanks * kChunk); right.size() < size)
          right = std::vector<float>(size);
        for (std::int64_t r = 0; r < ranks; ++r) {
          std::fill(right.data() + r * kChunk + count, right.data() + r * kChunk + padded, 0.0f);
          lora_load_panel<V>(a, r * args.K + k, count, right.data() + r * kChunk);
        }
        factor = right.data(), stride = kChunk;
      }
      if (piece.rows == kLoraRows) {
        lora_dots_of_ranks<V, kLoraRows>(panel.data(), kChunk, factor, stride, padded, ranks, sums, kSegmentedRanks);
      } else {
        for (int i = 0; i < piece.rows; ++i)
          lora_dots_of_ranks<V, 1>(panel.data() + i * kChunk, kChunk, factor, stride, padded, ranks,
                                   sums + i * kSegmentedRanks, kSegmentedRanks);
      }
    }
    for (int i = 0; i < piece.rows; ++i)
      for (std::int64_t r = 0; r < ranks; ++r)
        args.s[piece.s + i * adapter.rank + r] = sums[i * kSegmentedRanks + r] * adapter.scaling;
  }
}

// to[c · to_stride + r] = from[r · from_stride + c] for rows x columns of them, by blocks of a vector's width squared, in
// registers. kPadded: `to` has room for rows up to a multiple of the width, and they become zero.
template <typename V, bool kPadded, typename From, typename To>
void segmented_turn(const From* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns, To* to,
                    std::int64_t to_stride) {
  for (std::int64_t r = 0; r < rows; r += V::width)
    for (std::int64_t c = 0; c < columns; c += V::width) {
      const std::int64_t some_rows = std::min<std::int64_t>(V::width, rows - r);
      const std::int64_t some = std::min<std::int64_t>(V::width, columns - c);
      const From* at = from + r * from_stride + c;
      V block[V::width];
      if (some_rows == V::width && some == V::width) {
        for (int i = 0; i < V::width; ++i) block[i] = V::load(at + i * from_stride);
      } else {
        for (int i = 0; i < V::width; ++i)
          block[i] = i < some_rows ? load_part<V>(at + i * from_stride, some) : V::set(0.0f);
      }
      transpose(block);
      To* out = to + c * to_stride + r;
      if (kPadded || some_rows == V::width) {
        for (std::int64_t i = 0; i < some; ++i) block[i].store(out + i * to_stride);
      } else {
        for (std::int64_t i = 0; i < some; ++i) store_part(block[i], out + i * to_stride, some_rows);
      }
    }
}

// y of some rows and columns. B's rows are turned into columns of a panel first, once for all of the rows.
template <typename V, typename T, typename F>
void segmented_expand(const SegmentedCpuArgs& args, std::int64_t begin, std::int64_t end) {
  std::vector<float> right, out(kLoraRows * kSegmentedColumns), bias(kSegmentedColumns);
  for (std::int64_t p = begin; p < end; ++p) {
    const SegmentedExpandPiece& piece = args.expand[p];
    const SegmentedAdapter& adapter = args.adapters[piece.adapter];
    const std::int64_t R = adapter.rank, columns = std::min(kSegmentedColumns, args.N - piece.column);
    const std::int64_t padded = (columns + V::width - 1) / V::width * V::width;
    if (const auto size = std::size_t(R * kSegmentedColumns); right.size() < size) right = std::vector<float>(size);
    segmented_turn<V, true>(static_cast<const F*>(adapter.b) + piece.column * R, R, columns, R, right.data(),
                            kSegmentedColumns);
    for (std::int64_t n = 0; n < columns; ++n)
      bias[n] = adapter.bias == nullptr ? 0.0f : adapter.scaling * adapter.bias[piece.column + n];
    for (std::int64_t m = 0; m < piece.rows; m += kLoraRows) {
      const std::int64_t rows = std::min<std::int64_t>(kLoraRows, piece.rows - m);
      const float* s = args.s + piece.s + m * R;
      if (rows == kLoraRows) {
        lora_outer_of_columns<V, kLoraRows>(s, R, right.data(), kSegmentedColumns, padded, out.data(),
                                            kSegmentedColumns);
      } else {
        for (std::int64_t i = 0; i < rows; ++i)
          lora_outer_of_columns<V, 1>(s + i * R, R, right.data(), kSegmentedColumns, padded,
                                      out.data() + i * kSegmentedColumns, kSegmentedColumns);
      }
      for (std::int64_t i = 0; i < rows; ++i) {
        T* y = static_cast<T*>(args.y) + args.row(piece.position + m + i) * args.N + piece.column;
        const float* low = out.data() + i * kSegmentedColumns;
        const auto sum = [&](V former, std::int64_t j) {
          return former + (V::load(low + j) + V::load(bias.data() + j));
        };
        std::int64_t j = 0;
        for (; j + V::width <= columns; j += V::width) sum(V::load(y + j), j).store(y + j);
        if (j < columns) store_part(sum(load_part<V>(y + j, columns - j), j), y + j, columns - j);
      }
    }
  }
}

template <typename V>
void segmented_shrink(const SegmentedCpuArgs& args, std::int64_t begin, std::int64_t end) {
  dispatch(args.dtype, [&](auto x) {
    dispatch(args.factors, [&](auto factor) {
      segmented_shrink<V, typename decltype(x)::type, typename decltype(factor)::type>(args, begin, end);
    });
  });
}
template <typename V>
void segmented_expand(const SegmentedCpuArgs& args, std::int64_t begin, std::int64_t end) {
  dispatch(args.dtype, [&](auto y) {
    dispatch(args.factors, [&](auto factor) {
      segmented_expand<V, typename decltype(y)::type, typename decltype(factor)::type>(args, begin, end);
    });
  });
}

}  // namespace
}  // namespace pyfastpeft
