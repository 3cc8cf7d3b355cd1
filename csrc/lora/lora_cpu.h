// Between the launchers and their variants: a variant works on a range, on the calling thread.
#pragma once

#include "lora/lora.h"

namespace pyfastpeft {

struct LoraShrinkArgs {
  const void* x;
  DType dtype;
  std::int64_t D, R;
  const float* a;
  float alpha;
  LoraDropout drop;
  float* s;
};
struct LoraExpandArgs {
  const float* s;
  std::int64_t R, D;
  const float* c;
  LoraDropout drop;
  DType dtype;
  void* y;
};
struct LoraAccumulateArgs {
  const float* p;
  std::int64_t M, R, D;
  const void* x;
  DType dtype;
  LoraDropout drop;
  float* g;
};

using LoraShrinkRows = void(const LoraShrinkArgs& args, std::int64_t begin, std::int64_t end);             // rows of x
using LoraExpandRows = void(const LoraExpandArgs& args, std::int64_t begin, std::int64_t end);             // rows of y
using LoraAccumulateColumns = void(const LoraAccumulateArgs& args, std::int64_t begin, std::int64_t end);  // columns

LoraShrinkRows lora_shrink_rows_scalar;
LoraExpandRows lora_expand_rows_scalar;
LoraAccumulateColumns lora_accumulate_columns_scalar;
#if defined(__x86_64__)
LoraShrinkRows lora_shrink_rows_avx2, lora_shrink_rows_avx512;
LoraExpandRows lora_expand_rows_avx2, lora_expand_rows_avx512;
LoraAccumulateColumns lora_accumulate_columns_avx2, lora_accumulate_columns_avx512;
#endif

// Columns are handed to threads in groups of this many, so that where a vector begins does not depend on the split.
constexpr std::int64_t kLoraColumnGroup = 64;

}  // namespace pyfastpeft
