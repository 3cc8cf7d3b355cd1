// y = x · Wᵀ by fp32 dot products, W in 4 bits: the matmul of a decoding step, one row of x, bound by reading W.
//
// Bytes: N·K/2 packed, one absmax byte (nested) or four per block, little else. 14336 x 4096 nested: 30.3 MB, 7.0 us at
// the 4.3 TB/s an H200 copies. To keep that pace an SM must take in 36 values a cycle at 1.75 GHz, 32 at 1.98. SASS of
// sm_90a, 128 values a lane and turn: 453 instructions nested, 432 plain, 3.5 a value, of them 1 FMA, half a byte
// permutation that makes the table's address, half an 8-byte look-up; 128 lanes issue 36 values a cycle. The look-ups, two
// wavefronts a warp, allow 32: the binding limit, 3.7 to 4.2 TB/s of packed bytes at those clocks. With neither pipe ever
// full, predicted for M = 1: 8.5 to 10 us.
//
//   block   512 threads (fp32 384), 64 KiB of table: one block on an SM (two where shared memory allows); it walks over rows
//   warp    a chunk of 1024 inputs that stays its own, its x in registers (32 fp32 a lane), four rows of W
//           at a time; the next four are being loaded while these are summed: 128 bytes in flight a lane
//   sums    a lane sums 32 products of levels, then scales them once; lanes by shuffles, chunks in order through shared
//           memory. No atomics, and no part of the order depends on M, the grid or the GPU.
//   low rank  the warps of the first chunk add S · B[n] to their rows' sums, 8 lanes a row: B is read once, in the order
//           of its rows, and asked for before the step's products. S may be made here too, by every block for
//           itself from A: 4·R·K bytes of it from the L2 for each SM, 17 MB in all for 8 ranks of 4096, about 3 us, where
//           a launch of its own and that of its partial sums cost 4.
#include <algorithm>
#include <type_traits>

#include "common/check.h"
#include "common/cuda_device.h"
#include "nf4/nf4_matmul_cuda.cuh"

namespace pyfastpeft {
namespace {

// Threads of a block: as many registers as there are for each, and fp32 inputs take twice as many.
template <typename T>
constexpr int kThreads = sizeof(T) == 4 ? 384 : 512;
constexpr int kPieceValues = 32;              // of a lane: 16 packed bytes
constexpr int kChunk = kWarp * kPieceValues;  // inputs a warp covers
constexpr int kRows = 4;                      // rows of W a warp sums at a time
constexpr int kLowRanks = 16;                 // of B, asked for before a step's products
static_assert(kNf4ShrinkRanks <= kLowRanks, "S that is made here lies in low_s");

// A lane's 32 neighbours of x as they are stored: 16-bit ones are widened when they are used, once for all of the rows.
// In words, not in values: taking 16-bit values out of registers costs two more instructions each.
template <typename T>
struct Inputs {
  static constexpr int kWords = kPieceValues * int(sizeof(T)) / 4;
  std::uint32_t words[kWords];
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else if constexpr (std::is_same<T, __nv_bfloat16>::value) {
      return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    } else {
      return __half2float(__ushort_as_half(static_cast<unsigned short>(words[i / 2] >> (16 * (i % 2)))));
    }
  }
};

// x[0, 32); zeros where there is none.
template <typename T>
__device__ __forceinline__ void load_x(const T* __restrict__ x, bool there, Inputs<T>& values) {
#pragma unroll
  for (int c = 0; c < Inputs<T>::kWords; c += 4) {
    const uint4 four = there ? reinterpret_cast<const uint4*>(x)[c / 4] : make_uint4(0, 0, 0, 0);
    values.words[c] = four.x, values.words[c + 1] = four.y, values.words[c + 2] = four.z, values.words[c + 3] = four.w;
  }
}

// even[r] + odd[r] = Σ level(i) · x[i] over the pieces of kRows rows. Word by word: the x of one are used for all rows.
template <typename T>
__device__ __forceinline__ void dot_rows(const unsigned char* table, const Piece (&pieces)[kRows], std::uint32_t lane8,
                                         const Inputs<T>& x, float (&even)[kRows], float (&odd)[kRows]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float values[kWordValues];
#pragma unroll
    for (int j = 0; j < kWordValues; ++j) values[j] = x[i * kWordValues + j];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const uint4& bytes = pieces[r].bytes;
      const std::uint32_t word = i == 0 ? bytes.x : i == 1 ? bytes.y : i == 2 ? bytes.z : bytes.w;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = pair_levels(table, word, lane8, j);
        even[r] = fmaf(pair.x, values[2 * j], even[r]);
        odd[r] = fmaf(pair.y, values[2 * j + 1], odd[r]);
      }
    }
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

