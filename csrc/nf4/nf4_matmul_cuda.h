// Launchers of the 4-bit matmul on CUDA: raw device pointers, 64-bit sizes, no torch.
//
//   y [M, N] = (x [M, K] · W [N, K]ᵀ + bias + S [M, R] · B [N, R]ᵀ) · scale      W in 4 bits; the last three optional
//
// S = scaling · drop(x) · Aᵀ comes from csrc/lora/lora.h's shrink, or, where there is no dropout and few ranks, from the
// matvec launch itself. Sums are fp32 and the result is rounded once. Both launchers read the packed bytes as they lie:
// W's rows must begin at 16-byte addresses, so K is a multiple of 32.
#pragma once

#include "nf4/nf4_matmul.h"

namespace pyfastpeft {

// What is added to x · Wᵀ and multiplied into the sum before it is rounded; null pointers are left out.
struct Nf4Epilogue {
  const float* bias;   // [N]
  const float* scale;  // [N], (IA)³: multiplies everything
  const float* b;      // [N, R] with the strides below, and either s or a
  std::int64_t b_row_stride, b_rank_stride;
  std::int64_t R;
  const float* s;  // [M, R]
  const float* a;  // [R, K] row-major, 16-byte aligned: the launch makes S = a_scaling · x · Aᵀ itself; matvec alone
  float a_scaling;
};

constexpr std::int64_t kNf4RowMultiple = 32;  // of K
constexpr std::int64_t kNf4MatmulRows = 64;   // the most rows of x a launch of the tensor-core kernel takes
constexpr std::int64_t kNf4ShrinkRanks = 16;  // the most ranks of which the matvec launch makes S

// Whether the kernels' 32-bit row, column and block numbers suffice, the next ones a block looks at included.
inline bool nf4_fits_kernels(std::int64_t N, std::int64_t K) {
  return N <= (std::int64_t{1} << 30) && K <= (std::int64_t{1} << 30) &&
         (K == 0 || N <= (std::int64_t{1} << 37) / K);  // blocks of 32
}

// fp32 dot products of decoded fp32 weights, never rounded to 16 bits; every row's sum has the same order whatever M.
void nf4_matvec_cuda(const Nf4Matrix& w,
                     const void* x,  // [M, K] of `dtype`, 16-byte aligned
                     std::int64_t M, DType dtype, const Nf4Epilogue& epilogue,
                     void* y,  // [M, N] of `dtype`, overwritten
                     void* stream);

// Tensor cores (compute capability 8.0): each weight is scaled in fp32 and rounded once to `dtype`, bf16 or fp16, and so
// are S and B. A row
// of y does not depend on M or on its place: the sums are cut by N and K alone.
std::int64_t nf4_matmul_workspace(std::int64_t M, std::int64_t N, std::int64_t K);  // floats
void nf4_matmul_cuda(const Nf4Matrix& w,
                     const void* x,  // [M, K] of `dtype`, M up to kNf4MatmulRows, 16-byte aligned
                     std::int64_t M, DType dtype, const Nf4Epilogue& epilogue,
                     float* workspace,  // [nf4_matmul_workspace(M, N, K)]
                     void* y,           // [M, N] of `dtype`, overwritten
                     void* stream);

}  // namespace pyfastpeft
