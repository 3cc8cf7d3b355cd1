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
// input). Its random numbers cost a CPU more than the product they mask, so there they are drawn once, by lora_mask_cpu,
// a bit for each value; CUDA kernels draw them wherever they need them and store nothing.
// A result does not depend on the number of threads: each element is summed by one thread in one order.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pyfastpeft {

// An fp32 matrix [R, D] with any strides, so that B [N, R] serves as Bt [R, N] in place.
struct LoraFactor {
  const float* values;
  std::int64_t rank_stride, column_stride;  // in elements
};

// Which values of an [M, D] matrix are kept: bit d % 32 of bits[m · words + d / 32]; the others count as zero.
struct LoraMaskBits {
  const std::uint32_t* bits = nullptr;  // null: all
  std::int64_t words = 0;               // of a row: lora_mask_words(D)
  float scale = 1.0f;                   // of what is kept: 1/(1-p)

  const std::uint32_t* row(std::int64_t m) const { return bits == nullptr ? nullptr : bits + m * words; }
};

inline std::int64_t lora_mask_words(std::int64_t D) { return (D + 31) / 32; }

// keep iff the 32 random bits of the position are at least p·2^32; bits past D are 0
void lora_mask_cpu(std::uint64_t begin,   // flat position of the first value; the key is `seed`
                   std::int64_t M,        //
                   std::int64_t D,        //
                   double p,              // probability of zero, in [0, 1]
                   std::uint64_t seed,    // Philox key
                   std::uint32_t* bits);  // [M, lora_mask_words(D)], overwritten

void lora_shrink_cpu(const void* x,             // [M, D] of `dtype`, row-major
                     DType dtype,               //
                     std::int64_t M,            //
                     std::int64_t D,            //
                     const LoraFactor& a,       // [R, D]
                     std::int64_t R,            //
                     float alpha,               //
                     const LoraMaskBits& mask,  // of x
                     float* s);                 // [M, R], overwritten

void lora_expand_cpu(const float* s,            // [M, R]
                     std::int64_t M,            //
                     std::int64_t R,            //
                     const LoraFactor& c,       // [R, D]
                     std::int64_t D,            //
                     const LoraMaskBits& mask,  // of the product, before it is added
                     DType dtype,               //
                     void* y);                  // [M, D] of `dtype`, added to

void lora_accumulate_cpu(const float* p,                 // [M, R]
                         std::int64_t M,                 //
                         std::int64_t R,                 //
                         const void* x,                  // [M, D] of `dtype`
                         DType dtype,                    //
                         std::int64_t D,                 //
                         const LoraMaskBits& mask,       // of x
                         float* g,                       // [R, D], overwritten
                         std::int64_t g_rank_stride,     // in elements
                         std::int64_t g_column_stride);  //

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