template <typename T>
__device__ __forceinline__ float dot(const float* __restrict__ a, const Inputs<T>& x) {
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
__global__ void __launch_bounds__(kThreads<T>, 1)
    nf4_matvec_kernel(const Nf4Matrix w,           //
                      int log2_blocksize,          //
                      const T* __restrict__ x,     // [M, K]; the block's row is blockIdx.y
                      const Nf4Epilogue epilogue,  //
                      T* __restrict__ y) {         // [M, N]
  unsigned char* table = kdyn_smem();
  constexpr int kWarps = kThreads<T> / kWarp;
  KSHARED(float, partial, [2][kWarps * kRows]);
  KSHARED(float, shrunk, [kNf4ShrinkRanks][kWarps]);  // S by chunks
  KSHARED(float, low_s, [kLowRanks]);
  const float offset = kNested ? *w.absmax.offset : 0.0f;

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::uint32_t lane8 = lane * 8;
  const int K = int(w.K), chunks = (K + kChunk - 1) / kChunk;
  const int own = min(chunks, kWarps);  // chunks with a warp of their own; where K has more, each takes further ones
  const int stride = own * kChunk;
  const int groups = kWarps / own;  // of kRows rows, side by side in the block
  const int group = warp / own;
  const bool idle = group >= groups;
  const int step_rows = groups * kRows;
  const int N = int(w.N);

  const int own_first = warp % own * kChunk + lane * kPieceValues;
  x += blockIdx.y * w.K;
  Inputs<T> values;
  const auto load_inputs = [&](int first) { load_x<T>(x + first, !idle && first < K, values); };
  const auto load_rows = [&](int step, int first, Piece(&pieces)[kRows]) {
    const int n0 = (step * groups + group) * kRows;
    const int k = min(first, K - kPieceValues);
#pragma unroll
    for (int r = 0; r < kRows; ++r) pieces[r] = load_piece<kNested>(w, log2_blocksize, min(n0 + r, N - 1), k);
  };

  Piece pieces[kRows], coming[kRows];
  load_inputs(own_first);
  if (epilogue.a != nullptr && !idle) {
    for (int rank = group; rank < epilogue.R; rank += groups) {
      float sum = 0;
#pragma unroll 1
      for (int first = own_first; first - lane * kPieceValues < K; first += stride) {
        if (first != own_first) load_inputs(first);
        if (first < K) sum += dot<T>(epilogue.a + rank * w.K + first, values);
      }
      sum = warp_sum(sum);
      if (lane == 0) shrunk[rank][warp % own] = sum;
      if (chunks > own) load_inputs(own_first);
    }
  }
  load_rows(int(blockIdx.x), own_first, pieces);
  fill_pair_table(table, w.type);  // while the first rows are on their way
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

  const int place = (group * kRows + lane / 8) * own + warp % own;  // of this lane's sum
  int turn = 0;
  for (int step = int(blockIdx.x); step * step_rows < N; step += int(gridDim.x), turn ^= 1) {
    float sums[kRows] = {}, low = 0, b[2] = {};
    if (low_rank) {  // lane 8·r + i: ranks i, i + 8, ... of row r
      const int n = step * step_rows + group * kRows + lane / 8;
      const float* row = epilogue.b + n * epilogue.b_row_stride;
      const int ranks = n < N ? int(epilogue.R) : 0;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (lane % 8 + 8 * i < ranks) b[i] = row[(lane % 8 + 8 * i) * epilogue.b_rank_stride];
#pragma unroll 1
      for (int rank = kLowRanks + lane % 8; rank < ranks; rank += 8)
        low = fmaf(epilogue.s[blockIdx.y * epilogue.R + rank], row[rank * epilogue.b_rank_stride], low);
    }
#pragma unroll 1
    for (int first = own_first; first - lane * kPieceValues < K; first += stride) {
      const bool last = first - lane * kPieceValues + stride >= K;
      load_rows(last ? step + int(gridDim.x) : step, last ? own_first : first + stride, coming);
      float even[kRows] = {}, odd[kRows] = {};
      dot_rows<T>(table, pieces, lane8, values, even, odd);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        sums[r] = fmaf(piece_scale<kNested>(w, offset, pieces[r]), even[r] + odd[r], sums[r]);
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
    if (!idle && lane % 8 == 0) partial[turn][place] = sum;
    __syncthreads();  // one a step: the next one writes the other half of `partial`
    const int n = step * step_rows + int(threadIdx.x);
    if (threadIdx.x < step_rows && n < N) {
      float total = 0;
      for (int c = 0; c < own; ++c) total += partial[turn][threadIdx.x * own + c];
      y[blockIdx.y * w.N + n] = rounded<T>(finish(epilogue, total, n));
    }
  }
}

template <typename T>
void launch(const Nf4Matrix& w, const void* x, std::int64_t M, const Nf4Epilogue& epilogue, void* y, void* stream) {
  constexpr std::int64_t kWarps = kThreads<T> / kWarp;
  const std::int64_t step_rows = kRows * (kWarps / std::min<std::int64_t>(kWarps, (w.K + kChunk - 1) / kChunk));
  const std::int64_t steps = (w.N + step_rows - 1) / step_rows;
  const dim3 grid(unsigned(std::min<std::int64_t>(steps, multiprocessors("linear_4bit"))), unsigned(M));
  const auto kernel = w.absmax.plain == nullptr ? nf4_matvec_kernel<T, true> : nf4_matvec_kernel<T, false>;
  const cudaError_t error = KLAUNCH(kernel, grid, kThreads<T>, kPairTableBytes, static_cast<cudaStream_t>(stream), w,
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
