// S [M, R] = alpha · drop(X) [M, D] · A [R, D]t on the GPU: one pass over X, the mask made in registers on the way.
//
// Tensor-core kernel (bf16, fp16). A block owns 128 rows (32 for M ≤ 32) and a piece of D, and walks it in steps of 256
// columns; A's step is rounded to 16 bits into shared memory, X goes from global memory straight into the registers
// that feed mma. That works because a dot product may take its columns in any order: a lane loads 16 neighbouring bytes
// of a row, columns 8t to 8t+7, and these serve two mma, whose "columns t, t+1, t+8, t+9" they are called; A's lane
// reads the same eight columns of its rank from shared memory. 8 rows x 64 bytes per load: every sector is used whole.
// Warps are `row_tiles` x `groups`: a warp has 32 rows and every groups-th 32 columns of a step; the groups' sums meet
// in shared memory at the end, pieces of D (grid y) in a workspace that lora_sum_parts adds in order.
//
// Bytes: 2·M·D of X, 4·R·D of A per 128 rows (from L2), 4·M·R of S and twice that per piece. Flops 2·M·D·R.
// M = D = 4096, R = 16, bf16: 34 MB from memory (8 µs at 4.3 TB/s), 8 MB of A and 4 MB of partial sums from L2,
// 0.54 GFLOP (1 µs): predicted 11 µs with the second launch. R = 64 moves 33 MB of A through L2: 16 µs. With dropout
// 4.2 million Philox calls of about 70 instructions each add up to 10 µs that overlap in part.
// Shared memory 9, 18 or 36 KB and 104, 122 or 174 registers (107, 144, 181 with dropout) for R to 16, 32, 64: two
// blocks, 16 warps, on an SM up to R = 16 (32 without dropout), one beyond. A warp has 2 KB of X in flight: 32 or 16 KB
// an SM, where 23 KB cover the latency (4.3 TB/s x 700 ns / 132).
//
// FMA kernel (fp32; 16-bit dtypes on sm_75, and where rows do not start at multiples of 16 bytes): 32 rows x 16 ranks a
// block, a thread one row and two ranks, operands as fp32 in shared memory, read four columns at a time without a bank
// conflict.
#include "lora/lora_cuda.cuh"

namespace pyfastpeft {
namespace {

constexpr int kStep = 256;                      // columns of a turn
constexpr int kStride = kStep + 32;             // of a row of A's tile: 64 bytes off a multiple of 128, no conflict
constexpr int kWarpColumns = 32;                // of a lane's 16 bytes times 4 lanes
constexpr int kMaxRowTiles = 4, kRowTile = 32;  // a warp's rows: two mma tiles
constexpr char kOp[] = "lora_shrink";

struct ShrinkPlan {
  int row_tiles;
  std::int64_t row_blocks, rank_blocks;
  LoraSplit split;  // of the steps
};
ShrinkPlan shrink_plan(std::int64_t M, std::int64_t D, std::int64_t R) {
  ShrinkPlan plan;
  plan.row_tiles = M <= kRowTile ? 1 : kMaxRowTiles;
  plan.row_blocks = lora_ceil_div(M, plan.row_tiles * kRowTile);
  plan.rank_blocks = lora_ceil_div(R, kLoraRankTile);
  plan.split = lora_split(lora_ceil_div(D, kStep), plan.row_blocks * plan.rank_blocks);
  return plan;
}

// Blocks that share an SM without spilled registers.
constexpr int shrink_blocks(int tiles, bool drop) { return tiles == 2 || (tiles == 4 && !drop) ? 2 : 1; }

template <typename T, int kTiles /* of 8 ranks */, bool kDrop>
__global__ void __launch_bounds__(kLoraThreads, shrink_blocks(kTiles, kDrop))
    lora_shrink_mma_kernel(const T* __restrict__ x,    // [M, D]
                           std::int64_t M,             //
                           std::int64_t D,             //
                           LoraFactor a,               // [R, D]
                           std::int64_t R,             //
                           float alpha,                // times the dropout's scale
                           LoraMask mask,              //
                           int row_tiles,              // 1 or 4
                           std::int64_t steps,         // of a piece of D
                           float* __restrict__ out) {  // [grid y, M, R]
  constexpr int kTileBytes = kTiles * 8 * kStride * int(sizeof(T));
  constexpr int kSumBytes = kMaxRowTiles * kRowTile * kTiles * 8 * int(sizeof(float));
  static_assert(kSumBytes <= kTileBytes, "the sums take the tile's place");
  KSHARED(unsigned char, shared, [kTileBytes]);
  auto* tile = reinterpret_cast<std::uint32_t*>(shared);  // pairs of A: [rank][kStride / 2]
  auto* sums = reinterpret_cast<float*>(shared);

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int groups = kLoraWarps / row_tiles, group = warp / row_tiles, row_tile = warp % row_tiles;
  const std::int64_t first_row = (std::int64_t(blockIdx.x) * row_tiles + row_tile) * kRowTile;
  const std::int64_t first_rank = std::int64_t(blockIdx.z) * kLoraRankTile;
  const std::int64_t begin = std::int64_t(blockIdx.y) * steps * kStep;
  const std::int64_t end = begin + steps * kStep < D ? begin + steps * kStep : D;
  const std::uint64_t key = kDrop ? *mask.seed : 0;
  const bool working = first_row < M;  // the same for the whole warp

  const auto load = [&](std::int64_t column, LoraEight(&rows)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::int64_t row = first_row + 8 * i + g;
      rows[i] = row < M && column + 8 * t < end ? *reinterpret_cast<const LoraEight*>(x + row * D + column + 8 * t)
                                                : LoraEight{{0, 0, 0, 0}};
    }
  };

