// The low-rank products: launchers, what is packed for them, thread split, and the scalar variant.
#include <vector>

#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "common/subnormals.h"
#include "lora/lora_kernels.h"

namespace pyfastpeft {
namespace {

constexpr std::int64_t kGrainFlops = 1 << 16;  // below this a second thread costs more than it brings

std::int64_t grain(std::int64_t flops_per_item) { return kGrainFlops / (flops_per_item + 1) + 1; }

struct Variants {
  LoraMaskRows* mask;
  LoraShrinkRows* shrink;
  LoraExpandRows* expand;
  LoraAccumulateColumns* accumulate;
};

Variants variants() {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  if (isa >= CpuIsa::avx512)
    return {lora_mask_rows_avx512, lora_shrink_rows_avx512, lora_expand_rows_avx512, lora_accumulate_columns_avx512};
  if (isa >= CpuIsa::avx2)
    return {lora_mask_rows_avx2, lora_shrink_rows_avx2, lora_expand_rows_avx2, lora_accumulate_columns_avx2};
#endif
  return {lora_mask_rows_scalar, lora_shrink_rows_scalar, lora_expand_rows_scalar, lora_accumulate_columns_scalar};
}

#if defined(__x86_64__)
// Whether bf16 x is multiplied as it is. For few rows the factor's two parts cost more than they bring, and linear_4bit
// promises that a token's result does not depend on how many others there are.
bool in_bf16(DType dtype, std::int64_t M) {
  return dtype == DType::bf16 && M >= kLoraBf16LeastRows && cpu_isa() >= CpuIsa::avx512;
}
#endif

// floats that begin with a line of the cache
class Packed {
 public:
  float* reserve(std::int64_t count) {
    values_.resize(std::size_t(count) + kLine);
    const auto address = reinterpret_cast<std::uintptr_t>(values_.data());
    return values_.data() + (sizeof(float) * kLine - address % (sizeof(float) * kLine)) / sizeof(float) % kLine;
  }

 private:
  static constexpr std::int64_t kLine = 16;
  std::vector<float> values_;
};

}  // namespace

void lora_mask_rows_scalar(std::uint64_t first, std::int64_t D, double p, std::uint64_t seed, std::uint32_t* bits,
                           std::int64_t begin, std::int64_t end) {
  lora_mask_rows(first, D, p, seed, bits, begin, end);
}
void lora_shrink_rows_scalar(const LoraShrinkArgs& args, std::int64_t begin, std::int64_t end) {
  lora_shrink_rows<VecScalar>(args, begin, end);
}
void lora_expand_rows_scalar(const LoraExpandArgs& args, std::int64_t begin, std::int64_t end) {
  lora_expand_rows<VecScalar>(args, begin, end);
}
void lora_accumulate_columns_scalar(const LoraAccumulateArgs& args, std::int64_t begin, std::int64_t end) {
  lora_accumulate_columns<VecScalar>(args, begin, end);
}

void lora_mask_cpu(std::uint64_t begin, std::int64_t M, std::int64_t D, double p, std::uint64_t seed,
                   std::uint32_t* bits) {
  parallel_for(M, grain(32 * D),
               [&](std::int64_t first, std::int64_t last) { variants().mask(begin, D, p, seed, bits, first, last); });
}

void lora_shrink_cpu(const void* x, DType dtype, std::int64_t M, std::int64_t D, const LoraFactor& a, std::int64_t R,
                     float alpha, const LoraMaskBits& mask, float* s) {
  LoraShrinkArgs args{x, dtype, D, R, a.values, nullptr, alpha, mask, s};
  LoraShrinkRows* shrink = variants().shrink;
  std::int64_t rows = kLoraRows;
  Packed space;
#if defined(__x86_64__)
  if (in_bf16(dtype, M)) {
    float* packed = space.reserve(lora_packed_bytes_avx512(D, R) / 4);
    lora_pack_bf16_avx512(a, D, R, packed);
    args.packed_a = packed;
    shrink = lora_shrink_rows_bf16_avx512;
    rows = kLoraBf16Rows;
  }
#endif
  if (args.packed_a == nullptr && (a.column_stride != 1 || a.rank_stride != D)) {
    float* packed = space.reserve(R * D);
    for (std::int64_t d = 0; d < D; ++d)
      for (std::int64_t r = 0; r < R; ++r) packed[r * D + d] = a.values[r * a.rank_stride + d * a.column_stride];
    args.a = packed;
  }
  // whole groups of rows, so that the last, shorter group is the same whatever the number of threads
  const std::int64_t groups = (M + rows - 1) / rows;
  parallel_for(groups, grain(2 * D * R * rows), [&](std::int64_t begin, std::int64_t end) {
    const KeepSubnormals keep;
    shrink(args, begin * rows, std::min(M, end * rows));
  });
}

void lora_expand_cpu(const float* s, std::int64_t M, std::int64_t R, const LoraFactor& c, std::int64_t D,
                     const LoraMaskBits& mask, DType dtype, void* y) {
  const std::int64_t groups = (D + kLoraColumnGroup - 1) / kLoraColumnGroup;
  Packed space;
  float* packed = space.reserve(groups * R * kLoraColumnGroup);
  for (std::int64_t d = 0; d < D; ++d) {
    float* to = packed + d / kLoraColumnGroup * R * kLoraColumnGroup + d % kLoraColumnGroup;
    for (std::int64_t r = 0; r < R; ++r) to[r * kLoraColumnGroup] = c.values[r * c.rank_stride + d * c.column_stride];
  }
  const LoraExpandArgs args{s, R, D, packed, mask, dtype, y};
  parallel_for(M, grain(2 * D * R), [&](std::int64_t begin, std::int64_t end) {
    const KeepSubnormals keep;
    variants().expand(args, begin, end);
  });
}

void lora_accumulate_cpu(const float* p, std::int64_t M, std::int64_t R, const void* x, DType dtype, std::int64_t D,
                         const LoraMaskBits& mask, float* g, std::int64_t g_rank_stride, std::int64_t g_column_stride) {
  LoraAccumulateArgs args{p, M, R, D, nullptr, x, dtype, mask, g, g_rank_stride, g_column_stride};
  LoraAccumulateColumns* accumulate = variants().accumulate;
  Packed space;
#if defined(__x86_64__)
  if (in_bf16(dtype, M)) {
    float* packed = space.reserve(lora_packed_rows_bytes_avx512(M, R) / 4);
    lora_pack_rows_bf16_avx512(p, M, R, packed);
    args.packed_p = packed;
    accumulate = lora_accumulate_columns_bf16_avx512;
  }
#endif
  const std::int64_t groups = (D + kLoraColumnGroup - 1) / kLoraColumnGroup;
  parallel_for(groups, grain(2 * M * R * kLoraColumnGroup), [&](std::int64_t begin, std::int64_t end) {
    const KeepSubnormals keep;
    accumulate(args, begin * kLoraColumnGroup, std::min(D, end * kLoraColumnGroup));
  });
}

}  // namespace pyfastpeft
