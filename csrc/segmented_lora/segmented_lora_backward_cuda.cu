// The backward of LoRA over a mixed batch in two launches whatever the number of adapters (up to 80 of them; then two more):
//
//   first    S_i = scaling_i · x · A_it and P_i = scaling_i · dY · B_i, both [rows of i, rank], in pieces of K and of N
//   second   dA_i = P_it · x, dB_i = dYt · S_i, dbias_i = scaling_i · Σ dY, dX = P_i · A_i; a block makes a tile of one of them
//
// First launch: the forward's shrink (segmented_lora_shrink_cuda.cuh), B read as it is stored.
// Second, tensor cores (bf16, fp16). A block of dA or dB has 16 ranks and 64 columns, and its eight warps take every eighth
// 16 rows of the segment. mma sums over rows, and wants two neighbours of them in a register: a lane loads 16 bytes (columns
// 8g to 8g + 7) of the rows 4t to 4t + 3 and interleaves them by byte permutation, as lora_accumulate does, so x needs no
// shared memory; rows are looked up through `order` on the way. The warps' sums meet in shared memory, in order: no
// atomics, no partial sums in memory, bits that depend on nothing but the segment. Longest blocks come first in the grid.
// A block of dX has 32 rows and 256 columns, as the forward's expand; a lane loads four columns of four ranks of A at once,
// and column c of mma tile j is column 4c + j, so that its sums are eight neighbours of a row, one 16-byte store.
//
// Bytes: x and dY twice, dX once (and its zeros before), A twice and B once a 32 rows, dA and dB once. Flops 10·rows·R·D.
// 8 adapters of 512 rows, K = N = 4096, R = 16, bf16, factors fp32: x, dY, dX 33.6 MB each, 201 MB in all with the zeros,
// 47 µs at 4.3 TB/s (2.7 GFLOP are 3.5 µs); where x and dY stay in the 50 MB of L2 between the launches 134 MB, 31 µs. Predicted
// 60 µs: the first launch 14 + 18 µs, the second 28 µs. A loop over 8 adapters has at least 40 launches.
// One adapter of 4096 rows: 64 + 64 blocks of dA and dB that each walk 32 turns, beside 2048 of dX; predicted 65 µs.
// Shared memory 34 KB; 256 threads of up to 128 registers, two blocks on an SM.
//
// FMA kernels (fp32; 16-bit dtypes on sm_75, and where rows or factors do not lie at multiples of 16 bytes): a block of dA or
// dB has 8 ranks and 32 columns, its warps every eighth row; one of dX a thread a column, eight rows.
#include "segmented_lora/segmented_lora_shrink_cuda.cuh"

