// Launchers of the 4-bit matmul on the CPU: raw pointers, 64-bit sizes, no torch.
//
// y [M, N] = x [M, K] · W [N, K]ᵀ, W in 4 bits. Few rows of x: nf4_matvec_cpu, straight from the packed bytes. Many:
// the caller walks W in tiles of bounded size, nf4_dequantize_tile_cpu writes one, and a dense matmul takes it from the
// cache. The whole of W is never held.
#pragma once

#include "nf4/nf4.h"

namespace pyfastpeft {

struct Nf4Matrix {
  const std::uint8_t* packed;  // [packed_bytes(N·K)]
  Nf4Absmax absmax;            // of block_count(N·K, blocksize) blocks; blocks run over the flat matrix
  std::int64_t N, K;
  std::int64_t blocksize;
  QuantType type;
};

// out [rows, cols] = W[row : row + rows, col : col + cols] in out_dtype: the values nf4_dequantize_cpu writes.
void nf4_dequantize_tile_cpu(const Nf4Matrix& w, std::int64_t row, std::int64_t rows, std::int64_t col,
                             std::int64_t cols, DType out_dtype, void* out);

// The low-rank path's part of y: S [M, R] = scaling · drop(x) · Aᵀ, made before (lora_shrink_cpu), and B.
struct Nf4LowRank {
  const float* s;  // [M, R]
  const float* b;  // [N, R]
  std::int64_t R;  // 0: none
};

// y = x·Wᵀ + S·Bᵀ + bias: each output is one fp32 sum, rounded once, added up in one order whatever M and the number of
// threads: a token's result does not depend on its batch. Weights are scaled in fp32; where x is bf16 and the processor
// multiplies bf16 (AVX-512 BF16) they are then rounded to it once, as nf4_dequantize_cpu would, else they stay fp32.
void nf4_matvec_cpu(const Nf4Matrix& w,
                    const void* x,          // [M, K] of `dtype`, row-major
                    std::int64_t M,         //
                    const float* bias,      // [N] or null
                    const Nf4LowRank& low,  //
                    DType dtype,            // of x and y
                    void* y);               // [M, N], overwritten

// The same for many rows of x in bf16, where the processor multiplies it (AVX-512 BF16, AMX): W is decoded once for
// hundreds of tokens. Weights are scaled in fp32 and rounded to bf16 once, and so are S and B.
bool nf4_panel_available();
void nf4_panel_cpu(const Nf4Matrix& w,
                   const bf16* x,  // [M, K] row-major
                   std::int64_t M,
                   const float* bias,      // [N] or null
                   const Nf4LowRank& low,  //
                   bf16* y);               // [M, N], overwritten

// The low-rank path's part of dX: dS [M, R] = scaling · dY · B, made before (lora_shrink_cpu), and A.
struct Nf4BackwardLowRank {
  const float* ds;  // [M, R]
  const float* a;   // [R, K]
  std::int64_t R;   // 0: none
};

// dX = dY·W + dS·A for any number of rows: each output is one fp32 sum, rounded once, added up in one order whatever M and
// the number of threads. Where dY is bf16 and the processor multiplies it (AVX-512 BF16, AMX), W (scaled in fp32), dS and A
// are rounded to bf16 once; else all of it stays fp32. Scratch: 4 MiB of packed dY, for each thread 290 KiB. (S, which dB
// takes, is not read here: lora_accumulate_cpu has it as an argument.)
void nf4_backward_cpu(const Nf4Matrix& w,
                      const void* dy,  // [M, N] of `dtype`, row-major
                      std::int64_t M, const Nf4BackwardLowRank& low,
                      DType dtype,  // of dy and dx
                      void* dx);    // [M, K], overwritten

}  // namespace pyfastpeft
