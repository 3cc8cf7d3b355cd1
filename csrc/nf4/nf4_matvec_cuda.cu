// y = x · Wᵀ by fp32 dot products, W in 4 bits: the matmul of a decoding step, one row of x, bound by reading W.
//
// Bytes: N·K/2 packed, one absmax byte (nested) or four per block, little else. 14336 x 4096 nested: 30.3 MB, 7.0 us at
// the 4.3 TB/s an H200 copies. To keep that pace an SM must take in 7.1 values per cycle and lane-quarter: 37 values a
// cycle at 1.75 GHz. Instructions per packed byte: one byte permutation that makes the table's address, one
// 8-byte look-up, two FMAs; with loads, scales and the sums over lanes about 2.5 a value (51 values a cycle issue), and the
// look-ups, two wavefronts a warp, allow 32 values a cycle: the binding limit, 3.8 to 4.3 TB/s of packed bytes between
// 1.75 and 1.98 GHz. Predicted for M = 1: 7.5 to 9 us.
//
//   block   512 threads, 64 KiB of table: one block on an SM (two where shared memory allows); it walks over rows
//   warp    a chunk of 1024 inputs that stays its own, its x in registers (32 fp32 a lane), four rows of W
//           at a time; the next four are being loaded while these are summed: 128 bytes in flight a lane
//   sums    a lane sums 32 products of levels, then scales them once; lanes by shuffles, chunks in order through shared
//           memory. No atomics, and no part of the order depends on M, the grid or the GPU.
//   low rank  the warps of the first chunk add S · B[n] to their rows' sums, 8 lanes a row: B is read once, in the order
//           of its rows, and asked for before the step's products. S may be made here too, by every block for
//           itself from A: 4·R·K bytes of it from the L2 for each SM, 17 MB in all for 8 ranks of 4096, about 3 us, where
//           a launch of its own and that of its partial sums cost 4.
#include <algorithm>

#include "common/check.h"
#include "common/cuda_device.h"
#include "nf4/nf4_matmul_cuda.cuh"

namespace pyfastpeft {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kPieceValues = 32;              // of a lane: 16 packed bytes
constexpr int kChunk = kWarp * kPieceValues;  // inputs a warp covers
constexpr int kRows = 4;                      // rows of W a warp sums at a time
constexpr int kPartials = kWarps * kRows;     // sums of a block's step
constexpr int kLowRanks = 16;                 // of B, asked for before a step's products
static_assert(kNf4ShrinkRanks <= kLowRanks, "S that is made here lies in low_s");

// x[first, first + 32) as fp32; zeros where there is none.
template <typename T>
__device__ __forceinline__ void load_x(const T* __restrict__ x, bool there, float (&values)[kPieceValues]) {
#pragma unroll
  for (int c = 0; c < kPieceValues; c += Chunk<T>::kValues) {
    Chunk<T> chunk{};
    if (there) chunk = *reinterpret_cast<const Chunk<T>*>(x + c);
#pragma unroll
    for (int i = 0; i < Chunk<T>::kValues; ++i) values[c + i] = as_f32(chunk.values[i]);
  }
}

// even + odd += Σ level(i) · x[i] over a word: values kFirst to kFirst + 7 of the piece.
template <int kFirst>
__device__ __forceinline__ void dot_word(const unsigned char* table, std::uint32_t word, std::uint32_t lane8,
                                         const float (&x)[kPieceValues], float& even, float& odd) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = pair_levels(table, word, lane8, j);
    even = fmaf(pair.x, x[kFirst + 2 * j], even);
    odd = fmaf(pair.y, x[kFirst + 2 * j + 1], odd);
  }
}

// The sums over the warp of four values a lane; lane 8·r ends with that of sums[r] and of `more` in lanes 8·r to 8·r + 7.
// Six shuffles instead of twenty: each step halves what a lane is in charge of.
__device__ __forceinline__ float warp_sum_rows(const float (&sums)[kRows], float more, int lane) {
  static_assert(kRows == 4, "two halvings, then three sums");
  const bool upper = lane & 16, right = lane & 8;
  const float a = (upper ? sums[2] : sums[0]) + __shfl_xor_sync(0xffffffffu, upper ? sums[0] : sums[2], 16);
  const float b = (upper ? sums[3] : sums[1]) + __shfl_xor_sync(0xffffffffu, upper ? sums[1] : sums[3], 16);
  float c = (right ? b : a) + __shfl_xor_sync(0xffffffffu, right ? a : b, 8) + more;
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) c += __shfl_xor_sync(0xffffffffu, c, offset);
  return c;
}

