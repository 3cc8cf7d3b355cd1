// The bodies of the backward's products as templates over one vector type of common/vec.h; segmented_lora_cpu*.cpp
// instantiate them. S = s·x·At is the forward's segmented_shrink.
#pragma once

#include "segmented_lora/segmented_lora_kernels.h"

namespace pyfastpeft {
namespace {

// P of some rows and up to sixteen ranks: B's rows are turned into columns of a panel, which then serve all of the rows.
template <typename V, typename T, typename F>
void segmented_project(const SegmentedCpuArgs& args, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kChunk = V::width == 1 ? 64 : kSegmentedColumns;  // short chains, as in segmented_shrink
  std::vector<float> panel(kLoraRows * kChunk), right(kSegmentedRanks * kChunk);
  std::vector<float> sums(kSegmentedRows * kSegmentedRanks);
  for (std::int64_t p = begin; p < end; ++p) {
    const SegmentedShrinkPiece& piece = args.project[p];
    const SegmentedAdapter& adapter = args.adapters[piece.adapter];
    const std::int64_t R = adapter.rank, ranks = std::min<std::int64_t>(kSegmentedRanks, R - piece.rank);
    const F* b = static_cast<const F*>(adapter.b) + piece.rank;
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (std::int64_t n = 0; n < args.N; n += kChunk) {
      const std::int64_t count = std::min(kChunk, args.N - n), padded = (count + V::width - 1) / V::width * V::width;
      segmented_turn<V, true>(b + n * R, R, count, ranks, right.data(), kChunk);
      for (std::int64_t m = 0; m < piece.rows; m += kLoraRows) {
        const std::int64_t rows = std::min<std::int64_t>(kLoraRows, piece.rows - m);
        for (std::int64_t i = 0; i < rows; ++i) {
          float* row = panel.data() + i * kChunk;
          std::fill(row + count, row + padded, 0.0f);
          lora_load_panel<V>(static_cast<const T*>(args.dy), args.row(piece.position + m + i) * args.N + n, count, row);
        }
        float* to = sums.data() + m * kSegmentedRanks;
        if (rows == kLoraRows) {
          lora_dots_of_ranks<V, kLoraRows>(panel.data(), kChunk, right.data(), kChunk, padded, ranks, to,
                                           kSegmentedRanks);
        } else {
          for (std::int64_t i = 0; i < rows; ++i)
            lora_dots_of_ranks<V, 1>(panel.data() + i * kChunk, kChunk, right.data(), kChunk, padded, ranks,
                                     to + i * kSegmentedRanks, kSegmentedRanks);
        }
      }
    }
    for (std::int64_t i = 0; i < piece.rows; ++i)
      for (std::int64_t r = 0; r < ranks; ++r)
        args.p[piece.s + i * R + r] = sums[i * kSegmentedRanks + r] * adapter.scaling;
  }
}

// dX of some rows and columns. A is read in place where it is fp32 and no tail of a row is left.
template <typename V, typename T, typename F>
void segmented_spread(const SegmentedCpuArgs& args, std::int64_t begin, std::int64_t end) {
  std::vector<float> panel, out(kLoraRows * kSegmentedColumns);
  for (std::int64_t p = begin; p < end; ++p) {
    const SegmentedExpandPiece& piece = args.expand[p];
    const std::int64_t R = args.adapters[piece.adapter].rank;
    const std::int64_t columns = std::min(kSegmentedColumns, args.K - piece.column);
    const std::int64_t padded = (columns + V::width - 1) / V::width * V::width;
    const F* a = static_cast<const F*>(args.adapters[piece.adapter].a) + piece.column;
    const float* right = nullptr;
    std::int64_t stride = 0;
    if constexpr (std::is_same_v<F, float>) {
      if (padded == columns) right = a, stride = args.K;
    }
    if (right == nullptr) {
      if (const auto size = std::size_t(R * kSegmentedColumns); panel.size() < size) panel = std::vector<float>(size);
      for (std::int64_t r = 0; r < R; ++r) {
        float* row = panel.data() + r * kSegmentedColumns;
        std::fill(row + columns, row + padded, 0.0f);
        lora_load_panel<V>(a, r * args.K, columns, row);
      }
      right = panel.data(), stride = kSegmentedColumns;
    }
    for (std::int64_t m = 0; m < piece.rows; m += kLoraRows) {
      const std::int64_t rows = std::min<std::int64_t>(kLoraRows, piece.rows - m);
      const float* low = args.p + piece.s + m * R;
      if (rows == kLoraRows) {
        lora_outer_of_columns<V, kLoraRows>(low, R, right, stride, padded, out.data(), kSegmentedColumns);
      } else {
        for (std::int64_t i = 0; i < rows; ++i)
          lora_outer_of_columns<V, 1>(low + i * R, R, right, stride, padded, out.data() + i * kSegmentedColumns,
                                      kSegmentedColumns);
      }
      for (std::int64_t i = 0; i < rows; ++i) {
        T* dx = static_cast<T*>(args.dx) + args.row(piece.position + m + i) * args.K + piece.column;
        const float* from = out.data() + i * kSegmentedColumns;
        std::int64_t j = 0;
        for (; j + V::width <= columns; j += V::width) V::load(from + j).store(dx + j);
        if (j < columns) store_part(V::load(from + j), dx + j, columns - j);
      }
    }
  }
}

// All ranks of a gradient in some columns, summed over a segment's rows: dA = Pt·x, or dB = dYt·S with its bias.
template <typename V, typename T, typename F>
void segmented_gather(const SegmentedCpuArgs& args, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kWidth = kSegmentedGroup, kPanelRows = 128;  // 128 x 64 floats: 32 KiB
  constexpr int kVectors = V::width >= 16 ? 4 : 2;
  static_assert(kWidth % (kVectors * V::width) == 0);
  std::vector<float> panel(kWidth * kPanelRows), sums;
  for (std::int64_t p = begin; p < end; ++p) {
    const SegmentedGradientPiece& piece = args.gather[p];
    const SegmentedAdapter& adapter = args.adapters[piece.adapter];
    const SegmentedGradients& gradients = args.gradients[piece.adapter];
    const std::int64_t R = adapter.rank, D = piece.of_b ? args.N : args.K, width = std::min(kWidth, D - piece.column);
    const auto* from = static_cast<const T*>(piece.of_b ? args.dy : args.x);
    const bool factor = piece.of_b ? gradients.b != nullptr : true;
    const float* left = (piece.of_b ? args.s : args.p) + piece.s;
    sums.assign(std::size_t(R * kWidth), 0.0f);
    V bias[kWidth / V::width];
    for (V& value : bias) value = V::set(0.0f);
    for (std::int64_t m = 0; m < piece.rows; m += kPanelRows) {
      const std::int64_t rows = std::min(kPanelRows, piece.rows - m);
      for (std::int64_t i = 0; i < rows; ++i) {
        float* row = panel.data() + i * kWidth;
        std::fill(row + width, row + kWidth, 0.0f);
        lora_load_panel<V>(from, args.row(piece.position + m + i) * D + piece.column, width, row);
      }
      for (std::int64_t j = 0; factor && j < width; j += kVectors * V::width) {
        std::int64_t r = 0;
        for (; r + 4 <= R; r += 4)
          lora_gather<V, 4, kVectors>(left + m * R + r, R, panel.data() + j, kWidth, rows, sums.data() + r * kWidth + j,
                                      kWidth);
        for (; r < R; ++r)
          lora_gather<V, 1, kVectors>(left + m * R + r, R, panel.data() + j, kWidth, rows, sums.data() + r * kWidth + j,
                                      kWidth);
      }
      for (std::int64_t j = 0; piece.of_b && gradients.bias != nullptr && j < kWidth; j += V::width) {
        V sum = V::set(0.0f);
        for (std::int64_t i = 0; i < rows; ++i) sum = sum + V::load(panel.data() + i * kWidth + j);
        bias[j / V::width] = bias[j / V::width] + sum;
      }
    }
    if (!piece.of_b) {
      for (std::int64_t r = 0; r < R; ++r) {
        F* to = static_cast<F*>(gradients.a) + r * D + piece.column;
        const float* row = sums.data() + r * kWidth;
        std::int64_t j = 0;
        for (; j + V::width <= width; j += V::width) V::load(row + j).store(to + j);
        if (j < width) store_part(V::load(row + j), to + j, width - j);
      }
    } else if (factor) {
      segmented_turn<V, false>(sums.data(), kWidth, R, width, static_cast<F*>(gradients.b) + piece.column * R, R);
    }
    if (piece.of_b && gradients.bias != nullptr) {
      const V scaling = V::set(adapter.scaling);
      float* to = gradients.bias + piece.column;
      std::int64_t j = 0;
      for (; j + V::width <= width; j += V::width) (bias[j / V::width] * scaling).store(to + j);
      if (j < width) store_part(bias[j / V::width] * scaling, to + j, width - j);
    }
  }
}

#define PYFASTPEFT_OF_DTYPES(pieces)                                                              \
  template <typename V>                                                                           \
  void pieces(const SegmentedCpuArgs& args, std::int64_t begin, std::int64_t end) {               \
    dispatch(args.dtype, [&](auto x) {                                                            \
      dispatch(args.factors, [&](auto factor) {                                                   \
        pieces<V, typename decltype(x)::type, typename decltype(factor)::type>(args, begin, end); \
      });                                                                                         \
    });                                                                                           \
  }
PYFASTPEFT_OF_DTYPES(segmented_project)
PYFASTPEFT_OF_DTYPES(segmented_spread)
PYFASTPEFT_OF_DTYPES(segmented_gather)
#undef PYFASTPEFT_OF_DTYPES

}  // namespace
}  // namespace pyfastpeft
