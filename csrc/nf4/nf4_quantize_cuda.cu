// NF4 / FP4 quantisation on the GPU; the same bits as nf4_quantize_cpu.cpp, which is the specification.
//
//   absmax[b] = max |w| over block b;   code(i) = encode(w[i] · (1 / max(absmax, floor)))
//
// A group of `lanes` threads owns a quantisation block: 4, 8, 16 or 32 threads for blocks of 32, 64, 128, 256 and more.
// A thread takes 8 neighbouring values at a time, so that a group reads lanes · 8 values in a row and each thread writes
// its 4 bytes at once; blocks above 256 values are walked in steps of 256, read twice (the second time from L1).
// Moves n·sizeof(T) bytes in and n/2 + 4n/blocksize out: bound by memory, 15 comparisons a value are below that.
//
// Magnitudes are compared as integers: infinity and NaN order above every number, so one maximum gives absmax and tells
// whether the block holds a value that has no code.
#include <algorithm>

#include "common/check.h"
#include "common/cuda_device.h"
#include "common/cuda_vec.cuh"
#include "nf4/nf4.h"

namespace pyfastpeft {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;               // values a thread holds; 4 packed bytes
constexpr std::int64_t kMaxGrid = 1 << 16;  // thread blocks; they walk over what is left
constexpr unsigned kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;

__constant__ float nf4_thresholds[15] = {PYFASTPEFT_NF4_THRESHOLDS};
__constant__ float fp4_thresholds[7] = {PYFASTPEFT_FP4_THRESHOLDS};
__constant__ std::uint8_t fp4_ascending[8] = {PYFASTPEFT_FP4_ASCENDING};

template <QuantType kType>
__device__ __forceinline__ std::uint32_t encode(float x) {
  return kType == QuantType::nf4 ? encode_nf4(x, nf4_thresholds) : encode_fp4(x, fp4_thresholds, fp4_ascending);
}

// values = weight[first, first + 8) as fp32, zero from `end` on. `aligned`: weight is 16-byte aligned.
template <typename T>
__device__ __forceinline__ void load(const T* __restrict__ weight, std::int64_t first, std::int64_t end, bool aligned,
                                     float (&values)[kPerThread]) {
  if (aligned && first + kPerThread <= end) {
#pragma unroll
    for (int c = 0; c < kPerThread; c += Chunk<T>::kValues) {
      const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(weight + first + c);
#pragma unroll
      for (int i = 0; i < Chunk<T>::kValues; ++i) values[c + i] = as_f32(chunk.values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) values[i] = first + i < end ? as_f32(weight[first + i]) : 0.0f;
  }
}

// Writes the bytes of values [first, end), at most 8 of them.
template <QuantType kType>
__device__ __forceinline__ void store(std::uint8_t* __restrict__ packed, std::int64_t first, std::int64_t end,
                                      bool aligned, float scale, const float (&values)[kPerThread]) {
  std::uint32_t word = 0;  // little endian: byte j holds values 2j (high nibble) and 2j + 1
#pragma unroll
  for (int j = 0; j < kPerThread / 2; ++j) {
    const std::uint32_t even = encode<kType>(__fmul_rn(values[2 * j], scale));
    const std::uint32_t odd =
        first + 2 * j + 1 < end ? encode<kType>(__fmul_rn(values[2 * j + 1], scale)) : zero_code(kType);
    word |= (even << 4 | odd) << (8 * j);
  }
  if (aligned && first + kPerThread <= end) {
    *reinterpret_cast<std::uint32_t*>(packed + first / 2) = word;
  } else {
#pragma unroll
    for (int j = 0; j < kPerThread / 2; ++j)
      if (first + 2 * j < end) packed[first / 2 + j] = static_cast<std::uint8_t>(word >> (8 * j));
  }
}

template <typename T, QuantType kType>
__global__ void __launch_bounds__(kThreads)
    nf4_quantize_kernel(const T* __restrict__ weight,       // [n]
                        std::int64_t n,                     //
                        int blocksize,                      // values, a power of two in [32, 4096]
                        int lanes,                          // threads per quantisation block, min(32, blocksize / 8)
                        bool aligned_weight,                // 16 bytes
                        bool aligned_packed,                // 4 bytes
                        std::uint8_t* __restrict__ packed,  // [packed_bytes(n)]
                        float* __restrict__ absmax,         // [block_count(n, blocksize)]
                        unsigned long long* __restrict__ bad) {  // lowered to the position of a NaN or infinity
  const std::int64_t blocks = block_count(n, blocksize);
  const std::int64_t thread = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int lane = threadIdx.x % lanes, step = lanes * kPerThread;
  const std::int64_t groups = std::int64_t(gridDim.x) * kThreads / lanes;
  // The bound is that of the warp's first group: a warp shuffles together, groups beyond the end hold zeros.
  const std::int64_t warp_first = (thread - threadIdx.x % kWarp) / lanes;
  for (std::int64_t turn = 0; warp_first + turn < blocks; turn += groups) {
    const std::int64_t block = thread / lanes + turn;
    const std::int64_t begin = block * blocksize;
    const std::int64_t end = begin + blocksize < n ? begin + blocksize : n;
    const std::int64_t mine = begin + lane * kPerThread;

    float values[kPerThread];
    unsigned largest = 0;
    for (std::int64_t first = mine; first < end; first += step) {
      load(weight, first, end, aligned_weight, values);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) largest = max(largest, __float_as_uint(values[i]) & kMagnitude);
    }
    if (largest >= kInfinity) {  // this thread saw one; the thread that saw the block's first finds it from here
      std::int64_t i = mine;
      while ((__float_as_uint(as_f32(weight[i])) & kMagnitude) < kInfinity) ++i;
      atomicMin(bad, static_cast<unsigned long long>(i));
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2)
      largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, offset));