  float sum[2][kTiles][4] = {};
  LoraEight next[4];
  if (working) load(begin + group * kWarpColumns, next);
  const bool ranks_adjoin = a.rank_stride == 1;
  for (std::int64_t step = begin; step < end; step += kStep) {
    // Neighbouring threads read neighbouring floats: along A's rows, or eight ranks at a time where those adjoin.
#pragma unroll 4
    for (int i = threadIdx.x; i < kTiles * 8 * kStep / 2; i += kLoraThreads) {
      const int rank = ranks_adjoin ? i / (4 * kStep) * 8 + i % 8 : i / (kStep / 2);
      const int pair = ranks_adjoin ? i / 8 % (kStep / 2) : i % (kStep / 2);
      const std::int64_t column = step + 2 * pair;
      const float* from = a.values + (first_rank + rank) * a.rank_stride + column * a.column_stride;
      const float low = first_rank + rank < R && column < end ? from[0] : 0.0f;
      const float high = first_rank + rank < R && column + 1 < end ? from[a.column_stride] : 0.0f;
      tile[rank * (kStride / 2) + pair] = lora_pack<T>(low, high);
    }
    __syncthreads();
    if (working) {
      for (int part = group; part < kStep / kWarpColumns; part += groups) {
        LoraEight rows[4] = {next[0], next[1], next[2], next[3]};
        load(step + (part + groups) * kWarpColumns, next);  // of this step or the next
        if (kDrop) {
          unsigned kept = 0;  // a loop, not four copies: Philox is long, and two of them side by side are enough
#pragma unroll 1
          for (int i = 0; i < 4; ++i) {
            const std::int64_t first = (first_row + 8 * i + g) * D + step + part * kWarpColumns + 8 * t;
            kept |= lora_kept<8, true>(mask, key, first) << (8 * i);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) lora_zero_dropped(rows[i], kept >> (8 * i));
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const LoraEight b =
              *reinterpret_cast<const LoraEight*>(tile + ((8 * n + g) * kStride + part * kWarpColumns + 8 * t) / 2);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const LoraEight &low = rows[2 * m], &high = rows[2 * m + 1];  // rows g and g + 8 of the mma tile
#pragma unroll
            for (int k = 0; k < 2; ++k)
              kp::mma_m16n8k16<T>(sum[m][n],
                                  {low.words[2 * k], high.words[2 * k], low.words[2 * k + 1], high.words[2 * k + 1]},
                                  {b.words[2 * k], b.words[2 * k + 1]});
          }
        }
      }
    }
    __syncthreads();
  }