namespace pyfastpeft {
namespace {

constexpr char kOp[] = "segmented_lora_";
constexpr int kMost = 80;                       // adapters of a launch: 48 bytes each of 4 KB of parameters
constexpr int kColumns = 64, kFewColumns = 32;  // of a gradient in a block
constexpr int kSpread = kLoraWarps * kWarp;     // columns of dX in a block
constexpr int kPadded = kColumns + 4;           // a row of the sums in shared memory

struct SegmentedBackwardAdapter {
  const void *a, *b;
  void *grad_a, *grad_b;
  float* grad_bias;
  float scaling;
  std::int32_t rank;
};
struct SegmentedBackwardTable {
  SegmentedBackwardAdapter adapters[kMost];
};

struct Low {  // S or P: [parts, positions, stride], scaled
  float* values;
  std::int64_t parts;    // 0: not wanted
  std::int64_t columns;  // of a part
};

template <typename T>
struct SegmentedBackward {
  const T *dy, *x;
  T* dx;  // null: not wanted
  std::int64_t K, N;
  SegmentedCall call;
  Low s, p;
  std::int64_t stride, rank_tiles;
  std::int64_t blocks_a, blocks_b, blocks_bias;  // of the second launch, in this order; the rest are dX's
};

// ---- first launch ---------------------------------------------------------------------------------------------------

// What block (x, y, z) makes: of S, or after its parts of P. kAcross: of P, from B.
template <bool kAcross, typename T>
__device__ __forceinline__ SegmentedShrink product_of_block(const SegmentedBackward<T>& work,
                                                            const SegmentedBackwardTable& table,
                                                            const SegmentedTile& tile, int ranks) {
  if (tile.adapter < 0) return {nullptr, 0, 0, 0, 0, 0, 0, 0};
  const SegmentedBackwardAdapter& adapter = table.adapters[tile.adapter];
  const std::int64_t part = kAcross ? blockIdx.z - work.s.parts : blockIdx.z;
  const std::int64_t D = kAcross ? work.N : work.K, columns = kAcross ? work.p.columns : work.s.columns;
  const std::int64_t end = (part + 1) * columns;
  return {kAcross ? adapter.b : adapter.a,
          adapter.rank,
          int(blockIdx.y) * ranks,
          adapter.scaling,
          part * columns,
          end < D ? end : D,
          part,
          work.stride};
}

template <typename T, typename F>
__global__ void __launch_bounds__(kLoraThreads, 2)
    segmented_low_mma_kernel(const SegmentedBackward<T> work, const SegmentedBackwardTable table) {
  KSHARED(float, sums, [kLoraWarps * kSegmentedTile * kRanks]);
  const SegmentedTile tile = segmented_tile<kSegmentedTile>(work.call, blockIdx.x);
  if (blockIdx.z < work.s.parts) {
    segmented_shrink_mma<false, T, F>(work.x, work.K, work.call, tile,
                                      product_of_block<false>(work, table, tile, kRanks), work.s.values, sums);
  } else {
    segmented_shrink_mma<true, T, F>(work.dy, work.N, work.call, tile,
                                     product_of_block<true>(work, table, tile, kRanks), work.p.values, sums);
  }
}

template <typename T, typename F>
__global__ void __launch_bounds__(kLoraThreads)
    segmented_low_fma_kernel(const SegmentedBackward<T> work, const SegmentedBackwardTable table) {
  const SegmentedTile tile = segmented_tile<kSegmentedFew>(work.call, blockIdx.x);
  if (blockIdx.z < work.s.parts) {
    segmented_shrink_fma<false, T, F>(work.x, work.K, work.call, tile,
                                      product_of_block<false>(work, table, tile, kLoraWarps), work.s.values);
  } else {
    segmented_shrink_fma<true, T, F>(work.dy, work.N, work.call, tile,
                                     product_of_block<true>(work, table, tile, kLoraWarps), work.p.values);
  }
}

// ---- second launch --------------------------------------------------------------------------------------------------

// The value of S or P of a position and rank, its parts summed in order.
__device__ __forceinline__ float low_value(const Low& low, const SegmentedCall& call, std::int64_t stride,
                                           std::int64_t position, int rank) {
  float total = 0;
  for (std::int64_t part = 0; part < low.parts; ++part)
    total += low.values[(part * call.positions + position) * stride + rank];
  return total;
}

struct Gradient {  // of a factor, in a block
  void* out;       // null: not wanted
  bool of_b;       // [columns, ranks], not [ranks, columns]
  int adapter, rank, first_rank;
  std::int64_t first_column;
};

template <int kBlockRanks, int kBlockColumns, typename T>
__device__ __forceinline__ Gradient gradient_of_block(const SegmentedBackward<T>& work,
                                                      const SegmentedBackwardTable& table) {
  const bool of_b = blockIdx.x >= work.blocks_a;
  const std::int64_t block = of_b ? blockIdx.x - work.blocks_a : blockIdx.x;
  const std::int64_t across = ((of_b ? work.N : work.K) + kBlockColumns - 1) / kBlockColumns, rows = block / across;
  const int adapter = int(rows / work.rank_tiles);
  const SegmentedBackwardAdapter& entry = table.adapters[adapter];
  return {of_b ? entry.grad_b : entry.grad_a, of_b, adapter, entry.rank, int(rows % work.rank_tiles) * kBlockRanks,
          block % across * kBlockColumns};
}

// The sums of the warps, sums[warp][rank][column], put together in order and written.
template <int kBlockRanks, int kBlockColumns, int kRow, typename F>
__device__ __forceinline__ void write_gradient(const Gradient& gradient, std::int64_t D, const float* sums) {
  __syncthreads();
  for (int i = threadIdx.x; i < kBlockRanks * kBlockColumns; i += kLoraThreads) {
    const int r = gradient.of_b ? i % kBlockRanks : i / kBlockColumns;
    const int c = gradient.of_b ? i / kBlockRanks : i % kBlockColumns;
    const std::int64_t rank = gradient.first_rank + r, column = gradient.first_column + c;
    if (rank >= gradient.rank || column >= D) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < kLoraWarps; ++w) total += sums[(w * kBlockRanks + r) * kRow + c];
    static_cast<F*>(gradient.out)[gradient.of_b ? column * gradient.rank + rank : rank * D + column] =
        rounded<F>(total);
  }
}

template <typename T, typename F>
__device__ __forceinline__ void gather_mma(const SegmentedBackward<T>& work, const Gradient& gradient, float* sums) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const T* from = gradient.of_b ? work.dy : work.x;
  const std::int64_t D = gradient.of_b ? work.N : work.K;
  const Low& low = gradient.of_b ? work.s : work.p;
  const std::int64_t mine = gradient.first_column + 8 * g;  // the eight columns this lane reads
  const SegmentedTile rows = segmented_segment(work.call, gradient.adapter);
  float sum[8][4] = {};
#pragma unroll 1
  for (int turn = 16 * warp; turn < rows.count; turn += 16 * kLoraWarps) {
    LoraEight right[4];
    float left[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int place = turn + 4 * t + i;
      const std::int64_t row = segmented_row(work.call, rows, place);
      right[i] = load_eight<T, T>(from + row * D + mine, row >= 0 && mine < D);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        left[half][i] = row < 0 ? 0.0f
                                : low_value(low, work.call, work.stride, std::int64_t(rows.position) + place,
                                            gradient.first_rank + 8 * half + g);
    }
    const std::uint32_t ranks[4] = {lora_pack<T>(left[0][0], left[0][1]), lora_pack<T>(left[1][0], left[1][1]),
                                    lora_pack<T>(left[0][2], left[0][3]), lora_pack<T>(left[1][2], left[1][3])};
#pragma unroll
    for (int j = 0; j < 8; ++j) {  // column 8g + j of the rows 4t, 4t + 1 and 4t + 2, 4t + 3
      const unsigned halves = j % 2 == 0 ? 0x5410 : 0x7632;
      kp::mma_m16n8k16<T>(sum[j], ranks,
                          {__byte_perm(right[0].words[j / 2], right[1].words[j / 2], halves),
                           __byte_perm(right[2].words[j / 2], right[3].words[j / 2], halves)});
    }
  }
#pragma unroll
  for (int d = 0; d < 4; ++d) {  // of rank g + 8 (d / 2): column 2t + d % 2 of tile j is column 16t + 8 (d % 2) + j
    float* to = sums + (warp * kRanks + g + 8 * (d / 2)) * kPadded + 16 * t + 8 * (d % 2);
#pragma unroll
    for (int j = 0; j < 8; j += 4)
      *reinterpret_cast<float4*>(to + j) = make_float4(sum[j][d], sum[j + 1][d], sum[j + 2][d], sum[j + 3][d]);
  }
  write_gradient<kRanks, kColumns, kPadded, F>(gradient, D, sums);
}

