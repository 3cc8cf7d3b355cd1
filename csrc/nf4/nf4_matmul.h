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

// Each output is one fp32 dot product of decoded fp32 weights (scaled, never rounded to 16 bits), plus bias, rounded
// once. Each is summed in one order whatever M and the number of threads: a token's result does not depend on its batch.
void nf4_matvec_cpu(const Nf4Matrix& w,
                    const void* x,      // [M, K] of `dtype`, row-major
                    std::int64_t M,     // meant for small M: W is decoded once, in fp32
                    const float* bias,  // [N] or null
                    DType dtype,        // of x and y
                    void* y);           // [M, N], overwritten

}  // namespace pyfastpeft
