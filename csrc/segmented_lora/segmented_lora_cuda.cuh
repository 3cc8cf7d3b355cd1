// What the CUDA kernels of a mixed batch share: the table of adapters, and which rows a block has.
#pragma once

#include "common/check.h"
#include "common/cuda_device.h"
#include "common/cuda_vec.cuh"
#include "lora/lora_cuda.cuh"
#include "segmented_lora/segmented_lora.h"

namespace pyfastpeft {

constexpr int kSegmentedStep = 256;  // columns of x that the warps of a block take at a time
constexpr int kSegmentedTile = 32;   // rows of a tensor-core tile: two mma's
constexpr int kSegmentedFew = 8;     // rows of a tile of the FMA kernels

struct SegmentedTable {  // a kernel's parameter
  SegmentedAdapter adapters[kSegmentedAdapters];
};

struct SegmentedCall {
  const std::int32_t *order, *starts;
  std::int32_t adapters;   // of this launch
  std::int32_t samples;    //
  std::int32_t rows;       // of a sample
  std::int32_t positions;  // samples · rows
};

struct SegmentedTile {
  int adapter;   // -1: the block has nothing to do
  int position;  // the first of `count`
  int count;
};

// The rows of an adapter's segment, if its bounds are some of the batch's: the device's numbers are nobody's to check before.
__device__ __forceinline__ SegmentedTile segmented_segment(const SegmentedCall& call, int adapter) {
  const std::int64_t begin = std::int64_t(call.starts[adapter]) * call.rows,
                     end = std::int64_t(call.starts[adapter + 1]) * call.rows;
  if (begin < 0 || end > call.positions || end < begin) return {adapter, 0, 0};
  return {adapter, int(begin), int(end - begin)};
}

// Tile number `tile` of all segments' rows, kRows at a time: the same for every thread of the block.
template <int kRows>
__device__ __forceinline__ SegmentedTile segmented_tile(const SegmentedCall& call, std::int64_t tile) {
  for (int i = 0; i < call.adapters; ++i) {
    const SegmentedTile whole = segmented_segment(call, i);
    const std::int64_t first = tile * kRows, tiles = (std::int64_t(whole.count) + kRows - 1) / kRows;
    if (tile < tiles)
      return {i, whole.position + int(first), whole.count - int(first) < kRows ? whole.count - int(first) : kRows};
    tile -= tiles;
  }
  return {-1, 0, 0};
}

// The row of x and y that a position stands for; -1 where there is none.
__device__ __forceinline__ std::int64_t segmented_row(const SegmentedCall& call, const SegmentedTile& tile, int i) {
  if (i >= tile.count) return -1;
  const int position = tile.position + i;
  const int sample = call.order[position / call.rows];
  if (sample < 0 || sample >= call.samples) return -1;
  return std::int64_t(sample) * call.rows + position % call.rows;
}

// Tiles that any composition of the batch may have: one more per adapter than its rows alone would fill.
inline std::int64_t segmented_tiles(std::int64_t positions, std::int64_t adapters, std::int64_t rows_of_a_tile) {
  return std::min(positions, positions / rows_of_a_tile + adapters);
}

struct SegmentedLaunch {
  const void* x;
  void* y;
  std::int64_t K, N;
  SegmentedCall call;
  SegmentedTable table;
  SegmentedPlan plan;
  std::int64_t max_rank;
  float* s;  // [parts, positions, stride]
  cudaStream_t stream;
};

// T: of x and y, F: of the factors, T or float. `mma`: the tensor-core kernels, whose conditions hold then.
template <typename T, typename F>
cudaError_t segmented_shrink_launch(const SegmentedLaunch& launch, bool mma);
template <typename T, typename F>
cudaError_t segmented_expand_launch(const SegmentedLaunch& launch, bool mma);

}  // namespace pyfastpeft