template <typename T, typename F>
__device__ __forceinline__ void gather_fma(const SegmentedBackward<T>& work, const Gradient& gradient, float* sums) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const T* from = gradient.of_b ? work.dy : work.x;
  const std::int64_t D = gradient.of_b ? work.N : work.K, column = gradient.first_column + lane;
  const Low& low = gradient.of_b ? work.s : work.p;
  const SegmentedTile rows = segmented_segment(work.call, gradient.adapter);
  float sum[kLoraWarps] = {};
#pragma unroll 1
  for (int place = warp; place < rows.count; place += kLoraWarps) {
    const std::int64_t row = segmented_row(work.call, rows, place);
    if (row < 0) continue;
    const float right = column < D ? as_f32(from[row * D + column]) : 0.0f;
#pragma unroll
    for (int r = 0; r < kLoraWarps; ++r)
      if (gradient.first_rank + r < gradient.rank)
        sum[r] = __fmaf_rn(
            low_value(low, work.call, work.stride, std::int64_t(rows.position) + place, gradient.first_rank + r), right,
            sum[r]);
  }
#pragma unroll
  for (int r = 0; r < kLoraWarps; ++r) sums[(warp * kLoraWarps + r) * (kFewColumns + 1) + lane] = sum[r];
  write_gradient<kLoraWarps, kFewColumns, kFewColumns + 1, F>(gradient, D, sums);
}

