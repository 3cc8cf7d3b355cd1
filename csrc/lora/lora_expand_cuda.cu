// Y [M, D] += drop(S [M, R] · C [R, D]), or Y = bias + drop(S · C), on the GPU: one pass over Y.
//
// Tensor-core kernel (bf16, fp16). A warp owns 32 columns of Y and keeps its part of C in registers (up to 64 ranks;
// more are fetched again for every 32 rows); a block is eight such warps, 256 columns, and walks down Y by 32 rows,
// with those rows of S rounded to 16 bits in shared memory. The columns of an mma are ours to name: column c of tile j
// is column 8·(c/2) + 2j + c%2, so that the sums of a lane in four tiles are eight neighbours of a row, one 16-byte
// store, 64 bytes a row and warp, every sector whole; and eight neighbours are two Philox counters.
//
// Bytes: 2·M·D, and again as many read with `add`; 4·M·R of S per 256 columns and 4·R·D of C per block row, from L2.
// Flops 2·M·D·R. M = 4096, D = 14336, R = 16, bf16: written only, 117 MB, 27 µs at 4.3 TB/s, 15 MB of S from L2:
// predicted 32 µs; with `add` 235 MB, 55 µs, predicted 62 µs. A matmul of cuBLAS with beta = 1 would move what `add`
// moves, and needs S and C converted first. So the layers call this first and let the base's matmul add to it
// (beta = 1): its reading of Y hides behind 616 µs of tensor-core work.
// Shared memory 1, 3 or 5 KB; 114, 154 or 168 registers for R to 16, 32, 64 and more: two blocks on an SM, one
// from R = 17.
//
// FMA kernel (fp32; 16-bit dtypes on sm_75, and where rows do not start at multiples of 16 bytes): a thread has four
// columns and four rows, C from L1, S by broadcast.
#include "lora/lora_cuda.cuh"

namespace pyfastpeft {
namespace {

constexpr int kRows = 32;         // of a turn
constexpr int kWarpColumns = 32;  // four mma tiles
constexpr int kColumns = kLoraWarps * kWarpColumns;
constexpr char kOp[] = "lora_expand";

// Drops, adds and writes kValues neighbours of a row from column `first` on: kVectors, 16 bytes at a time.
template <bool kVectors, int kValues, typename T, bool kDrop, bool kAdd>
__device__ __forceinline__ void finish(float (&values)[kValues], const float (&bias)[kValues], const LoraMask& mask,
                                       std::uint64_t key, std::int64_t row, std::int64_t first, std::int64_t D,
                                       T* __restrict__ y) {
  if (first >= D) return;
  constexpr int kChunk = Chunk<T>::kValues;
  constexpr int kAtOnce = kVectors ? kChunk : 1;
  static_assert(!kVectors || kValues % kChunk == 0, "whole vectors");
  const unsigned kept = kDrop ? lora_kept<kValues, kVectors>(mask, key, row * D + first) : 0;
  T* to = y + row * D + first;
  float old[kValues];
  if (kAdd) lora_load_f32(to, 0, D - first, kVectors, old);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const float dropped = !kDrop ? values[i] : kept >> i & 1u ? values[i] * mask.scale : 0.0f;
    values[i] = (kAdd ? old[i] : bias[i]) + dropped;
  }
#pragma unroll
  for (int c = 0; c < kValues; c += kAtOnce) {
    if constexpr (kVectors) {
      Chunk<T> chunk;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) chunk.values[i] = rounded<T>(values[c + i]);
      *reinterpret_cast<Chunk<T>*>(to + c) = chunk;
    } else if (first + c < D) {
      to[c] = rounded<T>(values[c]);
    }
  }
}

template <int kValues>
__device__ __forceinline__ void load_bias(const float* __restrict__ bias, std::int64_t first, std::int64_t D,
                                          float (&values)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = bias != nullptr && first + i < D ? bias[first + i] : 0.0f;
}

