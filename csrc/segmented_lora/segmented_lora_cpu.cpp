// LoRA over a mixed batch: launcher, thread split, and the scalar variant, which is the specification of the others.
#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "common/subnormals.h"
#include "segmented_lora/segmented_lora_backward_kernels.h"
#include "segmented_lora/segmented_lora_kernels.h"

namespace pyfastpeft {
namespace {

constexpr std::int64_t kGrainFlops = 1 << 16;  // below this a second thread costs more than it brings

}  // namespace

const SegmentedVariants segmented_scalar = {segmented_shrink<VecScalar>, segmented_expand<VecScalar>,
                                            segmented_project<VecScalar>, segmented_spread<VecScalar>,
                                            segmented_gather<VecScalar>};

const SegmentedVariants& segmented_variants() {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  if (isa >= CpuIsa::avx512) return segmented_avx512;
  if (isa >= CpuIsa::avx2) return segmented_avx2;
#endif
  return segmented_scalar;
}

void segmented_run(SegmentedPieces* pieces, const SegmentedCpuArgs& args, std::size_t count, std::int64_t flops) {
  const auto n = std::int64_t(count);
  parallel_for(n, kGrainFlops * n / (flops + 1) + 1, [&](std::int64_t begin, std::int64_t end) {
    const KeepSubnormals keep;
    pieces(args, begin, end);
  });
}

void segmented_lora_cpu(const void* x, void* y, DType dtype, std::int64_t K, std::int64_t N,
                        const SegmentedBatch& batch, const std::vector<SegmentedAdapter>& adapters, DType factors) {
  // The pieces do not depend on the number of threads, and each sums what is its own in one order.
  std::vector<SegmentedShrinkPiece> shrink;
  std::vector<SegmentedExpandPiece> expand;
  std::int64_t s = 0;
  for (std::size_t i = 0; i < adapters.size(); ++i) {
    const std::int64_t R = adapters[i].rank, first = batch.starts[i] * batch.rows,
                       last = batch.starts[i + 1] * batch.rows;
    if (R == 0) continue;
    for (std::int64_t p = first; p < last; p += kLoraRows)
      for (std::int64_t r = 0; r < R; r += kSegmentedRanks)
        shrink.push_back({std::int32_t(i), std::int32_t(std::min<std::int64_t>(kLoraRows, last - p)), p, r,
                          s + (p - first) * R + r});
    for (std::int64_t p = first; p < last; p += kSegmentedRows)
      for (std::int64_t n = 0; n < N; n += kSegmentedColumns)
        expand.push_back(
            {std::int32_t(i), std::int32_t(std::min(kSegmentedRows, last - p)), p, n, s + (p - first) * R});
    s += (last - first) * R;
  }
  std::vector<float> low(static_cast<std::size_t>(s));
  SegmentedCpuArgs args{};
  args.x = x, args.y = y, args.dtype = dtype, args.K = K, args.N = N;
  args.batch = batch, args.adapters = adapters.data(), args.factors = factors;
  args.shrink = shrink.data(), args.expand = expand.data(), args.s = low.data();
  segmented_run(segmented_variants().shrink, args, shrink.size(), 2 * s * K);
  segmented_run(segmented_variants().expand, args, expand.size(), 2 * s * N);
}

}  // namespace pyfastpeft
