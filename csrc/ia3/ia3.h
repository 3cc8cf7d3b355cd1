// (IA)³ scaling: y[m, d] = x[m, d] · scale[d], and its gradients. Shapes: M tokens, D features.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pyfastpeft {

// y = x · scale: one fp32 product, rounded once to the dtype.
void ia3_scale_cpu(const void* x,       // [M, D], rows x_stride elements apart
                   const float* scale,  // [D]
                   void* y,             // [M, D], contiguous, same dtype as x
                   std::int64_t M, std::int64_t D, std::int64_t x_stride, DType dtype);

// grad_x = grad_y · scale and grad_scale[d] = Σ_m grad_y[m, d] · x[m, d] in one pass over both.
// The sum: fp32 over runs of rows whose bounds depend on M and D alone, then fp64 over the runs; so it does not depend
// on the thread count, the instruction set or the run.
void ia3_scale_backward_cpu(const void* grad_y,  // [M, D], rows grad_stride elements apart
                            const void* x,       // [M, D], rows x_stride elements apart; may be null without grad_scale
                            const float* scale,  // [D]
                            void* grad_x,        // [M, D], contiguous; null: not wanted
                            float* grad_scale,   // [D]; null: not wanted
                            std::int64_t M, std::int64_t D, std::int64_t grad_stride, std::int64_t x_stride,
                            DType dtype);

// ---- CUDA: the same on device memory, with the scale, and what is its gradient, in fp32 or in the dtype of x --------

void ia3_scale_cuda(const void* x,      // [M, D], rows x_stride elements apart
                    const void* scale,  // [D]
                    bool scale_is_f32,  // else of `dtype`
                    void* y,            // [M, D], contiguous, same dtype as x
                    std::int64_t M, std::int64_t D, std::int64_t x_stride, DType dtype, void* stream);

// Floats of workspace that the backward needs for these shapes, 0 for none.
std::int64_t ia3_scale_backward_workspace(std::int64_t M, std::int64_t D, DType dtype);

// The column sum is cut by M, D and the dtype alone and added in one order: the same bits on every GPU and in every
// run.
void ia3_scale_backward_cuda(const void* grad_y,  // [M, D], rows grad_stride elements apart
                             const void* x,      // [M, D], rows x_stride elements apart; may be null without grad_scale
                             const void* scale,  // [D]
                             bool scale_is_f32,  // and grad_scale; else of `dtype`
                             void* grad_x,       // [M, D], contiguous; null: not wanted
                             void* grad_scale,   // [D]; null: not wanted
                             float* workspace,   // [ia3_scale_backward_workspace(M, D, dtype)]
                             std::int64_t M, std::int64_t D, std::int64_t grad_stride, std::int64_t x_stride,
                             DType dtype, void* stream);

}  // namespace pyfastpeft
