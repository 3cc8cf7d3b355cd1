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
#include "segmented_lora/segmented_lora_cuda.cuh"

namespace pyfastpeft {
namespace {

constexpr int kRanks = 16;  // of a block of the tensor-core kernel

// Eight neighbours of a row of the factor, rounded to T; zeros where there are none.
template <typename T, typename F>
__device__ __forceinline__ LoraEight load_eight(const F* __restrict__ from, bool there) {
  LoraEight eight{{0, 0, 0, 0}};
  if (!there) return eight;
  if constexpr (sizeof(F) == 2) {
    eight = *reinterpret_cast<const LoraEight*>(from);
  } else {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float4 four = *reinterpret_cast<const float4*>(from + 4 * c);
      eight.words[2 * c] = lora_pack<T>(four.x, four.y);
      eight.words[2 * c + 1] = lora_pack<T>(four.z, four.w);
    }
  }
  return eight;
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
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const SegmentedTile tile = segmented_tile<kSegmentedTile>(call, blockIdx.x);
  const int first_rank = int(blockIdx.y) * kRanks;
  const int R = tile.adapter < 0 ? 0 : table.adapters[tile.adapter].rank;
  const bool working = first_rank < R;  // the same for the whole block

  if (working) {
    const F* a = static_cast<const F*>(table.adapters[tile.adapter].a);
    const std::int64_t begin = std::int64_t(blockIdx.z) * columns;
    const std::int64_t end = begin + columns < K ? begin + columns : K;
    std::int64_t rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i] = segmented_row(call, tile, 8 * i + g);
    float sum[2][2][4] = {};
#pragma unroll 2
    for (std::int64_t column = begin + warp * kWarp; column < end; column += kSegmentedStep) {
      const bool inside = column + 8 * t < end;
      LoraEight left[4], right[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int rank = first_rank + 8 * n + g;
        right[n] = load_eight<T, F>(a + rank * K + column + 8 * t, inside && rank < R);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) left[i] = load_eight<T, T>(x + rows[i] * K + column + 8 * t, inside && rows[i] >= 0);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const LoraEight &low = left[2 * m], &high = left[2 * m + 1];  // rows g and g + 8 of the mma tile
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int k = 0; k < 2; ++k)
            kp::mma_m16n8k16<T>(sum[m][n],
                                {low.words[2 * k], high.words[2 * k], low.words[2 * k + 1], high.words[2 * k + 1]},
                                {right[n].words[2 * k], right[n].words[2 * k + 1]});
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(&sums[(warp * kSegmentedTile + 16 * m + 8 * half + g) * kRanks + 8 * n + 2 * t]) =
              make_float2(sum[m][n][2 * half], sum[m][n][2 * half + 1]);
  }
  __syncthreads();
  if (working) {
    const float scaling = table.adapters[tile.adapter].scaling;
    for (int i = threadIdx.x; i < tile.count * kRanks; i += kLoraThreads) {
      float total = 0;
#pragma unroll
      for (int w = 0; w < kLoraWarps; ++w) total += sums[w * kSegmentedTile * kRanks + i];
      s[(std::int64_t(blockIdx.z) * call.positions + tile.position + i / kRanks) * stride + first_rank + i % kRanks] =
          total * scaling;
    }
  }
}

template <typename T, typename F>
__global__ void __launch_bounds__(kLoraThreads) segmented_shrink_fma_kernel(const T* __restrict__ x,  // as above, any K
                                                                            std::int64_t K,           //
                                                                            const SegmentedCall call,    //
                                                                            const SegmentedTable table,  //
                                                                            std::int64_t columns,        //
                                                                            std::int64_t stride,         //
                                                                            float* __restrict__ s) {     //
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const SegmentedTile tile = segmented_tile<kSegmentedFew>(call, blockIdx.x);
  const int rank = int(blockIdx.y) * kLoraWarps + warp;
  const int R = tile.adapter < 0 ? 0 : table.adapters[tile.adapter].rank;
  if (rank >= R) return;
  const F* a = static_cast<const F*>(table.adapters[tile.adapter].a) + rank * K;
  const std::int64_t begin = std::int64_t(blockIdx.z) * columns;
  const std::int64_t end = begin + columns < K ? begin + columns : K;
  std::int64_t rows[kSegmentedFew];
  float sum[kSegmentedFew] = {};
#pragma unroll
  for (int i = 0; i < kSegmentedFew; ++i) rows[i] = segmented_row(call, tile, i);
#pragma unroll 2
  for (std::int64_t column = begin + lane; column < end; column += kWarp) {
    const float right = as_f32(a[column]);
#pragma unroll
    for (int i = 0; i < kSegmentedFew; ++i)
      if (rows[i] >= 0) sum[i] = __fmaf_rn(as_f32(x[rows[i] * K + column]), right, sum[i]);
  }
  const float scaling = table.adapters[tile.adapter].scaling;
#pragma unroll
  for (int i = 0; i < kSegmentedFew; ++i) {
    const float total = warp_sum(sum[i]);
    if (lane == 0 && i < tile.count)
      s[(std::int64_t(blockIdx.z) * call.positions + tile.position + i) * stride + rank] = total * scaling;
  }
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
