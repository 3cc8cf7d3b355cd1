// NF4 / FP4 dequantisation on the GPU, nested statistics or not, in one launch; the bits of nf4_dequantize_cpu.cpp.
//
//   out[i] = level(code(i)) · absmax(i / blocksize) in fp32, rounded once
//
// Moves n/2 + 4n/blocksize bytes in (n/2 + n/blocksize nested) and n·sizeof(T) out: bound by memory. 4096 x 14336 to
// bf16 is 147 MB, 34 us at the 4.3 TB/s an H200 copies. Instructions per value: a shift, a shuffle, a product and half
// a conversion, 3.5; at that bandwidth an SM has 4.3 issue slots for each value it must deliver (7.7 values a cycle,
// 4 x 32 lanes), so issue stands at a fifth and the shuffle unit at a quarter of what they can do.
//
// A thread takes a word of 8 values: the warp reads 128 bytes in a row and writes 32·8·sizeof(T) in a row, 16 bytes
// (fp32: 2 x 16) a store. kWords words are loaded before the first is decoded: that many loads are in flight per
// thread. A word never straddles two blocks. The output is written past the caches (evict first): it is four times
// what was read and larger than the L2 as a rule.
#include <algorithm>

#include "common/check.h"
#include "common/cuda_device.h"
#include "nf4/nf4_decode_cuda.cuh"

namespace pyfastpeft {
namespace {

constexpr int kThreads = 256;
constexpr int kWords = 4;                          // per thread and turn
constexpr std::int64_t kTile = kThreads * kWords;  // words a thread block takes per turn
constexpr std::int64_t kMaxGrid = 132 * 16;        // beyond it blocks take turns: the nested map stays loaded

// The word at `index`; bytes past the end read as zero. `aligned`: packed is 4-byte aligned.
__device__ __forceinline__ std::uint32_t load_word(const std::uint8_t* __restrict__ packed, std::int64_t index,
                                                   std::int64_t bytes, bool aligned) {
  const std::int64_t first = 4 * index;
  if (aligned && first + 4 <= bytes) return __ldg(reinterpret_cast<const std::uint32_t*>(packed) + index);
  std::uint32_t word = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (first + j < bytes) word |= std::uint32_t(packed[first + j]) << (8 * j);
  return word;
}

// out[first, first + 8) = values, up to n. `aligned`: out is 16-byte aligned.
template <typename T>
__device__ __forceinline__ void store_values(T* __restrict__ out, std::int64_t first, std::int64_t n, bool aligned,
                                             const float (&values)[kWordValues]) {
  if (aligned && first + kWordValues <= n) {
#pragma unroll
    for (int c = 0; c < kWordValues; c += Chunk<T>::kValues) {
      Chunk<T> chunk;
#pragma unroll
      for (int i = 0; i < Chunk<T>::kValues; ++i) chunk.values[i] = rounded<T>(values[c + i]);
      __stcs(reinterpret_cast<uint4*>(out + first + c), *reinterpret_cast<const uint4*>(&chunk));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWordValues; ++i)
      if (first + i < n) out[first + i] = rounded<T>(values[i]);
  }
}

template <typename T, bool kNested>
__global__ void __launch_bounds__(kThreads)
    nf4_dequantize_kernel(const std::uint8_t* __restrict__ packed,  // [packed_bytes(n)]
                          const Nf4Absmax absmax,                   // of block_count(n, blocksize) blocks
                          std::int64_t n,                           //
                          int log2_blocksize,                       // 5 to 12
                          QuantType type,                           //
                          bool aligned_packed,                      // 4 bytes
                          bool aligned_out,                         // 16 bytes
                          T* __restrict__ out) {                    // [n]
  KSHARED(float, map, [kNestedMapSize]);
  float offset = 0;
  if constexpr (kNested) {
    map[threadIdx.x] = absmax.nested_map[threadIdx.x];
    offset = *absmax.offset;
    __syncthreads();
  }
  const float level = lane_level(type);
  const std::int64_t bytes = packed_bytes(n), words = (bytes + 3) / 4;
  for (std::int64_t tile = blockIdx.x * kTile; tile < words; tile += gridDim.x * kTile) {
    std::uint32_t word[kWords];
    float scale[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const std::int64_t index = tile + w * kThreads + threadIdx.x;
      word[w] = index < words ? load_word(packed, index, bytes, aligned_packed) : 0;
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const std::int64_t index = tile + w * kThreads + threadIdx.x;
      const std::int64_t block = (index * kWordValues) >> log2_blocksize;
      scale[w] = index < words ? block_scale<kNested>(absmax, map, offset, block) : 0.0f;
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      float values[kWordValues];
      decode_word(word[w], level, values);
#pragma unroll
      for (int i = 0; i < kWordValues; ++i) values[i] = __fmul_rn(values[i], scale[w]);
      store_values(out, (tile + w * kThreads + threadIdx.x) * kWordValues, n, aligned_out, values);
    }
  }
}

template <typename T>
void launch(const std::uint8_t* packed, const Nf4Absmax& absmax, std::int64_t n, std::int64_t blocksize, QuantType type,
            void* out, void* stream) {
  const auto kernel = absmax.plain == nullptr ? nf4_dequantize_kernel<T, true> : nf4_dequantize_kernel<T, false>;
  int log2_blocksize = 0;
  while ((std::int64_t{1} << log2_blocksize) < blocksize) ++log2_blocksize;
  const std::int64_t tiles = ((packed_bytes(n) + 3) / 4 + kTile - 1) / kTile;
  const cudaError_t error =
      KLAUNCH(kernel, unsigned(std::min(tiles, kMaxGrid)), kThreads, 0, static_cast<cudaStream_t>(stream), packed,
              absmax, n, log2_blocksize, type, is_aligned(packed, 4), is_aligned(out, 16), static_cast<T*>(out));
  check_cuda(error, "dequantize_4bit", "launching nf4_dequantize_kernel");
}

}  // namespace

void nf4_dequantize_cuda(const std::uint8_t* packed, const Nf4Absmax& absmax, std::int64_t n, std::int64_t blocksize,
                         QuantType type, DType out_dtype, void* out, void* stream) {
  static_assert(kThreads == kNestedMapSize, "a thread brings one entry of the nested map");
  if (n == 0) return;
  switch (out_dtype) {
    case DType::f32:
      return launch<float>(packed, absmax, n, blocksize, type, out, stream);
    case DType::f16:
      return launch<__half>(packed, absmax, n, blocksize, type, out, stream);
    case DType::bf16:
      return launch<__nv_bfloat16>(packed, absmax, n, blocksize, type, out, stream);
  }
  throw std::invalid_argument(
      message("dequantize_4bit: unknown dtype code ", int(out_dtype), "; supported: f32 (0), f16 (1), bf16 (2)"));
}

}  // namespace pyfastpeft