// A thread one column of dY, all rows of a segment.
template <typename T>
__device__ __forceinline__ void sum_bias(const SegmentedBackward<T>& work, const SegmentedBackwardTable& table,
                                         std::int64_t block) {
  const std::int64_t across = (work.N + kLoraThreads - 1) / kLoraThreads;
  const int adapter = int(block / across);
  const std::int64_t column = block % across * kLoraThreads + threadIdx.x;
  const SegmentedBackwardAdapter& entry = table.adapters[adapter];
  if (entry.grad_bias == nullptr || column >= work.N) return;
  const SegmentedTile rows = segmented_segment(work.call, adapter);
  float sum = 0;
#pragma unroll 8
  for (int i = 0; i < rows.count; ++i) {
    const std::int64_t row = segmented_row(work.call, rows, i);
    if (row >= 0) sum += as_f32(work.dy[row * work.N + column]);
  }
  entry.grad_bias[column] = entry.rank == 0 ? 0.0f : sum * entry.scaling;  // rank 0 adds nothing, no bias either
}

// Ranks rank to rank + 3 of four columns of A, in fp32; zeros beyond the last rank.
template <typename F>
__device__ __forceinline__ void load_square(const F* __restrict__ a, std::int64_t K, int rank, int R,
                                            float (&square)[4][4]) {
  struct alignas(4 * sizeof(F)) Four {
    F values[4];
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Four four{};
    if (rank + i < R) four = *reinterpret_cast<const Four*>(a + (rank + i) * K);
#pragma unroll
    for (int j = 0; j < 4; ++j) square[i][j] = as_f32(four.values[j]);
  }
}

template <typename T, typename F>
__device__ __forceinline__ void spread_mma(const SegmentedBackward<T>& work, const SegmentedBackwardTable& table,
                                           std::int64_t block) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const std::int64_t K = work.K, across = (K + kSpread - 1) / kSpread;
  const SegmentedTile tile = segmented_tile<kSegmentedTile>(work.call, block / across);
  const std::int64_t first_column = block % across * kSpread + warp * kWarp;
  if (tile.adapter < 0 || first_column >= K) return;
  const SegmentedBackwardAdapter& adapter = table.adapters[tile.adapter];
  const int R = adapter.rank;
  if (R == 0) return;  // dX stays zero
  const F* a = static_cast<const F*>(adapter.a) + first_column + 4 * g;

  float sum[2][4][4] = {};
#pragma unroll 1
  for (int first_rank = 0; first_rank < R; first_rank += kRanks) {
    const int rank = first_rank + 4 * t;
    float square[4][4] = {};
    if (first_column + 4 * g < K) load_square<F>(a, K, rank, R, square);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      std::uint32_t left[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * m + 8 * half + g;
        float4 total = make_float4(0, 0, 0, 0);
        for (std::int64_t part = 0; part < work.p.parts && row < tile.count; ++part) {
          const float4 four = *reinterpret_cast<const float4*>(
              work.p.values + (part * work.call.positions + tile.position + row) * work.stride + rank);
          total = make_float4(total.x + four.x, total.y + four.y, total.z + four.z, total.w + four.w);
        }
        left[half][0] = lora_pack<T>(total.x, total.y);
        left[half][1] = lora_pack<T>(total.z, total.w);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j)
        kp::mma_m16n8k16<T>(sum[m][j], {left[0][0], left[1][0], left[0][1], left[1][1]},
                            {lora_pack<T>(square[0][j], square[1][j]), lora_pack<T>(square[2][j], square[3][j])});
    }
  }
  const std::int64_t mine = first_column + 8 * t;  // the eight columns this lane writes
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t row = segmented_row(work.call, tile, 16 * m + 8 * half + g);
      if (row >= 0 && mine < K) {
        Chunk<T> chunk;
#pragma unroll
        for (int i = 0; i < 8; ++i) chunk.values[i] = rounded<T>(sum[m][i % 4][2 * half + i / 4]);
        *reinterpret_cast<Chunk<T>*>(work.dx + row * K + mine) = chunk;
      }
    }
}

template <typename T, typename F>
__device__ __forceinline__ void spread_fma(const SegmentedBackward<T>& work, const SegmentedBackwardTable& table,
                                           std::int64_t block) {
  const std::int64_t across = (work.K + kSpread - 1) / kSpread;
  const SegmentedTile tile = segmented_tile<kSegmentedFew>(work.call, block / across);
  const std::int64_t column = block % across * kSpread + threadIdx.x;
  if (tile.adapter < 0 || column >= work.K) return;
  const SegmentedBackwardAdapter& adapter = table.adapters[tile.adapter];
  const F* a = static_cast<const F*>(adapter.a) + column;
  float sum[kSegmentedFew] = {};
#pragma unroll 1
  for (int rank = 0; rank < adapter.rank; ++rank) {
    const float right = as_f32(a[rank * work.K]);
#pragma unroll
    for (int i = 0; i < kSegmentedFew; ++i)
      if (i < tile.count)
        sum[i] =
            __fmaf_rn(low_value(work.p, work.call, work.stride, std::int64_t(tile.position) + i, rank), right, sum[i]);
  }
#pragma unroll
  for (int i = 0; i < kSegmentedFew; ++i) {
    const std::int64_t row = segmented_row(work.call, tile, i);
    if (row >= 0) work.dx[row * work.K + column] = rounded<T>(sum[i]);
  }
}