    const float block_absmax = __uint_as_float(largest);
    const float scale = __fdiv_rn(1.0f, fmaxf(block_absmax, kAbsmaxFloor));
    if (lane == 0 && block < blocks) absmax[block] = block_absmax;
    for (std::int64_t first = mine; first < end; first += step) {
      if (step < blocksize) load(weight, first, end, aligned_weight, values);
      store<kType>(packed, first, end, aligned_packed, scale, values);
    }
  }
}

template <typename T, QuantType kType>
void launch(const void* weight, std::int64_t n, std::int64_t blocksize, std::uint8_t* packed, float* absmax,
            std::int64_t* bad, void* stream) {
  const int lanes = int(std::min<std::int64_t>(kWarp, blocksize / kPerThread));
  const std::int64_t groups_per_block = kThreads / lanes;
  const std::int64_t wanted = (block_count(n, blocksize) + groups_per_block - 1) / groups_per_block;
  const bool aligned_weight = is_aligned(weight, 16);
  const bool aligned_packed = is_aligned(packed, 4);
  const cudaError_t error =
      KLAUNCH((nf4_quantize_kernel<T, kType>), unsigned(std::min(wanted, kMaxGrid)), kThreads, 0,
              static_cast<cudaStream_t>(stream), static_cast<const T*>(weight), n, int(blocksize), lanes,
              aligned_weight, aligned_packed, packed, absmax, reinterpret_cast<unsigned long long*>(bad));
  check_cuda(error, "quantize_4bit", "launching nf4_quantize_kernel");
}

template <typename T>
void launch(QuantType type, const void* weight, std::int64_t n, std::int64_t blocksize, std::uint8_t* packed,
            float* absmax, std::int64_t* bad, void* stream) {
  const auto f = type == QuantType::nf4 ? launch<T, QuantType::nf4> : launch<T, QuantType::fp4>;
  f(weight, n, blocksize, packed, absmax, bad, stream);
}

}  // namespace

void nf4_quantize_cuda(const void* weight, DType dtype, std::int64_t n, std::int64_t blocksize, QuantType type,
                       std::uint8_t* packed, float* absmax, std::int64_t* bad, void* stream) {
  if (n == 0) return;
  switch (dtype) {
    case DType::f32:
      return launch<float>(type, weight, n, blocksize, packed, absmax, bad, stream);
    case DType::f16:
      return launch<__half>(type, weight, n, blocksize, packed, absmax, bad, stream);
    case DType::bf16:
      return launch<__nv_bfloat16>(type, weight, n, blocksize, packed, absmax, bad, stream);
  }
  throw std::invalid_argument(
      message("quantize_4bit: unknown dtype code ", int(dtype), "; supported: f32 (0), f16 (1), bf16 (2)"));
}

}  // namespace pyfastpeft
