// (IA)³ scaling on the GPU: y = x · scale, and grad_x = grad_y · scale with grad_scale = Σ_m grad_y · x in one pass.
//
// Forward. A thread keeps the scale of its 16 bytes of columns in registers and walks down the rows, four at a time;
// narrow matrices put several rows side by side into a block. Moves x and y once: M = 4096, D = 14336, bf16: 235 MB,
// 55 µs at 4.3 TB/s; 64 bytes in flight for each of 2,048 threads on an SM, 128 KB, where 23 KB cover the latency:
// predicted 58 µs.
//
// Backward. A block owns the columns of 32 bytes of a row, or of 64, 128 ... where that still makes 66 to 132 blocks,
// for all rows: the whole column sum is its own, so one launch is enough, without counters that somebody would have to
// zero first. Its 512 threads are `lanes` across and 512 / lanes down; each sums its rows in runs of 32, short chains
// that keep the error down, and a tree in shared memory adds the threads. Every sector is read whole, and neighbouring
// blocks read the others of a line at about the same time. One block of 104 registers a thread on an SM, with 4 rows of
// both operands in flight: 64 KB, so that half of the SMs are enough to cover the latency. Moves grad_y, x and grad_x
// once: M = 4096, D = 14336, bf16: 352 MB, 82 µs, predicted 90 µs. Below 2 KB a row there are too few columns to fill
// the GPU: the rows of a long matrix are cut into parts then, and a second, tiny launch adds their sums.
//
// Columns that are no whole 16 bytes, or memory that is not so aligned, take the same kernels with single values.
#include <algorithm>

#include "common/check.h"
#include "common/cuda_device.h"
#include "common/cuda_vec.cuh"
#include "ia3/ia3.h"

namespace pyfastpeft {
namespace {

constexpr int kScaleThreads = 256, kScaleRows = 4;  // rows a thread has in flight
constexpr int kSumThreads = 512, kSumRows = 4;      //
constexpr int kRun = 32;                            // rows of one fp32 chain
constexpr std::int64_t kMostBlocks = 132;           // an H200's SMs: one round of blocks; a constant, so that the bits
                                                    // of a sum do not depend on the GPU
constexpr std::int64_t kEnough = 64;                // blocks to go without a second launch
constexpr std::int64_t kLeastBytes = 32, kMostBytes = 1024;  // of columns, of a block: a sector; 512 single values
constexpr std::int64_t kPartRows = 2048;                     // at least, of a part
constexpr std::int64_t kScaleBlocks =
    1056;  // of the forward: two rounds of four on every SM; they walk over what is left

std::int64_t ceil_div(std::int64_t n, std::int64_t d) { return (n + d - 1) / d; }

// kValues neighbours, moved at once: a single one, or 16 bytes that stay packed in registers until they are used.
template <typename T, int kValues>
struct alignas(16) Piece {
  std::uint32_t words[4];
  __device__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else if constexpr (std::is_same<T, __nv_bfloat16>::value) {
      return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xFFFF0000u);
    } else {
      return __half2float(__ushort_as_half(static_cast<unsigned short>(words[i / 2] >> (16 * (i % 2)))));
    }
  }
};
template <typename T>
struct Piece<T, 1> {
  T value;
  __device__ float operator[](int) const { return as_f32(value); }
};

template <typename T, int kValues>
__device__ __forceinline__ Piece<T, kValues> load(const T* __restrict__ from) {
  return *reinterpret_cast<const Piece<T, kValues>*>(from);
}

// to[i] = from[i] · scale[i]: one fp32 product, rounded once.
template <typename T, int kValues>
__device__ __forceinline__ void store_scaled(const Piece<T, kValues>& from, const float (&scale)[kValues], T* to) {
  if constexpr (kValues == 1) {
    *to = rounded<T>(__fmul_rn(from[0], scale[0]));
  } else {
    Chunk<T> scaled;
#pragma unroll
    for (int i = 0; i < kValues; ++i) scaled.values[i] = rounded<T>(__fmul_rn(from[i], scale[i]));
    *reinterpret_cast<Chunk<T>*>(to) = scaled;
  }
}

template <typename T, int kValues>
__device__ __forceinline__ void load_scale(const void* scale, bool scale_is_f32, std::int64_t column,
                                           float (&values)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; ++i)
    values[i] =
        scale_is_f32 ? static_cast<const float*>(scale)[column + i] : as_f32(static_cast<const T*>(scale)[column + i]);
}

