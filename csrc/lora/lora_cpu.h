// Between the launchers and their variants: a variant works on a range, on the calling thread.
#pragma once

#include "lora/lora.h"

namespace pyfastpeft {

// Columns are handed to threads and packed in groups of this many, so that where a vector begins depends on no split.
constexpr std::int64_t kLoraColumnGroup = 64;

struct LoraShrinkArgs {
  const void* x;
  DType dtype;
  std::int64_t D, R;
  const float* a;        // [R, D], for the fp32 variants
  const void* packed_a;  // as lora_pack_bf16_avx512 writes it, for the bf16 one
  float alpha;
  LoraMaskBits mask;
  float* s;
};
struct LoraExpandArgs {
  const float* s;
  std::int64_t R, D;
  const float* packed_c;  // [columns / 64][R][64], zeros past D
  LoraMaskBits mask;
  DType dtype;
  void* y;
};
struct LoraAccumulateArgs {
  const float* p;
  std::int64_t M, R, D;
  const void* packed_p;  // as lora_pack_rows_bf16_avx512 writes it, for the bf16 variant
  const void* x;
  DType dtype;
  LoraMaskBits mask;
  float* g;
  std::int64_t g_rank_stride, g_column_stride;
};

using LoraMaskRows = void(std::uint64_t first, std::int64_t D, double p, std::uint64_t seed, std::uint32_t* bits,
                          std::int64_t begin, std::int64_t end);                                           // rows
using LoraShrinkRows = void(const LoraShrinkArgs& args, std::int64_t begin, std::int64_t end);             // rows of x
using LoraExpandRows = void(const LoraExpandArgs& args, std::int64_t begin, std::int64_t end);             // rows of y
using LoraAccumulateColumns = void(const LoraAccumulateArgs& args, std::int64_t begin, std::int64_t end);  // columns

LoraMaskRows lora_mask_rows_scalar;
LoraShrinkRows lora_shrink_rows_scalar;
LoraExpandRows lora_expand_rows_scalar;
LoraAccumulateColumns lora_accumulate_columns_scalar;
#if defined(__x86_64__)
LoraMaskRows lora_mask_rows_avx2, lora_mask_rows_avx512;
LoraShrinkRows lora_shrink_rows_avx2, lora_shrink_rows_avx512;
LoraExpandRows lora_expand_rows_avx2, lora_expand_rows_avx512;
LoraAccumulateColumns lora_accumulate_columns_avx2, lora_accumulate_columns_avx512;

// bf16 x multiplied as it is (lora_cpu_bf16_avx512.cpp), with an fp32 factor in two bf16 parts.
LoraShrinkRows lora_shrink_rows_bf16_avx512;
LoraAccumulateColumns lora_accumulate_columns_bf16_avx512;
constexpr std::int64_t kLoraBf16Rows = 12;       // rows of x in a group of the shrink
constexpr std::int64_t kLoraBf16LeastRows = 64;  // below, x is widened to fp32
std::int64_t lora_packed_bytes_avx512(std::int64_t D, std::int64_t R);
void lora_pack_bf16_avx512(const LoraFactor& a, std::int64_t D, std::int64_t R, void* packed);
std::int64_t lora_packed_rows_bytes_avx512(std::int64_t M, std::int64_t R);
void lora_pack_rows_bf16_avx512(const float* p, std::int64_t M, std::int64_t R, void* packed);
#endif

}  // namespace pyfastpeft
