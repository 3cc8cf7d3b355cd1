// NF4 / FP4 dequantisation on the GPU, nested statistics or not, in one launch; the bits of nf4_dequantize_cpu.cpp.
//
//   out[i] = level(code(i)) · absmax(i / blocksize) in fp32, rounded once
//
// A thread block takes a tile of 8192 values, a thread 16 bytes of output at a time: 8 values of 16 bits from a packed
// word of 4 bytes (fp32: 4 values from 2 bytes). So every store of a warp is 512 bytes in a row and every load 128
// (64): whole sectors both ways. A packed load of 16 bytes would leave each thread with 64 neighbouring bytes to write,
// and a warp's store would touch 32 half sectors; passing words between lanes costs more shuffles than it saves loads.
// All the thread's words and scales are asked for before the first is decoded: 4 (fp32: 8) of each are in flight.
//
// Nested: a tile lies in one nested block, so a thread reads the code of each unit's block, looks it up in the map
// (1 KiB, in L1) and keeps nested_absmax and offset in registers: no shared memory, no barrier, no second launch.
//
// Moves n/2 + 4n/blocksize bytes in (n/2 + n/blocksize nested) and n·sizeof(T) out: bound by memory. 4096 x 14336 to
// bf16: 147 MB, 34 us at the 4.3 TB/s an H200 copies; predicted 36 us, nested 37. SASS of sm_90a, bf16: 5.8
// instructions per value plain, 6.4 nested, of which one shuffle; the memory delivers 7.5 values per SM and cycle (132
// SMs at 1.75 GHz), so issue stands at 38 % of 128 a cycle and the shuffles at 23 % of 32. 32 registers, no shared
// memory: 8 thread blocks, all 64 warps of an SM; what they have in flight is 32 KiB of packed bytes, where 0.9 TB/s
// and 800 ns ask for 5.5 KiB.
// Caches: packed is read once (evict first). The output is stored as usual: what follows is a matmul that reads it, and
// 4096 x 4096 in bf16 (32 MB) is still in the L2 then; a larger matrix displaces itself whatever the hint.
#include <type_traits>

#include "common/check.h"
#include "common/cuda_device.h"
#include "nf4/nf4_decode_cuda.cuh"

namespace pyfastpeft {
namespace {

constexpr int kThreads = 256;
constexpr int kTileValues = 8192;  // values of a thread block, all block sizes divide it
static_assert(kTileValues % kMaxBlocksize == 0, "a tile begins with a block");

// What a thread does at a time: the packed bytes of one 16-byte chunk of output.
template <typename T>
struct Unit {
  static constexpr int kValues = Chunk<T>::kValues;
  static constexpr int kBytes = kValues / 2;
  static constexpr int kStep = kThreads * kValues;    // values from one of a thread's units to its next
  static constexpr int kCount = kTileValues / kStep;  // of a thread
  using Packed = std::conditional_t<kBytes == 4, std::uint32_t, std::uint16_t>;
};

template <typename T>
__device__ __forceinline__ Chunk<T> decode_unit(std::uint32_t word, float level, float scale) {
  float levels[Unit<T>::kValues];
  decode_values(word, level, levels);
  Chunk<T> chunk;
#pragma unroll
  for (int i = 0; i < Unit<T>::kValues; ++i) chunk.values[i] = rounded<T>(__fmul_rn(levels[i], scale));
  return chunk;
}

// The scales of a tile's blocks, block 0 being its first. They lie in one nested block: a tile has 2 to 256 of them, a
// power of two, and begins at a multiple of that.
template <bool kNested>
struct TileScales {
  const float* plain;
  const std::uint8_t* codes;
  const float* map;
  float coarse = 0, offset = 0;

