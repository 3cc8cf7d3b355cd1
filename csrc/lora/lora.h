// Launchers of the low-rank path: raw pointers, 64-bit sizes, no torch. The maths is pyfastpeft/reference/lora.py.
//
// Three products, each with a side of R (small) and fp32 throughout, are all that LoRA's forward and backward need beside
// the base's own matmul:
//
//   shrink       S [M, R]  = alpha · drop(X) [M, D] · A [R, D]ᵀ      S = s·x·Aᵀ,  dS = s·dY·B
//   expand       Y [M, D] += drop'(S [M, R] · C [R, D])              y += S·Bᵀ,   dX += (dS·A) ⊙ mask
//   accumulate   G [R, D]  = P [M, R]ᵀ · drop(X) [M, D]              dA = dSᵀ·x,  dBᵀ = Sᵀ·dY
//
// Nothing of the size of X or Y is allocated. The dropout mask is a function of (seed, flat position in the [M, D]
// input), so it is recomputed wherever it is needed and stored nowhere.
// A result does not depend on the number of threads: each element is summed by one thread in one order.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pyfastpeft {

struct LoraDropout {
  double p;            // probability of zero, in [0, 1]; 0: no dropout and the seed is not read
  std::uint64_t seed;  // Philox key
};

void lora_shrink_cpu(const void* x,            // [M, D] of `dtype`, row-major
                     DType dtype,              //
                     std::int64_t M,           //
                     std::int64_t D,           //
                     const float* a,           // [R, D]
                     std::int64_t R,           //
                     float alpha,              //
                     const LoraDropout& drop,  // of x
                     float* s);                // [M, R], overwritten

void lora_expand_cpu(const float* s,           // [M, R]
                     std::int64_t M,           //
                     std::int64_t R,           //
                     const float* c,           // [R, D]
                     std::int64_t D,           //
                     const LoraDropout& drop,  // of the product, before it is added
                     DType dtype,              //
                     void* y);                 // [M, D] of `dtype`, added to

void lora_accumulate_cpu(const float* p,           // [M, R]
                         std::int64_t M,           //
                         std::int64_t R,           //
                         const void* x,            // [M, D] of `dtype`
                         DType dtype,              //
                         std::int64_t D,           //
                         const LoraDropout& drop,  // of x
                         float* g);                // [R, D], overwritten

// out[i] = drop(x)[begin + i] for i in [0, count): the mask itself, for tests and for the reference.
void lora_dropout_cpu(const float* x, std::int64_t begin, std::int64_t count, const LoraDropout& drop, float* out);

}  // namespace pyfastpeft
