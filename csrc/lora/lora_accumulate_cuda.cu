// G [R, D] = P [M, R]t · drop(X) [M, D] on the GPU: one pass over X, the mask made in registers on the way.
//
// Tensor-core kernel (bf16, fp16). The sum runs over the rows of X, and mma wants two neighbours of that sum in a
// register, one from each of two rows: a lane loads 16 bytes (columns 8g to 8g + 7) of the rows 4t to 4t + 3 of a step
// of 16 and interleaves them by byte permutation, so X needs no shared memory: 4 rows x 128 bytes per load, whole
// lines. Column c of mma tile j is column 8c + j; the sums of a lane are then 16 neighbours of a row of G. A block owns
// 128 columns, all ranks up to 64 (more: further blocks) and a piece of M, walked by 128 rows; P's part is rounded to
// 16 bits and transposed into shared memory. Warps are 2 (64 columns each) x 4 (32 rows of a turn each); their sums
// meet in shared memory at the end, pieces of M in a workspace that lora_sum_parts adds in order.
//
// Bytes: 2·M·D of X, 4·M·R of P per 128 columns (from L2), twice 4·R·D per piece of M. Flops 2·M·D·R.
// M = D = 4096, R = 16, bf16: 34 MB from memory (8 µs at 4.3 TB/s), from L2 8 MB of P and 4.7 MB of partial sums:
// predicted 11 µs with the second launch; D = 14336 (dY): 117 MB, 27 µs, predicted 33 µs. A warp has 4 KB of X in
// flight. Shared memory 8, 16 or 32 KB and 128, 190 or 240 registers for R to 16, 32, 64: two blocks on an SM, 64 KB in
// flight, or one with 32 KB.
//
// FMA kernel (fp32; 16-bit dtypes on sm_75, and where rows do not start at multiples of 16 bytes): a thread has four
// columns and 16 ranks, a block 256 columns with four threads side by side along M.
#include "lora/lora_cuda.cuh"

namespace pyfastpeft {
namespace {

constexpr int kRows = 128, kColumns = 128;  // of a block's turn
constexpr int kWarpColumns = 64, kWarpRows = 32, kColumnWarps = kColumns / kWarpColumns;
constexpr int kStride = kRows + 16;  // of a rank of P's tile: 32 bytes off a multiple of 128, no bank conflict
constexpr char kOp[] = "lora_accumulate";

LoraSplit accumulate_split(std::int64_t M, std::int64_t D, std::int64_t R) {
  return lora_split(lora_ceil_div(M, kRows), lora_ceil_div(D, kColumns) * lora_ceil_div(R, kLoraRankTile));
}

template <typename T, int kTiles /* of 16 ranks */, bool kDrop>
__global__ void __launch_bounds__(kLoraThreads, kTiles == 1 ? 2 : 1)
    lora_accumulate_mma_kernel(const float* __restrict__ p,  // [M, R]
                               std::int64_t M,               //
                               std::int64_t R,               //
                               const T* __restrict__ x,      // [M, D], 16-byte aligned
                               std::int64_t D,               // a multiple of 8
                               LoraMask mask,                //
                               std::int64_t turns,           // of a piece of M
                               float* __restrict__ out,      // [grid y, R, D] with these strides of R and D
                               std::int64_t rank_stride,     //
                               std::int64_t column_stride,   //
                               bool vectors) {               // out's columns adjoin and its rows are 16-byte aligned
  constexpr int kTileBytes = 16 * kTiles * kStride * int(sizeof(T));
  constexpr int kSums = kTiles * 8 * 4;  // of a lane
  constexpr int kSumBytes = kColumnWarps * kSums * kWarp * int(sizeof(float));
  static_assert(kTileBytes <= kSumBytes, "the tile lies where the sums will");
  KSHARED(unsigned char, shared, [kSumBytes]);
  auto* tile = reinterpret_cast<std::uint32_t*>(shared);  // pairs of P along M: [rank][kStride / 2]
  auto* sums = reinterpret_cast<float*>(shared);

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int column_warp = warp % kColumnWarps, group = warp / kColumnWarps;
  const std::int64_t first_column = std::int64_t(blockIdx.x) * kColumns + column_warp * kWarpColumns;
  const std::int64_t mine = first_column + 8 * g;  // the eight columns this lane reads
  const std::int64_t first_rank = std::int64_t(blockIdx.z) * kLoraRankTile;
  const std::int64_t begin = std::int64_t(blockIdx.y) * turns * kRows;
  const std::int64_t end = begin + turns * kRows < M ? begin + turns * kRows : M;
  const std::uint64_t key = kDrop ? *mask.seed : 0;
  const bool working = first_column < D;  // the same for the whole warp

  float sum[kTiles][8][4] = {};
  for (std::int64_t turn = begin; turn < end; turn += kRows) {
    const std::int64_t first_row = turn + group * kWarpRows;
    LoraEight rows[2][4];  // of step k: row 16k + 4t + i
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::int64_t row = first_row + 16 * k + 4 * t + i;
        rows[k][i] =
            row < end && mine < D ? *reinterpret_cast<const LoraEight*>(x + row * D + mine) : LoraEight{{0, 0, 0, 0}};
      }
    for (int i = threadIdx.x; i < 16 * kTiles * kRows / 2; i += kLoraThreads) {
      const int rank = i / (4 * kRows) * 8 + i % 8, pair = i / 8 % (kRows / 2);
      const std::int64_t row = turn + 2 * pair;
      const float* from = p + row * R + first_rank + rank;
      const float low = first_rank + rank < R && row < end ? from[0] : 0.0f;
      const float high = first_rank + rank < R && row + 1 < end ? from[R] : 0.0f;
      tile[rank * (kStride / 2) + pair] = lora_pack<T>(low, high);
    }
    __syncthreads();
    if (working && first_row < end) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (kDrop) {
          unsigned kept = 0;  // a loop, not four copies: Philox is long, and two of them side by side are enough
#pragma unroll 1
          for (int i = 0; i < 4; ++i)
            kept |= lora_kept<8, true>(mask, key, (first_row + 16 * k + 4 * t + i) * D + mine) << (8 * i);
#pragma unroll
          for (int i = 0; i < 4; ++i) lora_zero_dropped(rows[k][i], kept >> (8 * i));
        }
        std::uint32_t right[8][2];  // column 8g + j of the rows 4t, 4t + 1 and 4t + 2, 4t + 3
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            right[j][h] =
                __byte_perm(rows[k][2 * h].words[j / 2], rows[k][2 * h + 1].words[j / 2], j % 2 == 0 ? 0x5410 : 0x7632);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          const int row = group * kWarpRows + 16 * k + 4 * t;
          const uint2 low = *reinterpret_cast<const uint2*>(tile + ((16 * m + g) * kStride + row) / 2);
          const uint2 high = *reinterpret_cast<const uint2*>(tile + ((16 * m + g + 8) * kStride + row) / 2);
#pragma unroll
          for (int j = 0; j < 8; ++j) kp::mma_m16n8k16<T>(sum[m][j], {low.x, high.x, low.y, high.y}, right[j]);
        }
      }
    }
    __syncthreads();
  }

  // group 0 takes the others' sums, one group at a time; every lane keeps its place
  float* slot = sums + column_warp * (kSums * kWarp) + lane;
  for (int other = 1; other < kLoraWarps / kColumnWarps; ++other) {
    if (group == other && working) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) slot[i * kWarp] = sum[i / 32][i / 4 % 8][i % 4];
    }
    __syncthreads();
    if (group == 0 && working) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[i / 32][i / 4 % 8][i % 4] += slot[i * kWarp];
    }
    __syncthreads();
  }
  if (group != 0 || !working) return;
  out += std::int64_t(blockIdx.y) * R * D;
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t rank = first_rank + 16 * m + 8 * half + g;
      if (rank >= R) continue;
      float* to = out + rank * rank_stride + (first_column + 16 * t) * column_stride;
