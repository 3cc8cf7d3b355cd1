// Launchers of the low-rank path: raw pointers, 64-bit sizes, no torch. The maths is pyfastpeft/reference/lora.py.
//
// Three products, each with a side of R (small) and fp32 throughout, are all that LoRA's forward and backward need
// beside the base's own matmul:
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

// ---- CUDA: the same three products on device memory -----------------------------------------------------------------
//
// The seed of a mask lies in device memory and is read by the kernel: nothing here waits for the stream, and all of it
// can be captured in a graph. Bits depend on the shapes alone, not on the GPU's size or the run: partial sums are split
// by M, D and R only and added in one order. Up to 32 rows a row of S does not depend on how many others there are
// either: linear_4bit's batch invariance asks for it. With `tensor_cores` (sm_80 and newer) 16-bit dtypes whose rows
// start at multiples of 16 bytes go to the tensor cores: the fp32 operands (A; S and C; P) are rounded to `dtype` once,
// as autocast would round them; sums are fp32, and alpha and the dropout's 1/(1-p) are applied to them. Everything else
// is computed from fp32 products throughout.

struct LoraDropoutCuda {
  double p;                  // as above
  const std::int64_t* seed;  // [1], device memory; not read when p is 0
};

// An fp32 matrix [R, D] (or, for a result, float*) with any strides, so that B [N, R] serves as Bt [R, N] in place.
struct LoraFactor {
  const float* values;
  std::int64_t rank_stride, column_stride;  // in elements
};

// Floats of workspace the launchers below need for these shapes, 0 for none.
std::int64_t lora_shrink_workspace(std::int64_t M, std::int64_t D, std::int64_t R);
std::int64_t lora_accumulate_workspace(std::int64_t M, std::int64_t D, std::int64_t R);

void lora_shrink_cuda(const void* x,                // [M, D] of `dtype`, row-major
                      DType dtype,                  //
                      std::int64_t M,               //
                      std::int64_t D,               //
                      const LoraFactor& a,          // [R, D]
                      std::int64_t R,               //
                      float alpha,                  //
                      const LoraDropoutCuda& drop,  // of x
                      bool tensor_cores,            //
                      float* workspace,             // [lora_shrink_workspace(M, D, R)]
                      float* s,                     // [M, R], overwritten
                      void* stream);

// y += drop(S·C), or y = bias + drop(S·C). The second, before the base product is added to y by a matmul with beta = 1,
// writes y where the first reads and writes it.
void lora_expand_cuda(const float* s,               // [M, R]
                      std::int64_t M,               //
                      std::int64_t R,               //
                      const LoraFactor& c,          // [R, D]
                      std::int64_t D,               //
                      const LoraDropoutCuda& drop,  // of the product, before it is added
                      bool tensor_cores,            //
                      bool add,                     // true: to what y holds; bias is null then
                      const float* bias,            // [D], or null
                      DType dtype,                  //
                      void* y,                      // [M, D] of `dtype`
                      void* stream);

void lora_accumulate_cuda(const float* p,                // [M, R]
                          std::int64_t M,                //
                          std::int64_t R,                //
                          const void* x,                 // [M, D] of `dtype`
                          DType dtype,                   //
                          std::int64_t D,                //
                          const LoraDropoutCuda& drop,   // of x
                          bool tensor_cores,             //
                          float* workspace,              // [lora_accumulate_workspace(M, D, R)]
                          float* g,                      // [R, D], overwritten
                          std::int64_t g_rank_stride,    // in elements
                          std::int64_t g_column_stride,  //
                          void* stream);

}  // namespace pyfastpeft
