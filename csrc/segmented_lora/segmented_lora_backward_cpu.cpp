// The backward of LoRA over a mixed batch: which pieces there are. The variants are segmented_lora_cpu*.cpp's.
//
// Two passes over the pieces, whatever the number of adapters: P and S, then dX, dA, dB and biases. Each piece sums what is
// its own in one order, so bits do not depend on the number of threads.
//
// Flops: 10·rows·R·D where K = N = D (P, S, dX, dA, dB 2·rows·R·D each). Bytes from memory: x and dY once for S and P and
// once for dA and dB where they do not stay in the cache, dX once, A and B twice, dA and dB once.
// 8 adapters of 128 rows, 2048x2048, R = 16, bf16: 0.34 GFLOP and 21 MB: at one Zen 4 core's 110 GFLOP/s of fp32 FMA a floor
// of 3.1 ms. 64 adapters of one row: 21 MFLOP, but 16.8 MB of A and B read and as much of dA and dB written, 34 MB or more
// by the reading of what is overwritten: at 20 GB/s 1.7 to 2.5 ms.
#include <algorithm>

#include "segmented_lora/segmented_lora_cpu.h"

namespace pyfastpeft {

void segmented_lora_backward_cpu(const void* dy, const void* x, void* dx, DType dtype, std::int64_t K, std::int64_t N,
                                 const SegmentedBatch& batch, const std::vector<SegmentedAdapter>& adapters,
                                 DType factors, const std::vector<SegmentedGradients>& gradients) {
  std::vector<SegmentedShrinkPiece> shrink, project;
  std::vector<SegmentedExpandPiece> spread;
  std::vector<SegmentedGradientPiece> gather;
  std::int64_t s = 0;
  for (std::size_t i = 0; i < adapters.size(); ++i) {
    const auto adapter = std::int32_t(i);
    const std::int64_t R = adapters[i].rank, first = batch.starts[i] * batch.rows,
                       last = R == 0 ? first : batch.starts[i + 1] * batch.rows;  // rank 0 adds nothing, no bias either
    const SegmentedGradients& wanted = gradients[i];
    const auto rows = [&](std::int64_t most, std::int64_t p) { return std::int32_t(std::min(most, last - p)); };
    if (wanted.b != nullptr)
      for (std::int64_t p = first; p < last; p += 4)
        for (std::int64_t r = 0; r < R; r += kSegmentedRanks)
          shrink.push_back({adapter, rows(4, p), p, r, s + (p - first) * R + r});
    if (wanted.a != nullptr || dx != nullptr)
      for (std::int64_t p = first; p < last; p += kSegmentedRows)
        for (std::int64_t r = 0; r < R; r += kSegmentedRanks)
          project.push_back({adapter, rows(kSegmentedRows, p), p, r, s + (p - first) * R + r});
    if (dx != nullptr && R > 0)
      for (std::int64_t p = first; p < last; p += kSegmentedRows)
        for (std::int64_t k = 0; k < K; k += kSegmentedColumns)
          spread.push_back({adapter, rows(kSegmentedRows, p), p, k, s + (p - first) * R});
    if (wanted.a != nullptr)
      for (std::int64_t k = 0; k < K; k += kSegmentedGroup)
        gather.push_back({adapter, false, first, last - first, k, s});
    if (wanted.b != nullptr || wanted.bias != nullptr)
      for (std::int64_t n = 0; n < N; n += kSegmentedGroup)
        gather.push_back({adapter, true, first, last - first, n, s});
    s += (last - first) * R;
  }
  std::vector<float> low(static_cast<std::size_t>(2 * s));
  SegmentedCpuArgs args{};
  args.x = x, args.dtype = dtype, args.K = K, args.N = N;
  args.batch = batch, args.adapters = adapters.data(), args.factors = factors;
  args.shrink = shrink.data(), args.expand = spread.data(), args.s = low.data();
  args.dy = dy, args.dx = dx, args.p = low.data() + s;
  args.project = project.data(), args.gradients = gradients.data(), args.gather = gather.data();
  const SegmentedVariants& run = segmented_variants();
  segmented_run(run.shrink, args, shrink.size(), 2 * s * K);
  segmented_run(run.project, args, project.size(), 2 * s * N);
  segmented_run(run.spread, args, spread.size(), 2 * s * K);
  segmented_run(run.gather, args, gather.size(), 2 * s * (K + N));
}

}  // namespace pyfastpeft