  // group 0 takes the others' sums, one group at a time; every lane keeps its place
  float* slot = sums + row_tile * (2 * kTiles * 4 * kWarp) + lane;
  for (int other = 1; other < groups; ++other) {
    if (group == other && working) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles * 4; ++i) slot[i * kWarp] = sum[i / (kTiles * 4)][i / 4 % kTiles][i % 4];
    }
    __syncthreads();
    if (group == 0 && working) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles * 4; ++i) sum[i / (kTiles * 4)][i / 4 % kTiles][i % 4] += slot[i * kWarp];
    }
    __syncthreads();
  }
  if (group != 0 || !working) return;
  out += std::int64_t(blockIdx.y) * M * R;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::int64_t row = first_row + 16 * m + g + 8 * (i / 2);
        const std::int64_t rank = first_rank + 8 * n + 2 * t + i % 2;
        if (row < M && rank < R) out[row * R + rank] = sum[m][n][i] * alpha;
      }
}

constexpr int kFmaRows = 32, kFmaRanks = 16, kFmaColumns = 64;

template <typename T, bool kDrop>
__global__ void __launch_bounds__(kLoraThreads, 2)
    lora_shrink_fma_kernel(const T* __restrict__ x,    // as above, with alpha alone
                           std::int64_t M,             //
                           std::int64_t D,             //
                           LoraFactor a,               //
                           std::int64_t R,             //
                           float alpha,                //
                           LoraMask mask,              //
                           bool vectors,               //
                           std::int64_t steps,         //
                           float* __restrict__ out) {  //
  constexpr int kPadded = kFmaColumns + 4;             // rows 16 bytes further on the banks: eight of them read at once
  KSHARED(float, left, [kFmaRows][kPadded]);
  KSHARED(float, right, [kFmaRanks][kPadded]);
  const int r = threadIdx.x / 8, lane = threadIdx.x % 8;
  const std::int64_t row = std::int64_t(blockIdx.x) * kFmaRows + r;
  const std::int64_t first_rank = std::int64_t(blockIdx.z) * kFmaRanks;
  const std::int64_t begin = std::int64_t(blockIdx.y) * steps * kStep;
  const std::int64_t end = begin + steps * kStep < D ? begin + steps * kStep : D;
  const std::uint64_t key = kDrop ? *mask.seed : 0;
  const bool ranks_adjoin = a.rank_stride == 1;

  float total[2] = {};
  for (std::int64_t step = begin; step < end; step += kFmaColumns) {
    float values[8];
    lora_load_f32(x + row * D, step + 8 * lane, row < M ? end : 0, vectors, values);
    if (kDrop) {
      const unsigned kept = lora_kept<8, false>(mask, key, row * D + step + 8 * lane);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = kept >> i & 1u ? values[i] * mask.scale : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) left[r][8 * lane + i] = values[i];
    for (int i = threadIdx.x; i < kFmaRanks * kFmaColumns; i += kLoraThreads) {
      const int rank = ranks_adjoin ? i % kFmaRanks : i / kFmaColumns;
      const int column = ranks_adjoin ? i / kFmaRanks : i % kFmaColumns;
      const bool inside = first_rank + rank < R && step + column < end;
      right[rank][column] =
          inside ? a.values[(first_rank + rank) * a.rank_stride + (step + column) * a.column_stride] : 0.0f;
    }
    __syncthreads();
    float sum[2] = {};  // of this step alone: short chains keep the error down
#pragma unroll
    for (int k = 0; k < kFmaColumns; k += 4) {
      const float4 l = *reinterpret_cast<const float4*>(&left[r][k]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 b = *reinterpret_cast<const float4*>(&right[lane + 8 * i][k]);
        sum[i] = __fmaf_rn(l.w, b.w, __fmaf_rn(l.z, b.z, __fmaf_rn(l.y, b.y, __fmaf_rn(l.x, b.x, sum[i]))));
      }
    }
    total[0] += sum[0];
    total[1] += sum[1];
    __syncthreads();
  }
  out += std::int64_t(blockIdx.y) * M * R;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::int64_t rank = first_rank + lane + 8 * i;
    if (row < M && rank < R) out[row * R + rank] = total[i] * alpha;
  }
}

struct Shrink {
  const void* x;
  std::int64_t M, D;
  LoraFactor a;
  std::int64_t R;
  float alpha;
  LoraMask mask;
  ShrinkPlan plan;
  float* out;
  cudaStream_t stream;
};

