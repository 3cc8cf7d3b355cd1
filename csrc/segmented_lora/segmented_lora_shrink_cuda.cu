// S [parts, positions, stride] = scaling_i · x[row] · A_iᵀ for the rows of every adapter i of a mixed batch, in one launch.
//
// Tensor-core kernel (bf16, fp16). A block has up to 32 rows of one adapter, 16 of its ranks (grid y) and a piece of K (grid
// z); its eight warps take every eighth 32 columns. Both operands go from global memory straight into the registers that
// feed mma, since a dot product may take its columns in any order: a lane loads eight neighbours of a row, columns 8t to
// 8t+7, and these serve two mma, whose "columns t, t+1, t+8, t+9" they are called. A is read once for the tile's rows, in
// its own order, eight ranks by 128 bytes a load. The warps' sums meet in shared memory, in order; pieces of K are summed
// by the expand kernel, which reads S anyway. A decoding step has one row a sample: the mma's other rows are idle, and it is
// A's bytes that count.
//
// Bytes: 4·R·K of A per adapter and 32 rows, 2·K a row of x per 16 ranks. Flops 2·rows·K·R.
// Decode, 64 samples of 64 adapters, K = 4096, R = 16, bf16, A fp32: 16.8 MB of A and 0.5 MB of x, 4.0 µs at 4.3 TB/s;
// 66 blocks in the grid and 4 pieces of K: 264 blocks, each with 16 KB a turn of two steps in flight; predicted 6.5 µs.
// Prefill, 8 adapters of 512 rows: 34 MB of x, and A 16 times a sample, 34 MB from L2: 8 µs, predicted 14 µs.
// Shared memory 16 KB; 256 threads of 96 to 126 registers, two blocks on an SM.
//
// FMA kernel (fp32; 16-bit dtypes on sm_75, and where rows or factors do not lie at multiples of 16 bytes): 8 rows x 8
// ranks a block, a warp one rank, the lanes side by side along K.
#include "segmented_lora/segmented_lora_shrink_cuda.cuh"

namespace pyfastpeft {
namespace {

// What block (x, y, z) makes: ranks from y · `ranks` on, piece z of K.
__device__ __forceinline__ SegmentedShrink product_of_block(const SegmentedTable& table, const SegmentedTile& tile,
                                                            int ranks, std::int64_t K, std::int64_t columns,
                                                            std::int64_t stride) {
  if (tile.adapter < 0) return {nullptr, 0, 0, 0, 0, 0, 0, 0};
  const SegmentedAdapter& adapter = table.adapters[tile.adapter];
  const std::int64_t begin = std::int64_t(blockIdx.z) * columns;
  return {adapter.a,
          adapter.rank,
          int(blockIdx.y) * ranks,
          adapter.scaling,
          begin,
          begin + columns < K ? begin + columns : K,
          std::int64_t(blockIdx.z),
          stride};
}

template <typename T, typename F>
__global__ void __launch_bounds__(kLoraThreads, 2)
    segmented_shrink_mma_kernel(const T* __restrict__ x,     // [positions, K], K a multiple of 8
                                std::int64_t K,              //
                                const SegmentedCall call,    //
                                const SegmentedTable table,  //
                                std::int64_t columns,        // of a piece of K, a multiple of 256
                                std::int64_t stride,         // of S
                                float* __restrict__ s) {     // [grid z, positions, stride]
  KSHARED(float, sums, [kLoraWarps * kSegmentedTile * kRanks]);
  const SegmentedTile tile = segmented_tile<kSegmentedTile>(call, blockIdx.x);
  segmented_shrink_mma<false, T, F>(x, K, call, tile, product_of_block(table, tile, kRanks, K, columns, stride), s,
                                    sums);
}

template <typename T, typename F>
__global__ void __launch_bounds__(kLoraThreads) segmented_shrink_fma_kernel(const T* __restrict__ x,  // as above, any K
                                                                            std::int64_t K,           //
                                                                            const SegmentedCall call,    //
                                                                            const SegmentedTable table,  //
                                                                            std::int64_t columns,        //
                                                                            std::int64_t stride,         //
                                                                            float* __restrict__ s) {     //
  const SegmentedTile tile = segmented_tile<kSegmentedFew>(call, blockIdx.x);
  segmented_shrink_fma<false, T, F>(x, K, call, tile, product_of_block(table, tile, kLoraWarps, K, columns, stride), s);
}

}  // namespace

SegmentedPlan segmented_lora_plan(std::int64_t positions, std::int64_t K, std::int64_t max_rank,
                                  std::int64_t adapters) {
  constexpr std::int64_t kMostParts = 8;  // of which each expanding block adds the S together
  const std::int64_t sixteens = lora_ceil_div(max_rank, kRanks), steps = lora_ceil_div(K, kSegmentedStep);
  const std::int64_t blocks = segmented_tiles(positions, adapters, kSegmentedTile) * sixteens;
  const LoraSplit split = lora_split(steps, std::max(blocks, kLoraBlocks / kMostParts));
  return {kRanks * sixteens, split.parts, split.steps};
}

template <typename T, typename F>
cudaError_t segmented_shrink_launch(const SegmentedLaunch& l, bool mma) {
  const std::int64_t tiles = segmented_tiles(l.call.positions, l.call.adapters, mma ? kSegmentedTile : kSegmentedFew);
  const auto parts = unsigned(l.plan.parts);
  const std::int64_t columns = l.plan.steps * kSegmentedStep;
  if constexpr (sizeof(T) == 2) {
    if (mma)
      return KLAUNCH((segmented_shrink_mma_kernel<T, F>),
                     dim3(unsigned(tiles), unsigned(l.plan.stride / kRanks), parts), kLoraThreads, 0, l.stream,
                     static_cast<const T*>(l.x), l.K, l.call, l.table, columns, l.plan.stride, l.s);
  }
  return KLAUNCH((segmented_shrink_fma_kernel<T, F>),
                 dim3(unsigned(tiles), unsigned(lora_ceil_div(l.max_rank, kLoraWarps)), parts), kLoraThreads, 0,
                 l.stream, static_cast<const T*>(l.x), l.K, l.call, l.table, columns, l.plan.stride, l.s);
}

template cudaError_t segmented_shrink_launch<float, float>(const SegmentedLaunch&, bool);
template cudaError_t segmented_shrink_launch<__half, float>(const SegmentedLaunch&, bool);
template cudaError_t segmented_shrink_launch<__half, __half>(const SegmentedLaunch&, bool);
template cudaError_t segmented_shrink_launch<__nv_bfloat16, float>(const SegmentedLaunch&, bool);
template cudaError_t segmented_shrink_launch<__nv_bfloat16, __nv_bfloat16>(const SegmentedLaunch&, bool);

}  // namespace pyfastpeft