  __device__ __forceinline__ TileScales(const Nf4Absmax& absmax, std::uint64_t first_block) {
    if constexpr (kNested) {
      codes = absmax.codes + first_block;
      map = absmax.nested_map;
      coarse = absmax.nested_absmax[first_block / kNestedBlocksize];
      offset = *absmax.offset;
    } else {
      plain = absmax.plain + first_block;
    }
  }
  // In two steps, so that what is stored of all blocks is on its way before the first is needed.
  using Stored = std::conditional_t<kNested, std::uint8_t, float>;
  __device__ __forceinline__ Stored load(unsigned block) const {
    if constexpr (kNested)
      return codes[block];
    else
      return plain[block];
  }
  __device__ __forceinline__ float value(Stored stored) const {
    if constexpr (kNested)
      return nested_scale(map[stored], coarse, offset);
    else
      return stored;
  }
};

// A tile that lies wholly below n, every pointer aligned. packed and out point at this thread's first unit; `mine`:
// where that lies in the tile.
template <typename T, bool kNested>
__device__ __forceinline__ void whole_tile(const std::uint8_t* __restrict__ packed, const TileScales<kNested>& scales,
                                           unsigned mine, int log2_blocksize, float level, T* __restrict__ out) {
  using U = Unit<T>;
  std::uint32_t words[U::kCount];
  typename TileScales<kNested>::Stored stored[U::kCount];
#pragma unroll
  for (int u = 0; u < U::kCount; ++u) {
    words[u] = __ldcs(reinterpret_cast<const typename U::Packed*>(packed) + u * kThreads);
    stored[u] = scales.load((mine + u * U::kStep) >> log2_blocksize);
  }
  // no load moves across: all of the above are on their way before the first nested scale waits for its code
  if constexpr (kNested) __syncwarp();
  float scale[U::kCount];
#pragma unroll
  for (int u = 0; u < U::kCount; ++u) scale[u] = scales.value(stored[u]);
#pragma unroll
  for (int u = 0; u < U::kCount; ++u)
    reinterpret_cast<Chunk<T>*>(out)[u * kThreads] = decode_unit<T>(words[u], level, scale[u]);
}

// The last tile, or any where a pointer is not aligned: bytes in, values out, and each access asks whether it may.
// `left`: how many of the n values are in this tile and beyond.
template <typename T, bool kNested>
__device__ __forceinline__ void any_tile(const std::uint8_t* __restrict__ packed, const TileScales<kNested>& scales,
                                         std::int64_t left, unsigned mine, int log2_blocksize, float level,
                                         T* __restrict__ out) {
  using U = Unit<T>;
#pragma unroll 1
  for (int u = 0; u < U::kCount; ++u) {
    const unsigned first = mine + u * U::kStep;
    std::uint32_t word = 0;
    float scale = 0;
    if (first < left) {
      scale = scales.value(scales.load(first >> log2_blocksize));
#pragma unroll
      for (int j = 0; j < U::kBytes; ++j)
        if (first + 2 * j < left) word |= std::uint32_t(packed[u * U::kStep / 2 + j]) << (8 * j);
    }
    const Chunk<T> chunk = decode_unit<T>(word, level, scale);  // the warp together, whatever lies beyond n
#pragma unroll
    for (int i = 0; i < U::kValues; ++i)
      if (first + i < left) out[u * U::kStep + i] = chunk.values[i];
  }
}

template <typename T, bool kNested>
__global__ void __launch_bounds__(kThreads)
    nf4_dequantize_kernel(const std::uint8_t* __restrict__ packed,  // [packed_bytes(n)]
                          const Nf4Absmax absmax,                   // of block_count(n, blocksize) blocks
                          std::int64_t n,                           //
                          int log2_blocksize,                       // 5 to 12
                          QuantType type,                           //
                          bool aligned,                             // packed to 4 bytes and out to 16
                          T* __restrict__ out) {                    // [n]
  const float level = lane_level(type);
  const std::int64_t tile = std::int64_t(blockIdx.x) * kTileValues;
  const unsigned mine = threadIdx.x * Unit<T>::kValues;
  const TileScales<kNested> scales(absmax, tile >> log2_blocksize);
  packed += (tile + mine) >> 1;
  out += tile + mine;
  if (aligned && tile + kTileValues <= n)
    whole_tile<T>(packed, scales, mine, log2_blocksize, level, out);
  else
    any_tile<T>(packed, scales, n - tile, mine, log2_blocksize, level, out);
}

template <typename T>
void launch(const std::uint8_t* packed, const Nf4Absmax& absmax, std::int64_t n, std::int64_t blocksize, QuantType type,
            void* out, void* stream) {
  const auto kernel = absmax.plain == nullptr ? nf4_dequantize_kernel<T, true> : nf4_dequantize_kernel<T, false>;
  int log2_blocksize = 0;
  while ((std::int64_t{1} << log2_blocksize) < blocksize) ++log2_blocksize;
  // a grid holds 2^31 - 1 blocks: enough for 2^44 values, 8 TiB of them packed
  const cudaError_t error =
      KLAUNCH(kernel, unsigned(block_count(n, kTileValues)), kThreads, 0, static_cast<cudaStream_t>(stream), packed,
              absmax, n, log2_blocksize, type, is_aligned(packed, 4) && is_aligned(out, 16), static_cast<T*>(out));
  check_cuda(error, "dequantize_4bit", "launching nf4_dequantize_kernel");
}

}  // namespace

void nf4_dequantize_cuda(const std::uint8_t* packed, const Nf4Absmax& absmax, std::int64_t n, std::int64_t blocksize,
                         QuantType type, DType out_dtype, void* out, void* stream) {
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