template <typename T, int kTiles, bool kDrop>
cudaError_t launch_mma(const Shrink& s) {
  const dim3 grid(unsigned(s.plan.row_blocks), unsigned(s.plan.split.parts), unsigned(s.plan.rank_blocks));
  return KLAUNCH((lora_shrink_mma_kernel<T, kTiles, kDrop>), grid, kLoraThreads, 0, s.stream,
                 static_cast<const T*>(s.x), s.M, s.D, s.a, s.R, s.alpha * s.mask.scale, s.mask, s.plan.row_tiles,
                 s.plan.split.steps, s.out);
}
template <typename T, bool kDrop>
cudaError_t launch_mma(const Shrink& s) {
  if (s.R <= 16) return launch_mma<T, 2, kDrop>(s);
  if (s.R <= 32) return launch_mma<T, 4, kDrop>(s);
  return launch_mma<T, 8, kDrop>(s);
}
template <typename T, bool kDrop>
cudaError_t launch_fma(const Shrink& s) {
  const dim3 grid(unsigned(lora_ceil_div(s.M, kFmaRows)), unsigned(s.plan.split.parts),
                  unsigned(lora_ceil_div(s.R, kFmaRanks)));
  return KLAUNCH((lora_shrink_fma_kernel<T, kDrop>), grid, kLoraThreads, 0, s.stream, static_cast<const T*>(s.x), s.M,
                 s.D, s.a, s.R, s.alpha, s.mask, lora_vectors(s.x, s.D, sizeof(T)), s.plan.split.steps, s.out);
}
template <typename T>
cudaError_t launch(const Shrink& s, bool tensor_cores) {
  const bool drop = s.mask.seed != nullptr;
  if constexpr (sizeof(T) == 2) {
    if (tensor_cores && lora_vectors(s.x, s.D, sizeof(T)))
      return drop ? launch_mma<T, true>(s) : launch_mma<T, false>(s);
  }
  return drop ? launch_fma<T, true>(s) : launch_fma<T, false>(s);
}

__global__ void __launch_bounds__(kLoraThreads)
    lora_sum_parts_kernel(const float* __restrict__ partial,  // [parts, rows, columns]
                          std::int64_t parts,                 //
                          std::int64_t rows,                  //
                          std::int64_t columns,               //
                          float* __restrict__ out,            //
                          std::int64_t row_stride,            // of out, in elements
                          std::int64_t column_stride) {       //
  const std::int64_t i = std::int64_t(blockIdx.x) * kLoraThreads + threadIdx.x;
  if (i >= rows * columns) return;
  float sum = partial[i];
  for (std::int64_t part = 1; part < parts; ++part) sum += partial[part * rows * columns + i];
  out[i / columns * row_stride + i % columns * column_stride] = sum;
}

}  // namespace

void lora_sum_parts(const float* partial, std::int64_t parts, std::int64_t rows, std::int64_t columns, float* out,
                    std::int64_t row_stride, std::int64_t column_stride, const char* op, cudaStream_t stream) {
  const cudaError_t error =
      KLAUNCH(lora_sum_parts_kernel, unsigned(lora_ceil_div(rows * columns, kLoraThreads)), kLoraThreads, 0, stream,
              partial, parts, rows, columns, out, row_stride, column_stride);
  check_cuda(error, op, "launching lora_sum_parts_kernel");
}

std::int64_t lora_shrink_workspace(std::int64_t M, std::int64_t D, std::int64_t R) {
  const std::int64_t parts = shrink_plan(M, D, R).split.parts;
  return parts > 1 ? parts * M * R : 0;
}

void lora_shrink_cuda(const void* x, DType dtype, std::int64_t M, std::int64_t D, const LoraFactor& a, std::int64_t R,
                      float alpha, const LoraDropoutCuda& drop, bool tensor_cores, float* workspace, float* s,
                      void* stream) {
  if (M == 0 || R == 0) return;
  const ShrinkPlan plan = shrink_plan(M, D, R);
  const bool cut = plan.split.parts > 1;
  const auto queue = static_cast<cudaStream_t>(stream);
  const Shrink call{x, M, D, a, R, alpha, lora_mask(drop), plan, cut ? workspace : s, queue};
  cudaError_t error = cudaErrorInvalidValue;
  switch (dtype) {
    case DType::f32:
      error = launch<float>(call, false);
      break;
    case DType::f16:
      error = launch<__half>(call, tensor_cores);
      break;
    case DType::bf16:
      error = launch<__nv_bfloat16>(call, tensor_cores);
      break;
  }
  check_cuda(error, kOp, "launching the kernel");
  if (cut) lora_sum_parts(workspace, plan.split.parts, M, R, s, R, 1, kOp, queue);
}

}  // namespace pyfastpeft
