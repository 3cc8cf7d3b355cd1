// Between the launcher and its variants: a variant works on a range of pieces, on the calling thread.
#pragma once

#include "segmented_lora/segmented_lora.h"

namespace pyfastpeft {

constexpr int kSegmentedRanks = 16;              // of A in a piece of the first product
constexpr std::int64_t kSegmentedColumns = 256;  // of y in a piece of the second
constexpr std::int64_t kSegmentedRows = 64;

struct SegmentedShrinkPiece {
  std::int32_t adapter, rows;      // at most four rows
  std::int64_t position, rank, s;  // the first of each; s: where the first row's first rank lies in S
};
struct SegmentedExpandPiece {
  std::int32_t adapter, rows;
  std::int64_t position, column, s;
};

struct SegmentedCpuArgs {
  const void* x;
  void* y;
  DType dtype;
  std::int64_t K, N;
  SegmentedBatch batch;
  const SegmentedAdapter* adapters;
  DType factors;
  const SegmentedShrinkPiece* shrink;
  const SegmentedExpandPiece* expand;
  float* s;  // a segment's rows lie together, `rank` floats apart

  std::int64_t row(std::int64_t position) const {
    return batch.order[position / batch.rows] * batch.rows + position % batch.rows;
  }
};

using SegmentedPieces = void(const SegmentedCpuArgs& args, std::int64_t begin, std::int64_t end);
SegmentedPieces segmented_shrink_scalar, segmented_expand_scalar;
#if defined(__x86_64__)
SegmentedPieces segmented_shrink_avx2, segmented_expand_avx2;
SegmentedPieces segmented_shrink_avx512, segmented_expand_avx512;
#endif

}  // namespace pyfastpeft