template <typename T, int kSteps /* of 16 ranks in a turn */, bool kDrop, bool kAdd>
__global__ void __launch_bounds__(kLoraThreads, kSteps == 1 ? 2 : 1)
    lora_expand_mma_kernel(const float* __restrict__ s,     // [M, R]
                           std::int64_t M,                  //
                           std::int64_t R,                  //
                           LoraFactor c,                    // [R, D]
                           std::int64_t D,                  // a multiple of 8
                           LoraMask mask,                   //
                           const float* __restrict__ bias,  // [D], or null
                           T* __restrict__ y) {             // [M, D], 16-byte aligned
  constexpr int kRanks = 16 * kSteps;
  constexpr int kStride = kRanks + (kSteps == 1 ? 0 : 16);  // 32 bytes off a multiple of 128: no bank conflict
  KSHARED(std::uint32_t, tile, [kRows * kStride / 2]);      // pairs of S: [row][kStride / 2]
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const std::int64_t first_column = std::int64_t(blockIdx.x) * kColumns + warp * kWarpColumns;
  const std::int64_t mine = first_column + 8 * t;  // the eight columns this lane writes
  const std::uint64_t key = kDrop ? *mask.seed : 0;
  const bool working = first_column < D;  // the same for the whole warp

  float bias_values[8];
  load_bias(bias, mine, D, bias_values);
  std::uint32_t right[kSteps][4][2];  // mma's second operand: ranks 4t to 4t + 3 of a step, column g of tile j
  const auto load_c = [&](std::int64_t first_rank) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const std::int64_t column = first_column + 8 * (g / 2) + 2 * j + g % 2;
        float values[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const std::int64_t rank = first_rank + 16 * k + 4 * t + i;
          values[i] = rank < R && column < D ? c.values[rank * c.rank_stride + column * c.column_stride] : 0.0f;
        }
        right[k][j][0] = lora_pack<T>(values[0], values[1]);
        right[k][j][1] = lora_pack<T>(values[2], values[3]);
      }
  };
  if (working) load_c(0);
  // The next tile's values: what memory takes to answer passes during the products of this one. With 64 ranks there are
  // neither registers for that nor much need: the products take longer.
  constexpr bool kAhead = kSteps < 4;
  float ahead[kSteps][2];
  const auto load_s = [&](int pair, std::int64_t from_row, std::int64_t from_rank, float (&two)[2]) {
    const std::int64_t row = from_row + pair / (kRanks / 2), rank = from_rank + 2 * (pair % (kRanks / 2));
    two[0] = row < M && rank < R ? s[row * R + rank] : 0.0f;
    two[1] = row < M && rank + 1 < R ? s[row * R + rank + 1] : 0.0f;
  };
  const auto fetch_s = [&](std::int64_t from_row) {  // all ranks: with kAhead they are one tile
    static_assert(kRows * kRanks / 2 == kSteps * kLoraThreads, "kSteps pairs a thread");
#pragma unroll
    for (int i = 0; i < kSteps; ++i) load_s(threadIdx.x + i * kLoraThreads, from_row, 0, ahead[i]);
  };
  if (kAhead) fetch_s(std::int64_t(blockIdx.y) * kRows);

  for (std::int64_t first_row = std::int64_t(blockIdx.y) * kRows; first_row < M;
       first_row += std::int64_t(gridDim.y) * kRows) {
    float sum[kRows / 16][4][4] = {};
    for (std::int64_t first_rank = 0; first_rank < R; first_rank += kRanks) {
      if (R > kRanks && working) load_c(first_rank);
      __syncthreads();  // what the tile held is read
#pragma unroll(kAhead ? kSteps : 2)
      for (int i = 0; i < kSteps; ++i) {
        const int pair = threadIdx.x + i * kLoraThreads;
        if (!kAhead) load_s(pair, first_row, first_rank, ahead[0]);
        const float (&two)[2] = ahead[kAhead ? i : 0];
        tile[pair / (kRanks / 2) * (kStride / 2) + pair % (kRanks / 2)] = lora_pack<T>(two[0], two[1]);
      }
      __syncthreads();
      if (kAhead) fetch_s(first_row + std::int64_t(gridDim.y) * kRows);
      if (working) {
#pragma unroll
        for (int m = 0; m < kRows / 16; ++m)
#pragma unroll
          for (int k = 0; k < kSteps; ++k) {
            const uint2 low = *reinterpret_cast<const uint2*>(tile + ((16 * m + g) * kStride + 16 * k + 4 * t) / 2);
            const uint2 high =
                *reinterpret_cast<const uint2*>(tile + ((16 * m + g + 8) * kStride + 16 * k + 4 * t) / 2);
#pragma unroll
            for (int j = 0; j < 4; ++j) kp::mma_m16n8k16<T>(sum[m][j], {low.x, high.x, low.y, high.y}, right[k][j]);
          }
      }
    }
    if (working) {
#pragma unroll
      for (int m = 0; m < kRows / 16; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const std::int64_t row = first_row + 16 * m + 8 * half + g;
          float values[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) values[i] = sum[m][i / 2][2 * half + i % 2];
          if (row < M) finish<true, 8, T, kDrop, kAdd>(values, bias_values, mask, key, row, mine, D, y);
        }
    }
  }
}

constexpr int kFmaThreads = 128, kFmaRows = 4;