template <typename T>
__device__ __forceinline__ void store_sum(void* grad_scale, bool scale_is_f32, std::int64_t column, float sum) {
  if (scale_is_f32)
    static_cast<float*>(grad_scale)[column] = sum;
  else
    static_cast<T*>(grad_scale)[column] = rounded<T>(sum);
}

template <typename T, int kValues>
__global__ void __launch_bounds__(kScaleThreads, 4)
    ia3_scale_kernel(const T* __restrict__ x,         // [M, D], rows x_stride apart
                     const void* __restrict__ scale,  // [D]
                     bool scale_is_f32,               //
                     T* __restrict__ y,               // [M, D]
                     std::int64_t M,                  //
                     std::int64_t D,                  // a multiple of kValues
                     std::int64_t x_stride,           //
                     int lanes) {                     // threads across, a power of two
  const int lane = threadIdx.x % lanes, groups = kScaleThreads / lanes;
  const std::int64_t column = (std::int64_t(blockIdx.x) * lanes + lane) * kValues;
  if (column >= D) return;
  float factors[kValues];
  load_scale<T>(scale, scale_is_f32, column, factors);
  const std::int64_t step = std::int64_t(groups) * kScaleRows;
  for (std::int64_t first = blockIdx.y * step + threadIdx.x / lanes; first < M; first += gridDim.y * step) {
    Piece<T, kValues> pieces[kScaleRows];
#pragma unroll
    for (int i = 0; i < kScaleRows; ++i)
      if (first + i * groups < M) pieces[i] = load<T, kValues>(x + (first + i * groups) * x_stride + column);
#pragma unroll
    for (int i = 0; i < kScaleRows; ++i)
      if (first + i * groups < M) store_scaled(pieces[i], factors, y + (first + i * groups) * D + column);
  }
}

template <typename T, int kValues, bool kGradX>
__global__ void __launch_bounds__(kSumThreads)
    ia3_scale_backward_kernel(const T* __restrict__ grad_y,    // [M, D], rows grad_stride apart
                              const T* __restrict__ x,         // [M, D], rows x_stride apart
                              const void* __restrict__ scale,  // [D]
                              bool scale_is_f32,               //
                              T* __restrict__ grad_x,          // [M, D]
                              void* __restrict__ grad_scale,   // [D], written where there is no workspace
                              float* __restrict__ workspace,   // [grid y, D], or null
                              std::int64_t M,                  //
                              std::int64_t D,                  // a multiple of kValues
                              std::int64_t grad_stride,        //
                              std::int64_t x_stride,           //
                              std::int64_t part_rows,          // of a block
                              int lanes) {                     // threads across, a power of two
  KSHARED(float, shared, [kValues][kSumThreads]);
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = kSumThreads / lanes;
  const std::int64_t column = (std::int64_t(blockIdx.x) * lanes + lane) * kValues;
  const std::int64_t begin = blockIdx.y * part_rows + group;
  const std::int64_t end = (blockIdx.y + 1) * part_rows < M ? (blockIdx.y + 1) * part_rows : M;
  // this thread's rows: begin, begin + groups, ...; none in the lanes beyond the last column
  const std::int64_t rows = column < D ? (end - begin + groups - 1) / groups : 0;
  const std::int64_t grad_step = groups * grad_stride, x_step = groups * x_stride, grad_x_step = groups * D;
  grad_y += begin * grad_stride + column;
  x += begin * x_stride + column;
  grad_x += kGradX ? begin * D + column : 0;

  float factors[kValues];
  if (kGradX && rows > 0) load_scale<T>(scale, scale_is_f32, column, factors);
#pragma unroll
  for (int v = 0; v < kValues; ++v) shared[v][threadIdx.x] = 0;
  for (std::int64_t done = 0; done < rows; done += kRun) {
    const int run = rows - done < kRun ? int(rows - done) : kRun;
    float sum[kValues] = {};
#pragma unroll 1
    for (int r = 0; r < run; r += kSumRows) {
      Piece<T, kValues> grads[kSumRows], values[kSumRows];
#pragma unroll
      for (int i = 0; i < kSumRows; ++i)
        if (r + i < run) {
          grads[i] = load<T, kValues>(grad_y + i * grad_step);
          values[i] = load<T, kValues>(x + i * x_step);
        }
#pragma unroll
      for (int i = 0; i < kSumRows; ++i)
        if (r + i < run) {
          if (kGradX) store_scaled(grads[i], factors, grad_x + i * grad_x_step);
#pragma unroll
          for (int v = 0; v < kValues; ++v) sum[v] = __fmaf_rn(grads[i][v], values[i][v], sum[v]);
        }
      grad_y += kSumRows * grad_step;
      x += kSumRows * x_step;
      grad_x += kGradX ? kSumRows * grad_x_step : 0;
    }
#pragma unroll
    for (int v = 0; v < kValues; ++v) shared[v][threadIdx.x] += sum[v];  // nobody else's
  }

  for (int half = groups / 2; half > 0; half /= 2) {
    __syncthreads();
    if (group < half) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) shared[v][threadIdx.x] += shared[v][threadIdx.x + half * lanes];
    }
  }
  if (group != 0 || column >= D) return;
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    if (workspace != nullptr)
      workspace[blockIdx.y * D + column + v] = shared[v][threadIdx.x];
    else
      store_sum<T>(grad_scale, scale_is_f32, column + v, shared[v][threadIdx.x]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kScaleThreads) ia3_sum_parts_kernel(const float* __restrict__ partial,   // [parts, D]
                                                                      std::int64_t parts, std::int64_t D,  //
                                                                      void* __restrict__ grad_scale,       // [D]
                                                                      bool scale_is_f32) {                 //
  const std::int64_t column = std::int64_t(blockIdx.x) * kScaleThreads + threadIdx.x;
  if (column >= D) return;
  float sum = 0;
  for (std::int64_t part = 0; part < parts; ++part) sum += partial[part * D + column];
  store_sum<T>(grad_scale, scale_is_f32, column, sum);
}

