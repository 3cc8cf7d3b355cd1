// S = scaling · x[row] · At for a tile of an adapter's rows, as device functions: the forward's segmented_shrink kernels, and the
// backward's, which make P = scaling · dY[row] · B as well. kAcross: the factor lies [columns, ranks], as B does, and not
// [ranks, columns]; eight ranks of a column are 32 bytes then, or 16, and a warp reads whole sectors either way.
#pragma once

#include "segmented_lora/segmented_lora_cuda.cuh"

namespace pyfastpeft {
namespace {

constexpr int kRanks = 16;  // of a block of the tensor-core kernel

struct SegmentedShrink {  // what a block makes of S
  const void* factor;
  int rank, first_rank;  // of the factor; of the block
  float scaling;
  std::int64_t begin, end;    // columns
  std::int64_t part, stride;  // of S
};

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

// The same of a column of the factor, whose rows are `stride` values long.
template <typename T, typename F>
__device__ __forceinline__ LoraEight load_eight_across(const F* __restrict__ from, std::int64_t stride, bool there) {
  LoraEight eight{{0, 0, 0, 0}};
  if (!there) return eight;
#pragma unroll
  for (int w = 0; w < 4; ++w)
    eight.words[w] = lora_pack<T>(as_f32(from[2 * w * stride]), as_f32(from[(2 * w + 1) * stride]));
  return eight;
}

// 32 rows x 16 ranks by tensor cores; `sums`: shared, kLoraWarps · kSegmentedTile · kRanks. Every thread of the block calls it.
template <bool kAcross, typename T, typename F>
__device__ __forceinline__ void segmented_shrink_mma(const T* __restrict__ x,         // [positions, D]
                                                     std::int64_t D,                  // a multiple of 8
                                                     const SegmentedCall& call,       //
                                                     const SegmentedTile& tile,       //
                                                     const SegmentedShrink& product,  //
                                                     float* __restrict__ s,           //
                                                     float* __restrict__ sums) {      //
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const bool working = product.first_rank < product.rank;  // the same for the whole block

  if (working) {
    const F* a = static_cast<const F*>(product.factor);
    std::int64_t rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i] = segmented_row(call, tile, 8 * i + g);
    float sum[2][2][4] = {};
#pragma unroll(kAcross ? 1 : 2)
    for (std::int64_t column = product.begin + warp * kWarp; column < product.end; column += kSegmentedStep) {
      const bool inside = column + 8 * t < product.end;
      LoraEight left[4], right[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int rank = product.first_rank + 8 * n + g;
        const bool there = inside && rank < product.rank;
        if constexpr (kAcross) {
          right[n] = load_eight_across<T, F>(a + (column + 8 * t) * product.rank + rank, product.rank, there);
        } else {
          right[n] = load_eight<T, F>(a + rank * D + column + 8 * t, there);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) left[i] = load_eight<T, T>(x + rows[i] * D + column + 8 * t, inside && rows[i] >= 0);
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
    for (int i = threadIdx.x; i < tile.count * kRanks; i += kLoraThreads) {
      float total = 0;
#pragma unroll
      for (int w = 0; w < kLoraWarps; ++w) total += sums[w * kSegmentedTile * kRanks + i];
      s[(product.part * call.positions + tile.position + i / kRanks) * product.stride + product.first_rank +
        i % kRanks] = total * product.scaling;
    }
  }
}

// Eight rows, a warp the rank first_rank + its number; any D.
template <bool kAcross, typename T, typename F>
__device__ __forceinline__ void segmented_shrink_fma(const T* __restrict__ x, std::int64_t D, const SegmentedCall& call,
                                                     const SegmentedTile& tile, const SegmentedShrink& product,
                                                     float* __restrict__ s) {
  const int lane = threadIdx.x % kWarp, rank = product.first_rank + int(threadIdx.x) / kWarp;
  if (rank >= product.rank) return;
  const F* a = static_cast<const F*>(product.factor) + (kAcross ? rank : rank * D);
  const std::int64_t step = kAcross ? product.rank : 1;
  std::int64_t rows[kSegmentedFew];
  float sum[kSegmentedFew] = {};
#pragma unroll
  for (int i = 0; i < kSegmentedFew; ++i) rows[i] = segmented_row(call, tile, i);
#pragma unroll 2
  for (std::int64_t column = product.begin + lane; column < product.end; column += kWarp) {
    const float right = as_f32(a[column * step]);
#pragma unroll
    for (int i = 0; i < kSegmentedFew; ++i)
      if (rows[i] >= 0) sum[i] = __fmaf_rn(as_f32(x[rows[i] * D + column]), right, sum[i]);
  }
#pragma unroll
  for (int i = 0; i < kSegmentedFew; ++i) {
    const float total = warp_sum(sum[i]);
    if (lane == 0 && i < tile.count)
      s[(product.part * call.positions + tile.position + i) * product.stride + rank] = total * product.scaling;
  }
}

}  // namespace
}  // namespace pyfastpeft