#pragma unroll
      for (int i = 0; i < 16; i += 4) {  // of column 16t + i: column 2t + i / 8 of tile i % 8
        const float four[4] = {
            sum[m][i % 8][2 * half + i / 8] * mask.scale, sum[m][i % 8 + 1][2 * half + i / 8] * mask.scale,
            sum[m][i % 8 + 2][2 * half + i / 8] * mask.scale, sum[m][i % 8 + 3][2 * half + i / 8] * mask.scale};
        if (first_column + 16 * t + i >= D) break;  // D is a multiple of 8: all four or none
        if (vectors) {
          *reinterpret_cast<float4*>(to + i) = make_float4(four[0], four[1], four[2], four[3]);
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) to[(i + j) * column_stride] = four[j];
        }
      }
    }
}

constexpr int kFmaRanks = 16, kFmaLanes = 64, kFmaColumns = 4 * kFmaLanes, kFmaGroups = kLoraThreads / kFmaLanes;

template <typename T, bool kDrop>
__global__ void __launch_bounds__(kLoraThreads) lora_accumulate_fma_kernel(const float* __restrict__ p,   // as above
                                                                           std::int64_t M,                //
                                                                           std::int64_t R,                //
                                                                           const T* __restrict__ x,       //
                                                                           std::int64_t D,                //
                                                                           LoraMask mask,                 //
                                                                           bool vectors,                  //
                                                                           std::int64_t turns,            //
                                                                           float* __restrict__ out,       //
                                                                           std::int64_t rank_stride,      //
                                                                           std::int64_t column_stride) {  //
  KSHARED(float, sums, [4 * kFmaRanks][kFmaLanes]);
  const int lane = threadIdx.x % kFmaLanes, group = threadIdx.x / kFmaLanes;
  const std::int64_t mine = std::int64_t(blockIdx.x) * kFmaColumns + 4 * lane;
  const std::int64_t first_rank = std::int64_t(blockIdx.z) * kFmaRanks;
  const std::int64_t begin = std::int64_t(blockIdx.y) * turns * kRows;
  const std::int64_t end = begin + turns * kRows < M ? begin + turns * kRows : M;
  const std::uint64_t key = kDrop ? *mask.seed : 0;

  float sum[kFmaRanks][4] = {};
  if (mine < D) {
    for (std::int64_t row = begin + group; row < end; row += kFmaGroups) {
      float values[4];
      lora_load_f32(x + row * D, mine, D, vectors, values);
      if (kDrop) {
        const unsigned kept = lora_kept<4, false>(mask, key, row * D + mine);
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = kept >> i & 1u ? values[i] * mask.scale : 0.0f;
      }
#pragma unroll
      for (int r = 0; r < kFmaRanks; ++r) {
        const float left = first_rank + r < R ? p[row * R + first_rank + r] : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[r][i] = __fmaf_rn(left, values[i], sum[r][i]);
      }
    }
  }
  for (int other = 1; other < kFmaGroups; ++other) {
    if (group == other) {
#pragma unroll
      for (int i = 0; i < 4 * kFmaRanks; ++i) sums[i][lane] = sum[i / 4][i % 4];
    }
    __syncthreads();
    if (group == 0) {
#pragma unroll
      for (int i = 0; i < 4 * kFmaRanks; ++i) sum[i / 4][i % 4] += sums[i][lane];
    }
    __syncthreads();
  }
  if (group != 0) return;
  out += std::int64_t(blockIdx.y) * R * D;
#pragma unroll
  for (int i = 0; i < 4 * kFmaRanks; ++i) {
    const std::int64_t rank = first_rank + i / 4, column = mine + i % 4;
    if (rank < R && column < D) out[rank * rank_stride + column * column_stride] = sum[i / 4][i % 4];
  }
}