bool whole_pieces(const void* matrix, std::int64_t stride, std::int64_t D, std::int64_t itemsize) {
  return is_aligned(matrix, 16) && stride * itemsize % 16 == 0 && D * itemsize % 16 == 0;
}

struct SumPlan {
  std::int64_t bytes;  // of columns, of a block
  std::int64_t blocks, part_rows, parts;
};
SumPlan sum_plan(std::int64_t M, std::int64_t D, std::int64_t itemsize) {
  SumPlan plan{kLeastBytes, 0, M, 1};
  while (plan.bytes < kMostBytes && ceil_div(D * itemsize, plan.bytes) > kMostBlocks) plan.bytes *= 2;
  plan.blocks = ceil_div(D * itemsize, plan.bytes);
  if (plan.blocks > 0 && plan.blocks < kEnough && M > kPartRows) {
    const std::int64_t wanted = std::min(ceil_div(kMostBlocks, plan.blocks), ceil_div(M, kPartRows));
    plan.part_rows = ceil_div(M, wanted);
    plan.parts = ceil_div(M, plan.part_rows);
  }
  return plan;
}

template <typename T, int kValues>
void scale_rows(const void* x, const void* scale, bool scale_is_f32, void* y, std::int64_t M, std::int64_t D,
                std::int64_t x_stride, const char* op, cudaStream_t stream) {
  int lanes = 1;
  while (lanes < kScaleThreads && lanes * kValues < D) lanes *= 2;
  const std::int64_t rows = std::int64_t(kScaleThreads / lanes) * kScaleRows;
  const std::int64_t across = ceil_div(D, std::int64_t(lanes) * kValues);
  const dim3 grid(unsigned(across), unsigned(std::min(ceil_div(M, rows), ceil_div(kScaleBlocks, across))));
  check_cuda(KLAUNCH((ia3_scale_kernel<T, kValues>), grid, kScaleThreads, 0, stream, static_cast<const T*>(x), scale,
                     scale_is_f32, static_cast<T*>(y), M, D, x_stride, lanes),
             op, "launching ia3_scale_kernel");
}

template <typename T>
void scale_rows(const void* x, const void* scale, bool scale_is_f32, void* y, std::int64_t M, std::int64_t D,
                std::int64_t x_stride, const char* op, cudaStream_t stream) {
  const bool pieces = whole_pieces(x, x_stride, D, sizeof(T)) && whole_pieces(y, D, D, sizeof(T));
  const auto f = pieces ? scale_rows<T, 16 / int(sizeof(T))> : scale_rows<T, 1>;
  f(x, scale, scale_is_f32, y, M, D, x_stride, op, stream);
}

