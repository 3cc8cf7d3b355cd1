// The low-rank products: launchers, thread split, and the scalar variant.
#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "common/subnormals.h"
#include "lora/lora_kernels.h"

namespace pyfastpeft {
namespace {

constexpr std::int64_t kGrainFlops = 1 << 16;  // below this a second thread costs more than it brings

std::int64_t grain(std::int64_t flops_per_item) { return kGrainFlops / (flops_per_item + 1) + 1; }

struct Variants {
  LoraShrinkRows* shrink;
  LoraExpandRows* expand;
  LoraAccumulateColumns* accumulate;
};

Variants variants() {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  if (isa >= CpuIsa::avx512) return {lora_shrink_rows_avx512, lora_expand_rows_avx512, lora_accumulate_columns_avx512};
  if (isa >= CpuIsa::avx2) return {lora_shrink_rows_avx2, lora_expand_rows_avx2, lora_accumulate_columns_avx2};
#endif
  return {lora_shrink_rows_scalar, lora_expand_rows_scalar, lora_accumulate_columns_scalar};
}

}  // namespace

void lora_shrink_rows_scalar(const LoraShrinkArgs& args, std::int64_t begin, std::int64_t end) {
  lora_shrink_rows<VecScalar>(args, begin, end);
}
void lora_expand_rows_scalar(const LoraExpandArgs& args, std::int64_t begin, std::int64_t end) {
  lora_expand_rows<VecScalar>(args, begin, end);
}
void lora_accumulate_columns_scalar(const LoraAccumulateArgs& args, std::int64_t begin, std::int64_t end) {
  lora_accumulate_columns<VecScalar>(args, begin, end);
}

void lora_shrink_cpu(const void* x, DType dtype, std::int64_t M, std::int64_t D, const float* a, std::int64_t R,
                     float alpha, const LoraDropout& drop, float* s) {
  const LoraShrinkArgs args{x, dtype, D, R, a, alpha, drop, s};
  // whole groups of rows, so that the last, shorter group is the same whatever the number of threads
  const std::int64_t groups = (M + kLoraRows - 1) / kLoraRows;
  parallel_for(groups, grain(2 * D * R * kLoraRows), [&](std::int64_t begin, std::int64_t end) {
    const KeepSubnormals keep;
    variants().shrink(args, begin * kLoraRows, std::min(M, end * kLoraRows));
  });
}

void lora_expand_cpu(const float* s, std::int64_t M, std::int64_t R, const float* c, std::int64_t D,
                     const LoraDropout& drop, DType dtype, void* y) {
  const LoraExpandArgs args{s, R, D, c, drop, dtype, y};
  parallel_for(M, grain(2 * D * R), [&](std::int64_t begin, std::int64_t end) {
    const KeepSubnormals keep;
    variants().expand(args, begin, end);
  });
}

void lora_accumulate_cpu(const float* p, std::int64_t M, std::int64_t R, const void* x, DType dtype, std::int64_t D,
                         const LoraDropout& drop, float* g) {
  const LoraAccumulateArgs args{p, M, R, D, x, dtype, drop, g};
  const std::int64_t groups = (D + kLoraColumnGroup - 1) / kLoraColumnGroup;
  parallel_for(groups, grain(2 * M * R * kLoraColumnGroup), [&](std::int64_t begin, std::int64_t end) {
    const KeepSubnormals keep;
    variants().accumulate(args, begin * kLoraColumnGroup, std::min(D, end * kLoraColumnGroup));
  });
}

void lora_dropout_cpu(const float* x, std::int64_t begin, std::int64_t count, const LoraDropout& drop, float* out) {
  std::copy_n(x, count, out);
  if (drop.p > 0.0) lora_drop_values(out, begin, count, drop);
}

}  // namespace pyfastpeft
