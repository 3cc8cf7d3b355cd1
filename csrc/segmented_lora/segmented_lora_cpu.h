// Between the launcher and its variants: a variant works on a range of pieces, on the calling thread.
#pragma once

#include "segmented_lora/segmented_lora.h"

namespace pyfastpeft {

constexpr int kSegmentedRanks = 16;              // of A in a piece of the first product
constexpr std::int64_t kSegmentedColumns = 256;  // of y in a piece of the second
constexpr std::int64_t kSegmentedRows = 64;
constexpr std::int64_t kSegmentedGroup = 64;  // columns of a gradient in a piece

struct SegmentedShrinkPiece {
  std::int32_t adapter, rows;      // at most four rows; of dY·B at most kSegmentedRows
  std::int64_t position, rank, s;  // the first of each; s: where the first row's first rank lies in S
};
struct SegmentedExpandPiece {
  std::int32_t adapter, rows;
  std::int64_t position, column, s;
};

struct SegmentedGradientPiece {  // of A [ranks, K], or of B [N, ranks] and its bias: some columns, all ranks and rows
  std::int32_t adapter;
  bool of_b;
  std::int64_t position, rows, column, s;
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
  const SegmentedExpandPiece* expand;  // of y; in the backward of dx
  float* s;                            // scaled; a segment's rows lie together, `rank` floats apart
  // of the backward
  const void* dy;
  void* dx;
  float* p;  // scaled dY·B, as s
  const SegmentedShrinkPiece* project;
  const SegmentedGradients* gradients;
  const SegmentedGradientPiece* gather;

  std::int64_t row(std::int64_t position) const {
    return batch.order[position / batch.rows] * batch.rows + position % batch.rows;
  }
};

using SegmentedPieces = void(const SegmentedCpuArgs& args, std::int64_t begin, std::int64_t end);
struct SegmentedVariants {
  // y += S·Bt; backward: P = s·dY·B, dX = P·A, and the gradients dA = Pt·x, dB = dYt·S
  SegmentedPieces *shrink, *expand, *project, *spread, *gather;
};
extern const SegmentedVariants segmented_scalar;
#if defined(__x86_64__)
extern const SegmentedVariants segmented_avx2, segmented_avx512;
#endif
const SegmentedVariants& segmented_variants();  // of this processor

// pieces(args, begin, end) of all `count`, which take `flops` together, by as many threads as that is worth
void segmented_run(SegmentedPieces* pieces, const SegmentedCpuArgs& args, std::size_t count, std::int64_t flops);

}  // namespace pyfastpeft