template <typename T, typename F, bool kMma>
__device__ __forceinline__ void gradients(const SegmentedBackward<T>& work, const SegmentedBackwardTable& table,
                                          float* sums) {
  const std::int64_t factors = work.blocks_a + work.blocks_b;
  if (blockIdx.x < factors) {
    constexpr int kBlockRanks = kMma ? kRanks : kLoraWarps, kBlockColumns = kMma ? kColumns : kFewColumns;
    const Gradient gradient = gradient_of_block<kBlockRanks, kBlockColumns>(work, table);
    if (gradient.out == nullptr || gradient.first_rank >= gradient.rank) return;
    if constexpr (kMma) {
      gather_mma<T, F>(work, gradient, sums);
    } else {
      gather_fma<T, F>(work, gradient, sums);
    }
  } else if (blockIdx.x < factors + work.blocks_bias) {
    sum_bias<T>(work, table, blockIdx.x - factors);
  } else if constexpr (kMma) {
    spread_mma<T, F>(work, table, blockIdx.x - factors - work.blocks_bias);
  } else {
    spread_fma<T, F>(work, table, blockIdx.x - factors - work.blocks_bias);
  }
}

template <typename T, typename F>
__global__ void __launch_bounds__(kLoraThreads, 2)
    segmented_gradients_mma_kernel(const SegmentedBackward<T> work, const SegmentedBackwardTable table) {
  KSHARED(float, sums, [kLoraWarps * kRanks * kPadded]);
  gradients<T, F, true>(work, table, sums);
}

template <typename T, typename F>
__global__ void __launch_bounds__(kLoraThreads)
    segmented_gradients_fma_kernel(const SegmentedBackward<T> work, const SegmentedBackwardTable table) {
  KSHARED(float, sums, [kLoraWarps * kLoraWarps * (kFewColumns + 1)]);
  gradients<T, F, false>(work, table, sums);
}

// ---- launcher -------------------------------------------------------------------------------------------------------

struct Wanted {
  bool s, p, bias, a, b, x;
};

template <typename T, typename F>
void launch(SegmentedBackward<T> work, const SegmentedBackwardTable& table, const Wanted& wanted, bool mma,
            cudaStream_t stream) {
  const std::int64_t tiles =
      segmented_tiles(work.call.positions, work.call.adapters, mma ? kSegmentedTile : kSegmentedFew);
  const std::int64_t ranks = mma ? kRanks : kLoraWarps, columns = mma ? kColumns : kFewColumns;
  const std::int64_t adapters = work.call.adapters;
  work.rank_tiles = work.stride / ranks;
  work.blocks_a = wanted.a ? adapters * work.rank_tiles * lora_ceil_div(work.K, columns) : 0;
  work.blocks_b = wanted.b ? adapters * work.rank_tiles * lora_ceil_div(work.N, columns) : 0;
  work.blocks_bias = wanted.bias ? adapters * lora_ceil_div(work.N, kLoraThreads) : 0;
  const std::int64_t blocks =
      work.blocks_a + work.blocks_b + work.blocks_bias + (wanted.x ? tiles * lora_ceil_div(work.K, kSpread) : 0);
  check(blocks <= INT32_MAX && work.rank_tiles <= kMaxGridY, kOp, ": K = ", work.K, ", N = ", work.N, " and ",
        work.rank_tiles * ranks, " ranks of ", adapters, " adapters are too much for the grid");
  const bool first = tiles > 0 && work.rank_tiles > 0 && work.s.parts + work.p.parts > 0;
  const dim3 low(unsigned(tiles), unsigned(work.rank_tiles), unsigned(work.s.parts + work.p.parts));
  if constexpr (sizeof(T) == 2) {
    if (mma) {
      if (first)
        check_cuda(KLAUNCH((segmented_low_mma_kernel<T, F>), low, kLoraThreads, 0, stream, work, table), kOp,
                   "launching the backward's first kernel");
      if (blocks > 0)
        check_cuda(KLAUNCH((segmented_gradients_mma_kernel<T, F>), dim3(unsigned(blocks)), kLoraThreads, 0, stream,
                           work, table),
                   kOp, "launching the backward's second kernel");
      return;
    }
  }
  if (first)
    check_cuda(KLAUNCH((segmented_low_fma_kernel<T, F>), low, kLoraThreads, 0, stream, work, table), kOp,
               "launching the backward's first kernel");
  if (blocks > 0)
    check_cuda(
        KLAUNCH((segmented_gradients_fma_kernel<T, F>), dim3(unsigned(blocks)), kLoraThreads, 0, stream, work, table),
        kOp, "launching the backward's second kernel");
}

}  // namespace

