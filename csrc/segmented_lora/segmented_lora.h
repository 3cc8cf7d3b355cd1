// Launchers of LoRA over a mixed batch: each sample of the batch has its own adapter, or none. Raw pointers, 64-bit sizes, no
// torch. The maths is pyfastpeft/reference/segmented_lora.py:
//
//   y[row] += scaling_i · (A_i · x[row] ) · B_iᵀ + scaling_i · bias_i      i the adapter of the row's sample
//
// Samples of one adapter are a segment, as in Punica (Chen et al. 2023, arXiv:2310.18547) and S-LoRA (Sheng et al. 2023,
// arXiv:2311.03285): segment i is order[starts[i], starts[i + 1]), numbers of samples, each `rows` neighbouring rows of x
// and y. Weights are read where they lie, once for all rows of a tile; adapters may differ in rank. A segment's row p, counted
// over all of `order`, is row order[p / rows] · rows + p % rows of x: its "position" is p.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace pyfastpeft {

struct SegmentedAdapter {
  const void* a;      // [rank, K] of the factors' dtype, row-major
  const void* b;      // [N, rank]
  const float* bias;  // [N], or null
  float scaling;
  std::int32_t rank;  // 0: an adapter that this layer does not have; nothing is read
};

struct SegmentedBatch {
  const std::int32_t* order;   // [samples]
  const std::int32_t* starts;  // [adapters + 1], rising, starts[adapters] <= samples
  std::int64_t samples, rows;  // rows of a sample
};

void segmented_lora_cpu(const void* x,                                  // [samples · rows, K] of `dtype`
                        void* y,                                        // [samples · rows, N] of `dtype`, added to
                        DType dtype,                                    //
                        std::int64_t K,                                 //
                        std::int64_t N,                                 //
                        const SegmentedBatch& batch,                    //
                        const std::vector<SegmentedAdapter>& adapters,  //
                        DType factors);                                 // of a and b

// The backward, from dY = dL/dy: with P_i = scaling_i · dY · B_i and S_i = scaling_i · x · A_it, both [rows of i, rank] in fp32,
//
//   dX[row] = P_i[row] · A_i   dA_i = P_it · x   dB_i = dYt · S_i   dbias_i = scaling_i · Σ dY[row]
//
// (dL/dy itself is dY.) Sums run over a segment's rows in order. An adapter without rows has gradients of zero.
struct SegmentedGradients {  // null: not wanted
  void* a;                   // [rank, K] of the factors' dtype
  void* b;                   // [N, rank]
  float* bias;               // [N]
};

void segmented_lora_backward_cpu(const void* dy,  // [samples · rows, N] of `dtype`
                                 const void* x,   // [samples · rows, K]
                                 void* dx,        // [samples · rows, K] of zeros, or null; rows of no adapter stay so
                                 DType dtype, std::int64_t K, std::int64_t N, const SegmentedBatch& batch,
                                 const std::vector<SegmentedAdapter>& adapters, DType factors,
                                 const std::vector<SegmentedGradients>& gradients);

// ---- CUDA -----------------------------------------------------------------------------------------------------------
//
// Two launches for up to kSegmentedAdapters adapters that are in the batch, whatever their number: shrink fills
// S [parts, samples · rows, stride], expand adds to y. `order` and `starts` lie in device memory and are read by the
// kernels: a captured graph serves another composition of the batch. A number of a sample that is not there is skipped.
// Bits depend on the shapes alone. With `tensor_cores` (sm_80 and newer) 16-bit rows of whole 16 bytes go to the tensor
// cores: factors in fp32 and S are rounded to `dtype` once; sums are fp32, and the scaling is applied to them.

constexpr int kSegmentedAdapters = 112;  // as many as fit into a kernel's parameters (4 KB)

struct SegmentedPlan {
  std::int64_t stride;  // floats between rows of S: the highest rank, in whole sixteens
  std::int64_t parts;   // pieces of K, each with an S of its own
  std::int64_t steps;   // of a piece, each 256 columns
};
SegmentedPlan segmented_lora_plan(std::int64_t positions, std::int64_t K, std::int64_t max_rank, std::int64_t adapters);

void segmented_lora_cuda(const void* x, void* y, DType dtype, std::int64_t K, std::int64_t N,
                         const SegmentedBatch& batch, const std::vector<SegmentedAdapter>& adapters, DType factors,
                         bool tensor_cores,
                         float* workspace,  // [parts · samples · rows · stride] of the plan
                         void* stream);

// The backward in two launches for up to 80 adapters; as above, wrong numbers of samples and segments are left out.
std::int64_t segmented_lora_backward_workspace(std::int64_t positions, std::int64_t K, std::int64_t N,
                                               std::int64_t max_rank, std::int64_t adapters);  // floats

void segmented_lora_backward_cuda(const void* dy, const void* x, void* dx, DType dtype, std::int64_t K, std::int64_t N,
                                  const SegmentedBatch& batch, const std::vector<SegmentedAdapter>& adapters,
                                  DType factors, const std::vector<SegmentedGradients>& gradients, bool tensor_cores,
                                  float* workspace, void* stream);

}  // namespace pyfastpeft