struct Accumulate {
  const float* p;
  std::int64_t M, R;
  const void* x;
  std::int64_t D;
  LoraMask mask;
  LoraSplit split;
  float* out;
  std::int64_t rank_stride, column_stride;
  cudaStream_t stream;
};

template <typename T, int kTiles, bool kDrop>
cudaError_t launch_mma(const Accumulate& a) {
  const dim3 grid(unsigned(lora_ceil_div(a.D, kColumns)), unsigned(a.split.parts),
                  unsigned(lora_ceil_div(a.R, kLoraRankTile)));
  return KLAUNCH((lora_accumulate_mma_kernel<T, kTiles, kDrop>), grid, kLoraThreads, 0, a.stream, a.p, a.M, a.R,
                 static_cast<const T*>(a.x), a.D, a.mask, a.split.steps, a.out, a.rank_stride, a.column_stride,
                 a.column_stride == 1 && a.rank_stride % 4 == 0 && is_aligned(a.out, 16));
}
template <typename T, bool kDrop>
cudaError_t launch_mma(const Accumulate& a) {
  if (a.R <= 16) return launch_mma<T, 1, kDrop>(a);
  if (a.R <= 32) return launch_mma<T, 2, kDrop>(a);
  return launch_mma<T, 4, kDrop>(a);
}
template <typename T, bool kDrop>
cudaError_t launch_fma(const Accumulate& a) {
  const dim3 grid(unsigned(lora_ceil_div(a.D, kFmaColumns)), unsigned(a.split.parts),
                  unsigned(lora_ceil_div(a.R, kFmaRanks)));
  return KLAUNCH((lora_accumulate_fma_kernel<T, kDrop>), grid, kLoraThreads, 0, a.stream, a.p, a.M, a.R,
                 static_cast<const T*>(a.x), a.D, a.mask, lora_vectors(a.x, a.D, sizeof(T)), a.split.steps, a.out,
                 a.rank_stride, a.column_stride);
}
template <typename T>
cudaError_t launch(const Accumulate& a, bool tensor_cores) {
  const bool drop = a.mask.seed != nullptr;
  if constexpr (sizeof(T) == 2) {
    if (tensor_cores && lora_vectors(a.x, a.D, sizeof(T)))
      return drop ? launch_mma<T, true>(a) : launch_mma<T, false>(a);
  }
  return drop ? launch_fma<T, true>(a) : launch_fma<T, false>(a);
}

}  // namespace

std::int64_t lora_accumulate_workspace(std::int64_t M, std::int64_t D, std::int64_t R) {
  const std::int64_t parts = accumulate_split(M, D, R).parts;
  return parts > 1 ? parts * R * D : 0;
}

void lora_accumulate_cuda(const float* p, std::int64_t M, std::int64_t R, const void* x, DType dtype, std::int64_t D,
                          const LoraDropoutCuda& drop, bool tensor_cores, float* workspace, float* g,
                          std::int64_t g_rank_stride, std::int64_t g_column_stride, void* stream) {
  if (R == 0 || D == 0) return;
  const LoraSplit split = accumulate_split(M, D, R);
  const bool cut = split.parts > 1;
  const auto queue = static_cast<cudaStream_t>(stream);
  const Accumulate call{
      p,    M, R, x, D, lora_mask(drop), split, cut ? workspace : g, cut ? D : g_rank_stride, cut ? 1 : g_column_stride,
      queue};
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
  if (cut) lora_sum_parts(workspace, split.parts, R, D, g, g_rank_stride, g_column_stride, kOp, queue);
}

}  // namespace pyfastpeft