std::int64_t segmented_lora_backward_workspace(std::int64_t positions, std::int64_t K, std::int64_t N,
                                               std::int64_t max_rank, std::int64_t adapters) {
  const SegmentedPlan s = segmented_lora_plan(positions, K, max_rank, adapters),
                      p = segmented_lora_plan(positions, N, max_rank, adapters);
  return (s.parts + p.parts) * positions * s.stride;
}

void segmented_lora_backward_cuda(const void* dy, const void* x, void* dx, DType dtype, std::int64_t K, std::int64_t N,
                                  const SegmentedBatch& batch, const std::vector<SegmentedAdapter>& adapters,
                                  DType factors, const std::vector<SegmentedGradients>& gradients, bool tensor_cores,
                                  float* workspace, void* stream) {
  const std::int64_t positions = batch.samples * batch.rows, count = std::int64_t(adapters.size());
  const std::size_t size = dtype == DType::f32 ? 4 : 2;
  bool mma = tensor_cores && size == 2 && lora_vectors(x, K, size) && lora_vectors(dy, N, size) && is_aligned(dx, 16);
  std::int64_t max_rank = 0;
  for (const SegmentedAdapter& adapter : adapters) {
    max_rank = std::max<std::int64_t>(max_rank, adapter.rank);
    mma = mma && is_aligned(adapter.a, 16) && is_aligned(adapter.b, 16);
  }
  const SegmentedPlan s = segmented_lora_plan(positions, K, max_rank, count),
                      p = segmented_lora_plan(positions, N, max_rank, count);
  for (std::int64_t first = 0; first < count; first += kMost) {
    const std::int64_t some = std::min<std::int64_t>(kMost, count - first);
    SegmentedBackwardTable table{};
    Wanted wanted{};
    wanted.x = dx != nullptr;
    for (std::int64_t i = 0; i < some; ++i) {
      const SegmentedAdapter& adapter = adapters[first + i];
      const SegmentedGradients& gradient = gradients[first + i];
      table.adapters[i] = {adapter.a, adapter.b, gradient.a, gradient.b, gradient.bias, adapter.scaling, adapter.rank};
      wanted.a = wanted.a || gradient.a != nullptr;
      wanted.b = wanted.b || gradient.b != nullptr;
      wanted.bias = wanted.bias || gradient.bias != nullptr;
    }
    const auto run = [&](auto of_dtype, auto of_factors) {
      using T = decltype(of_dtype);
      SegmentedBackward<T> work{};
      work.dy = static_cast<const T*>(dy), work.x = static_cast<const T*>(x), work.dx = static_cast<T*>(dx);
      work.K = K, work.N = N, work.stride = s.stride;
      work.call = {batch.order,
                   batch.starts + first,
                   std::int32_t(some),
                   std::int32_t(batch.samples),
                   std::int32_t(batch.rows),
                   std::int32_t(positions)};
      work.s = {workspace, wanted.b ? s.parts : 0, s.steps * kSegmentedStep};
      work.p = {workspace + s.parts * positions * s.stride, wanted.a || wanted.x ? p.parts : 0,
                p.steps * kSegmentedStep};
      launch<T, decltype(of_factors)>(work, table, wanted, mma, static_cast<cudaStream_t>(stream));
    };
    const bool wide = factors == DType::f32;
    switch (dtype) {
      case DType::f32:
        run(float{}, float{});
        break;
      case DType::f16:
        wide ? run(__half{}, float{}) : run(__half{}, __half{});
        break;
      case DType::bf16:
        wide ? run(__nv_bfloat16{}, float{}) : run(__nv_bfloat16{}, __nv_bfloat16{});
        break;
    }
  }
}

}  // namespace pyfastpeft