struct Backward {
  const void *grad_y, *x, *scale;
  bool scale_is_f32;
  void *grad_x, *grad_scale;
  float* workspace;
  std::int64_t M, D, grad_stride, x_stride;
  cudaStream_t stream;
};

template <typename T, int kValues, bool kGradX>
void backward(const Backward& b, const SumPlan& plan) {
  const int lanes = int(plan.bytes) / (kValues * int(sizeof(T)));
  const dim3 grid(unsigned(plan.blocks), unsigned(plan.parts));
  check_cuda(KLAUNCH((ia3_scale_backward_kernel<T, kValues, kGradX>), grid, kSumThreads, 0, b.stream,
                     static_cast<const T*>(b.grad_y), static_cast<const T*>(b.x), b.scale, b.scale_is_f32,
                     static_cast<T*>(b.grad_x), b.grad_scale, plan.parts > 1 ? b.workspace : nullptr, b.M, b.D,
                     b.grad_stride, b.x_stride, plan.part_rows, lanes),
             "ia3_scale_backward", "launching ia3_scale_backward_kernel");
}

template <typename T>
void backward(const Backward& b) {
  if (b.grad_scale == nullptr)
    return scale_rows<T>(b.grad_y, b.scale, b.scale_is_f32, b.grad_x, b.M, b.D, b.grad_stride, "ia3_scale_backward",
                         b.stream);
  const SumPlan plan = sum_plan(b.M, b.D, sizeof(T));
  constexpr int kPiece = 16 / int(sizeof(T));
  const bool pieces = whole_pieces(b.grad_y, b.grad_stride, b.D, sizeof(T)) &&
                      whole_pieces(b.x, b.x_stride, b.D, sizeof(T)) && whole_pieces(b.grad_x, b.D, b.D, sizeof(T));
  if (b.grad_x != nullptr)
    pieces ? backward<T, kPiece, true>(b, plan) : backward<T, 1, true>(b, plan);
  else
    pieces ? backward<T, kPiece, false>(b, plan) : backward<T, 1, false>(b, plan);
  if (plan.parts > 1)
    check_cuda(KLAUNCH(ia3_sum_parts_kernel<T>, unsigned(ceil_div(b.D, kScaleThreads)), kScaleThreads, 0, b.stream,
                       b.workspace, plan.parts, b.D, b.grad_scale, b.scale_is_f32),
               "ia3_scale_backward", "launching ia3_sum_parts_kernel");
}

}  // namespace

void ia3_scale_cuda(const void* x, const void* scale, bool scale_is_f32, void* y, std::int64_t M, std::int64_t D,
                    std::int64_t x_stride, DType dtype, void* stream) {
  if (M == 0 || D == 0) return;
  const auto f = dtype == DType::f32   ? scale_rows<float>
                 : dtype == DType::f16 ? scale_rows<__half>
                                       : scale_rows<__nv_bfloat16>;
  f(x, scale, scale_is_f32, y, M, D, x_stride, "ia3_scale", static_cast<cudaStream_t>(stream));
}

std::int64_t ia3_scale_backward_workspace(std::int64_t M, std::int64_t D, DType dtype) {
  const SumPlan plan = sum_plan(M, D, dtype == DType::f32 ? 4 : 2);
  return plan.parts > 1 ? plan.parts * D : 0;
}

void ia3_scale_backward_cuda(const void* grad_y, const void* x, const void* scale, bool scale_is_f32, void* grad_x,
                             void* grad_scale, float* workspace, std::int64_t M, std::int64_t D,
                             std::int64_t grad_stride, std::int64_t x_stride, DType dtype, void* stream) {
  if (D == 0 || (M == 0 && grad_scale == nullptr) || (grad_x == nullptr && grad_scale == nullptr)) return;
  const Backward call{grad_y,    x, scale, scale_is_f32, grad_x,   grad_scale,
                      workspace, M, D,     grad_stride,  x_stride, static_cast<cudaStream_t>(stream)};
  const auto f = dtype == DType::f32   ? backward<float>
                 : dtype == DType::f16 ? backward<__half>
                                       : backward<__nv_bfloat16>;
  f(call);
}

}  // namespace pyfastpeft