__device__ __forceinline__ float dot(const float* __restrict__ a, const float (&x)[kPieceValues]) {
  float sums[4] = {};
#pragma unroll
  for (int c = 0; c < kPieceValues; c += 4) {
    const float4 v = *reinterpret_cast<const float4*>(a + c);
    sums[0] = fmaf(v.x, x[c], sums[0]);
    sums[1] = fmaf(v.y, x[c + 1], sums[1]);
    sums[2] = fmaf(v.z, x[c + 2], sums[2]);
    sums[3] = fmaf(v.w, x[c + 3], sums[3]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <typename T, bool kNested>
__global__ void __launch_bounds__(kThreads, 1)
    nf4_matvec_kernel(const Nf4Matrix w,           //
                      int log2_blocksize,          //
                      const T* __restrict__ x,     // [M, K]; the block's row is blockIdx.y
                      const Nf4Epilogue epilogue,  //
                      T* __restrict__ y) {         // [M, N]
  unsigned char* table = kdyn_smem();
  KSHARED(float, partial, [2][kPartials]);
  KSHARED(float, shrunk, [kNf4ShrinkRanks][kWarps]);  // S by chunks
  KSHARED(float, low_s, [kLowRanks]);
  fill_pair_table(table, w.type);
  const float offset = kNested ? *w.absmax.offset : 0.0f;

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::uint32_t lane8 = lane * 8;
  const int chunks = int((w.K + kChunk - 1) / kChunk);
  const int own = min(chunks, kWarps);  // chunks with a warp of their own; where K has more, each takes further ones
  const int stride = own * kChunk;
  const int groups = kWarps / own;  // of kRows rows, side by side in the block
  const int group = warp / own;
  const bool idle = group >= groups;
  const int step_rows = groups * kRows;
  const std::int64_t steps = (w.N + step_rows - 1) / step_rows;

  const int own_first = warp % own * kChunk + lane * kPieceValues;
  x += blockIdx.y * w.K;
  float values[kPieceValues];
  const auto load_inputs = [&](std::int64_t first) { load_x<T>(x + first, !idle && first < w.K, values); };
  const auto load_rows = [&](std::int64_t step, std::int64_t first, Piece(&pieces)[kRows]) {
    const std::int64_t n0 = step * step_rows + group * kRows;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      pieces[r] = !idle && n0 + r < w.N && first < w.K ? load_piece<kNested>(w, log2_blocksize, (n0 + r) * w.K + first)
                                                       : no_piece();
  };

  Piece pieces[kRows], coming[kRows];
  load_rows(blockIdx.x, own_first, pieces);
  load_inputs(own_first);
  if (epilogue.a != nullptr && !idle) {
    for (int rank = group; rank < epilogue.R; rank += groups) {
      float sum = 0;
      for (std::int64_t first = own_first; first - lane * kPieceValues < w.K; first += stride) {
        if (first != own_first) load_inputs(first);
        if (first < w.K) sum += dot(epilogue.a + rank * w.K + first, values);
      }
      sum = warp_sum(sum);
      if (lane == 0) shrunk[rank][warp % own] = sum;
      if (chunks > own) load_inputs(own_first);
    }
  }
  __syncthreads();

  if (threadIdx.x < kLowRanks && threadIdx.x < epilogue.R) {
    float sum = 0;
    if (epilogue.a != nullptr) {
      for (int c = 0; c < own; ++c) sum += shrunk[threadIdx.x][c];
      sum *= epilogue.a_scaling;
    } else {
      sum = epilogue.s[blockIdx.y * epilogue.R + threadIdx.x];
    }
    low_s[threadIdx.x] = sum;
  }
  __syncthreads();
  const bool low_rank = epilogue.b != nullptr && !idle && warp % own == 0;

  int turn = 0;
  for (std::int64_t step = blockIdx.x; step < steps; step += gridDim.x, turn ^= 1) {
    float sums[kRows] = {}, low = 0, b[2] = {};
    if (low_rank) {  // lane 8·r + i: ranks i, i + 8, ... of row r
      const std::int64_t n = step * step_rows + group * kRows + lane / 8;
      const float* row = epilogue.b + n * epilogue.b_row_stride;
      const int ranks = n < w.N ? int(epilogue.R) : 0;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (lane % 8 + 8 * i < ranks) b[i] = row[(lane % 8 + 8 * i) * epilogue.b_rank_stride];
      for (int rank = kLowRanks + lane % 8; rank < ranks; rank += 8)
        low = fmaf(epilogue.s[blockIdx.y * epilogue.R + rank], row[rank * epilogue.b_rank_stride], low);
    }
    for (std::int64_t first = own_first; first - lane * kPieceValues < w.K; first += stride) {
      const bool last = first - lane * kPieceValues + stride >= w.K;
      load_rows(last ? step + gridDim.x : step, last ? own_first : first + stride, coming);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float even = 0, odd = 0;
        dot_word<0>(table, pieces[r].bytes.x, lane8, values, even, odd);
        dot_word<8>(table, pieces[r].bytes.y, lane8, values, even, odd);
        dot_word<16>(table, pieces[r].bytes.z, lane8, values, even, odd);
        dot_word<24>(table, pieces[r].bytes.w, lane8, values, even, odd);
        sums[r] = fmaf(piece_scale<kNested>(w, offset, pieces[r]), even + odd, sums[r]);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) pieces[r] = coming[r];
      if (chunks > own) load_inputs(last ? own_first : first + stride);
    }
    if (low_rank) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (lane % 8 + 8 * i < int(epilogue.R)) low = fmaf(low_s[lane % 8 + 8 * i], b[i], low);
    }
    const float sum = warp_sum_rows(sums, low, lane);
    if (!idle && lane % 8 == 0) partial[turn][(group * kRows + lane / 8) * own + warp % own] = sum;
    __syncthreads();  // one a step: the next one writes the other half of `partial`
    const std::int64_t n = step * step_rows + threadIdx.x;
    if (threadIdx.x < step_rows && n < w.N) {
      float total = 0;
      for (int c = 0; c < own; ++c) total += partial[turn][threadIdx.x * own + c];
      y[blockIdx.y * w.N + n] = rounded<T>(finish(epilogue, total, n));
    }
  }
}

template <typename T>
void launch(const Nf4Matrix& w, const void* x, std::int64_t M, const Nf4Epilogue& epilogue, void* y, void* stream) {
  const std::int64_t step_rows = kRows * (kWarps / std::min<std::int64_t>(kWarps, (w.K + kChunk - 1) / kChunk));
  const std::int64_t steps = (w.N + step_rows - 1) / step_rows;
  const dim3 grid(unsigned(std::min<std::int64_t>(steps, multiprocessors("linear_4bit"))), unsigned(M));
  const auto kernel = w.absmax.plain == nullptr ? nf4_matvec_kernel<T, true> : nf4_matvec_kernel<T, false>;
  const cudaError_t error = KLAUNCH(kernel, grid, kThreads, kPairTableBytes, static_cast<cudaStream_t>(stream), w,
                                    log2_of(w.blocksize), static_cast<const T*>(x), epilogue, static_cast<T*>(y));
  check_cuda(error, "linear_4bit", "launching nf4_matvec_kernel");
}

}  // namespace

void nf4_matvec_cuda(const Nf4Matrix& w, const void* x, std::int64_t M, DType dtype, const Nf4Epilogue& epilogue,
                     void* y, void* stream) {
  if (M == 0 || w.N == 0) return;
  switch (dtype) {
    case DType::f32:
      return launch<float>(w, x, M, epilogue, y, stream);
    case DType::f16:
      return launch<__half>(w, x, M, epilogue, y, stream);
    case DType::bf16:
      return launch<__nv_bfloat16>(w, x, M, epilogue, y, stream);
  }
  throw std::invalid_argument(
      message("linear_4bit: unknown dtype code ", int(dtype), "; supported: f32 (0), f16 (1), bf16 (2)"));
}

}  // namespace pyfastpeft
