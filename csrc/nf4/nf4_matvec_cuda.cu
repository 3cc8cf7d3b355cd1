// y = x · Wᵀ for one or two rows of x at a time, W in 4 bits: a decoding step's matmul, bound by reading W.
//
// Bytes: N·K/2 packed, one absmax byte (nested) or four per block, little else. 14336 x 4096 nested: 30.3 MB, 7.0 us at
// the 4.3 TB/s an H200 copies. To keep that pace an SM must take in 7.1 values per cycle and lane-quarter: 37 values a
// cycle at 1.75 GHz. Instructions per packed byte and row of x: one byte permutation that makes the table's address, one
// 8-byte look-up, two FMAs; with loads, scales and the sums over lanes about 2.5 a value (51 values a cycle issue), and the
// look-ups, two wavefronts a warp, allow 32 values a cycle: the binding limit, 3.8 to 4.3 TB/s of packed bytes between
// 1.75 and 1.98 GHz. Predicted for M = 1: 7.5 to 9 us.
//
//   block   512 threads, 64 KiB of table: one block on an SM (two where shared memory allows); it walks over rows
//   warp    a chunk of 1024 inputs that stays its own, its x in registers (32 fp32 a lane and row of x), four rows of W
//           at a time; the next four are being loaded while these are summed: 128 bytes in flight a lane
//   sums    a lane sums 32 products of levels, then scales them once; lanes by shuffles, chunks in order through shared
//           memory. No atomics, and no part of the order depends on M, the grid or the GPU.
#include <algorithm>

#include "common/check.h"
#include "common/cuda_device.h"
#include "nf4/nf4_matmul_cuda.cuh"

namespace pyfastpeft {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kPieceValues = 32;                    // of a lane: 16 packed bytes
constexpr int kChunk = kWarp * kPieceValues;        // inputs a warp covers
constexpr int kRows = 4;                            // rows of W a warp sums at a time
constexpr int kPartials = kWarps * kRows;           // sums of a block's step, per row of x
constexpr int kMaxM = 2;

// x[m, first, first + 32) as fp32; zeros where there is none.
template <typename T, int kM>
__device__ __forceinline__ void load_x(const T* __restrict__ x, std::int64_t K, int rows, std::int64_t first,
                                       float (&values)[kM][kPieceValues]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const bool there = m < rows && first < K;
#pragma unroll
    for (int c = 0; c < kPieceValues; c += Chunk<T>::kValues) {
      Chunk<T> chunk{};
      if (there) chunk = *reinterpret_cast<const Chunk<T>*>(x + m * K + first + c);
#pragma unroll
      for (int i = 0; i < Chunk<T>::kValues; ++i) values[m][c + i] = as_f32(chunk.values[i]);
    }
  }
}

// dot[m] += Σ level(i) · x[m][i] over the four bytes of a word: values kFirst to kFirst + 7 of the piece.
template <int kFirst, int kM>
__device__ __forceinline__ void dot_word(const unsigned char* table, std::uint32_t word, std::uint32_t lane8,
                                         const float (&x)[kM][kPieceValues], float (&even)[kM], float (&odd)[kM]) {
  const float2 pair[4] = {pair_levels<0>(table, word, lane8), pair_levels<1>(table, word, lane8),
                          pair_levels<2>(table, word, lane8), pair_levels<3>(table, word, lane8)};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      even[m] = fmaf(pair[j].x, x[m][kFirst + 2 * j], even[m]);
      odd[m] = fmaf(pair[j].y, x[m][kFirst + 2 * j + 1], odd[m]);
    }
  }
}

// The sums over the warp of four values a lane; lane 8·r ends with that of sums[r]. Six shuffles instead of twenty: each
// step halves what a lane is in charge of.
__device__ __forceinline__ float warp_sum_rows(const float (&sums)[kRows], int lane) {
  static_assert(kRows == 4, "two halvings, then three sums");
  const bool upper = lane & 16, right = lane & 8;
  const float a = (upper ? sums[2] : sums[0]) + __shfl_xor_sync(0xffffffffu, upper ? sums[0] : sums[2], 16);
  const float b = (upper ? sums[3] : sums[1]) + __shfl_xor_sync(0xffffffffu, upper ? sums[1] : sums[3], 16);
  float c = (right ? b : a) + __shfl_xor_sync(0xffffffffu, right ? a : b, 8);
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) c += __shfl_xor_sync(0xffffffffu, c, offset);
  return c;
}

