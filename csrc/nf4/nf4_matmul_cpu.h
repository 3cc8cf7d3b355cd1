// Between the matmul launchers and their variants: a variant works on a range of W's rows, on the calling thread.
#pragma once

#include "nf4/nf4_cpu.h"
#include "nf4/nf4_matmul.h"

namespace pyfastpeft {

struct Nf4MatvecArgs {
  const Nf4Matrix* w;
  const float* x;  // [M, stride], rows padded with zeros up to the stride
  std::int64_t M;
  std::int64_t stride;  // K rounded up to kNf4MatvecPad
  const float* bias;    // or null
  float* y;             // [M, N]
};
constexpr std::int64_t kNf4MatvecPad = 16;  // the widest vector

using Nf4MatvecRows = void(const Nf4MatvecArgs& args, std::int64_t begin, std::int64_t end);
Nf4MatvecRows nf4_matvec_rows_scalar;
#if defined(__x86_64__)
Nf4MatvecRows nf4_matvec_rows_avx2, nf4_matvec_rows_avx512;
#endif

// Writes whole blocks [first, first + blocks) of W to out, which starts at the first one's first value.
void nf4_decode_blocks(const Nf4Matrix& w, std::int64_t first, std::int64_t blocks, DType dtype, void* out);

}  // namespace pyfastpeft