template <typename T, bool kVectors /* y and its rows are 16-byte aligned */, bool kDrop, bool kAdd>
__global__ void __launch_bounds__(kFmaThreads) lora_expand_fma_kernel(const float* __restrict__ s,     // as above
                                                                      std::int64_t M,                  //
                                                                      std::int64_t R,                  //
                                                                      LoraFactor c,                    //
                                                                      std::int64_t D,                  //
                                                                      LoraMask mask,                   //
                                                                      const float* __restrict__ bias,  //
                                                                      T* __restrict__ y) {             //
  const std::int64_t first = (std::int64_t(blockIdx.x) * kFmaThreads + threadIdx.x) * 4;
  if (first >= D) return;
  const std::uint64_t key = kDrop ? *mask.seed : 0;
  float bias_values[4];
  load_bias(bias, first, D, bias_values);
  for (std::int64_t first_row = std::int64_t(blockIdx.y) * kFmaRows; first_row < M;
       first_row += std::int64_t(gridDim.y) * kFmaRows) {
    float sum[kFmaRows][4] = {};
#pragma unroll 1
    for (std::int64_t rank = 0; rank < R; ++rank) {
      float right[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        right[i] = first + i < D ? c.values[rank * c.rank_stride + (first + i) * c.column_stride] : 0.0f;
#pragma unroll
      for (int m = 0; m < kFmaRows; ++m) {
        const float left = first_row + m < M ? s[(first_row + m) * R + rank] : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][i] = __fmaf_rn(left, right[i], sum[m][i]);
      }
    }
#pragma unroll
    for (int m = 0; m < kFmaRows; ++m)
      if (first_row + m < M)
        finish<kVectors, 4, T, kDrop, kAdd>(sum[m], bias_values, mask, key, first_row + m, first, D, y);
  }
}

struct Expand {
  const float* s;
  std::int64_t M, R;
  LoraFactor c;
  std::int64_t D;
  LoraMask mask;
  bool tensor_cores, add;
  const float* bias;
  void* y;
  cudaStream_t stream;
};

// Enough rows of blocks for a few turns of every SM, so that C's registers are filled seldom.
std::int64_t row_blocks(std::int64_t column_blocks, std::int64_t row_tiles) {
  return std::min({row_tiles, kMaxGridY, lora_ceil_div(4 * kLoraBlocks, column_blocks)});
}

template <typename T, bool kDrop, bool kAdd>
cudaError_t launch_fma(const Expand& e) {
  const std::int64_t columns = lora_ceil_div(e.D, 4 * kFmaThreads);
  const dim3 grid(unsigned(columns), unsigned(row_blocks(columns, lora_ceil_div(e.M, kFmaRows))));
  constexpr bool kFourAre16Bytes = sizeof(T) == 4;
  const auto kernel = kFourAre16Bytes && lora_vectors(e.y, e.D, sizeof(T))
                          ? lora_expand_fma_kernel<T, kFourAre16Bytes, kDrop, kAdd>
                          : lora_expand_fma_kernel<T, false, kDrop, kAdd>;
  return KLAUNCH(kernel, grid, kFmaThreads, 0, e.stream, e.s, e.M, e.R, e.c, e.D, e.mask, e.bias, static_cast<T*>(e.y));
}
template <typename T, int kSteps, bool kDrop, bool kAdd>
cudaError_t launch_mma(const Expand& e) {
  const std::int64_t columns = lora_ceil_div(e.D, kColumns);
  const dim3 grid(unsigned(columns), unsigned(row_blocks(columns, lora_ceil_div(e.M, kRows))));
  return KLAUNCH((lora_expand_mma_kernel<T, kSteps, kDrop, kAdd>), grid, kLoraThreads, 0, e.stream, e.s, e.M, e.R, e.c,
                 e.D, e.mask, e.bias, static_cast<T*>(e.y));
}
template <typename T, bool kDrop, bool kAdd>
cudaError_t launch(const Expand& e) {
  if constexpr (sizeof(T) == 2) {
    if (e.tensor_cores && lora_vectors(e.y, e.D, sizeof(T))) {
      if (e.R <= 16) return launch_mma<T, 1, kDrop, kAdd>(e);
      if (e.R <= 32) return launch_mma<T, 2, kDrop, kAdd>(e);
      return launch_mma<T, 4, kDrop, kAdd>(e);
    }
  }
  return launch_fma<T, kDrop, kAdd>(e);
}
template <typename T>
cudaError_t launch(const Expand& e) {
  if (e.mask.seed != nullptr) return e.add ? launch<T, true, true>(e) : launch<T, true, false>(e);
  return e.add ? launch<T, false, true>(e) : launch<T, false, false>(e);
}

}  // namespace

void lora_expand_cuda(const float* s, std::int64_t M, std::int64_t R, const LoraFactor& c, std::int64_t D,
                      const LoraDropoutCuda& drop, bool tensor_cores, bool add, const float* bias, DType dtype, void* y,
                      void* stream) {
  if (M == 0 || D == 0) return;
  const Expand call{s, M, R, c, D, lora_mask(drop), tensor_cores, add, bias, y, static_cast<cudaStream_t>(stream)};
  cudaError_t error = cudaErrorInvalidValue;
  switch (dtype) {
    case DType::f32:
      error = launch<float>(call);
      break;
    case DType::f16:
      error = launch<__half>(call);
      break;
    case DType::bf16:
      error = launch<__nv_bfloat16>(call);
      break;
  }
  check_cuda(error, kOp, "launching the kernel");
}

}  // namespace pyfastpeft