template <typename T, int kM, bool kNested>
__global__ void __launch_bounds__(kThreads, 1)
    nf4_matvec_kernel(const Nf4Matrix w,           //
                      int log2_blocksize,          //
                      const T* __restrict__ x,     // [rows, K]
                      int rows,                    // of x, up to kM
                      const Nf4Epilogue epilogue,  //
                      T* __restrict__ y) {         // [rows, N]
  unsigned char* table = kdyn_smem();
  KSHARED(float, partial, [2][kM][kPartials]);
  fill_pair_table(table, w.type);
  const float offset = kNested ? *w.absmax.offset : 0.0f;

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::uint32_t lane8 = lane * 8;
  const int chunks = int((w.K + kChunk - 1) / kChunk);  // the launcher has checked that it fits
  const int own = min(chunks, kWarps);                  // chunks that have a warp of their own; each may take further ones
  const int groups = kWarps / own;                      // of kRows rows, side by side in the block
  const int group = warp / own;
  const bool idle = group >= groups;
  const int step_rows = groups * kRows;
  const std::int64_t steps = (w.N + step_rows - 1) / step_rows;

  float values[kM][kPieceValues];
  const std::int64_t own_first = std::int64_t(warp % own) * kChunk + lane * kPieceValues;
  const auto load_rows = [&](std::int64_t step, std::int64_t first, Piece(&pieces)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t n = step * step_rows + group * kRows + r;
      const bool there = !idle && step < steps && n < w.N && first < w.K;
      pieces[r] = there ? load_piece<kNested>(w, log2_blocksize, n * w.K + first) : no_piece();
    }
  };

  Piece pieces[kRows], coming[kRows];
  load_rows(blockIdx.x, own_first, pieces);
  load_x<T, kM>(x, w.K, idle ? 0 : rows, own_first, values);
  __syncthreads();

  int turn = 0;
  for (std::int64_t step = blockIdx.x; step < steps; step += gridDim.x, turn ^= 1) {
    float sums[kM][kRows] = {};
    for (std::int64_t first = own_first; first - lane * kPieceValues < w.K; first += std::int64_t(own) * kChunk) {
      const bool last = first - lane * kPieceValues + std::int64_t(own) * kChunk >= w.K;
      if (last)
        load_rows(step + gridDim.x, own_first, coming);
      else
        load_rows(step, first + std::int64_t(own) * kChunk, coming);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float even[kM] = {}, odd[kM] = {};
        dot_word<0, kM>(table, pieces[r].bytes.x, lane8, values, even, odd);
        dot_word<8, kM>(table, pieces[r].bytes.y, lane8, values, even, odd);
        dot_word<16, kM>(table, pieces[r].bytes.z, lane8, values, even, odd);
        dot_word<24, kM>(table, pieces[r].bytes.w, lane8, values, even, odd);
        const float scale = piece_scale<kNested>(w, offset, pieces[r]);
#pragma unroll
        for (int m = 0; m < kM; ++m) sums[m][r] = fmaf(scale, even[m] + odd[m], sums[m][r]);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) pieces[r] = coming[r];
      if (chunks > own) {
        const std::int64_t next = last ? own_first : first + std::int64_t(own) * kChunk;
        load_x<T, kM>(x, w.K, idle ? 0 : rows, next, values);
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const float sum = warp_sum_rows(sums[m], lane);
      if (!idle && lane % 8 == 0) partial[turn][m][(group * kRows + lane / 8) * own + warp % own] = sum;
    }
    __syncthreads();  // one a step: the other half of `partial` is what the next step writes
    for (int i = threadIdx.x; i < step_rows * rows; i += kThreads) {
      const std::int64_t n = step * step_rows + i % step_rows;
      const int m = i / step_rows;
      if (n < w.N) {
        float sum = 0;
        for (int c = 0; c < own; ++c) sum += partial[turn][m][i % step_rows * own + c];
        y[m * w.N + n] = rounded<T>(finish(epilogue, sum, m, n));
      }
    }
  }
}

template <typename T, int kM>
void launch(const Nf4Matrix& w, const T* x, int rows, const Nf4Epilogue& epilogue, T* y, int blocks, void* stream) {
  const auto kernel = w.absmax.plain == nullptr ? nf4_matvec_kernel<T, kM, true> : nf4_matvec_kernel<T, kM, false>;
  const cudaError_t error = KLAUNCH(kernel, unsigned(blocks), kThreads, kPairTableBytes,
                                    static_cast<cudaStream_t>(stream), w, log2_of(w.blocksize), x, rows, epilogue, y);
  check_cuda(error, "linear_4bit", "launching nf4_matvec_kernel");
}

template <typename T>
void launch_rows(const Nf4Matrix& w, const void* x, std::int64_t M, const Nf4Epilogue& epilogue, void* y, int blocks,
                 void* stream) {
  const auto* from = static_cast<const T*>(x);
  auto* to = static_cast<T*>(y);
  for (std::int64_t m = 0; m < M; m += kMaxM) {
    Nf4Epilogue rows = epilogue;
    if (rows.s != nullptr) rows.s += m * rows.R;
    const auto f = m + 1 == M ? launch<T, 1> : launch<T, kMaxM>;
    f(w, from + m * w.K, int(std::min<std::int64_t>(kMaxM, M - m)), rows, to + m * w.N, blocks, stream);
  }
}

}  // namespace

void nf4_matvec_cuda(const Nf4Matrix& w, const void* x, std::int64_t M, DType dtype, const Nf4Epilogue& epilogue,
                     void* y, void* stream) {
  if (M == 0 || w.N == 0) return;
  const std::int64_t step_rows = kRows * (kWarps / std::min<std::int64_t>(kWarps, (w.K + kChunk - 1) / kChunk));
  const std::int64_t steps = (w.N + step_rows - 1) / step_rows;
  const int blocks = int(std::min<std::int64_t>(steps, multiprocessors("linear_4bit")));
  switch (dtype) {
    case DType::f32:
      return launch_rows<float>(w, x, M, epilogue, y, blocks, stream);
    case DType::f16:
      return launch_rows<__half>(w, x, M, epilogue, y, blocks, stream);
    case DType::bf16:
      return launch_rows<__nv_bfloat16>(w, x, M, epilogue, y, blocks, stream);
  }
  throw std::invalid_argument(
      message("linear_4bit: unknown dtype code ", int(dtype), "; supported: f32 (0), f16 (1), bf16 (2)"));
}

}  // namespace pyfastpeft
