// NF4 / FP4 quantisation on the GPU: one launch, one read of the weight; the bits of nf4_quantize_cpu.cpp, which is the
// specification.
//
//   absmax[b] = max |w| over block b;   code(i) = encode(w[i] · (1 / max(absmax, floor)))
//
// A thread block takes a tile of 4096 values: whole quantisation blocks, whatever their size. A thread holds 64 bytes
// of neighbouring values, 32 (fp32: 16), in registers from the load to the store, so blocksize / 32 threads share a
// quantisation block. Up to 1024 values they are neighbours in a warp, above that the warps' maxima meet in 32 bytes of
// shared memory. (16 bytes a thread would read whole lines with each load, where now L1 brings a sector's halves
// together. But the maximum over lanes, the reciprocal and the addresses, which a thread pays once, then weigh four
// times as much, and instructions are scarce here: in bf16 20.8 a value with 8 a thread, 14.8 with 16, 12.1 with 32.)
//
// Encoding (nf4_encode_buckets.h): a fused multiply-add puts x into one of 32 buckets, each with at most one threshold,
// so code = codes below the bucket + (threshold < x). The 32 thresholds and counts lie one per lane, and a shuffle
// reads only the low five bits of its source lane: those of the multiply-add's result, which is rounded to an integer
// at 2^23. threshold < x is the sign of threshold - x, shifted into a word that collects the eight of a packed word.
// Seven instructions a value, where fifteen comparisons and sums are 30: 225 per SM and cycle at the bandwidth below,
// of 128.
//
// The maximum propagates NaN, so absmax tells whether the block holds a value that has no code; only then are the
// values searched, and the position of the first lands in *bad.
//
// Moves n·sizeof(T) in and n/2 + 4n/blocksize out. 4096 x 14336, bf16, blocks of 64: 151 MB, 35 us at the 4.3 TB/s an
// H200 copies; predicted 40 us. SASS of sm_90a, bf16, NF4: 12.1 instructions per value, of which 2.1 shuffles; the
// memory delivers 7.3 values per SM and cycle (132 SMs at 1.75 GHz), so issue stands at 69 % of 128 a cycle and the
// shuffles at 48 % of 32: memory is the bound, with less to spare than elsewhere. 56 registers: 9 thread blocks, 36 of
// 64 warps of an SM, each thread with 64 bytes in flight, 74 KB an SM where 3.4 TB/s and 800 ns ask for 20.
#include <cstring>

#include "common/check.h"
#include "common/cuda_device.h"
#include "common/cuda_vec.cuh"
#include "nf4/nf4.h"
#include "nf4/nf4_encode_buckets.h"

namespace pyfastpeft {
namespace {

constexpr int kTileValues = 4096;  // of a thread block
static_assert(kTileValues % kMaxBlocksize == 0, "a quantisation block lies in one tile");
constexpr int kWordValues = 8;

// How many neighbouring values a thread holds: 64 bytes of them.
template <typename T>
constexpr int kThreadValues = 64 / sizeof(T);
template <typename T>
constexpr int kThreads = kTileValues / kThreadValues<T>;
constexpr int kMaxWarps = kThreads<float> / kWarp;

// bucket(x) = x · scale + shift, rounded to an integer: what the adder does where floats are one apart.
constexpr float kOneApart = 0x1p23f;
constexpr float kNf4Scale = 15.0f, kNf4Shift = 16.0f, kFp4Scale = 31.0f, kFp4Shift = 0.0f;
static_assert(one_threshold_per_bucket(kNf4Thresholds, kNf4Scale, kNf4Shift + 0.5f), "NF4, over [-1, 1]");
static_assert(one_threshold_per_bucket(kFp4Thresholds, kFp4Scale, kFp4Shift + 0.5f), "FP4, over |x| in [0, 1]");
static_assert(-kNf4Scale + kNf4Shift >= 1 && kNf4Scale + kNf4Shift <= 31, "|x| may exceed 1 by its rounding");

__device__ EncodeBuckets quantize_buckets[2] = {
    encode_buckets(kNf4Thresholds, kNf4Scale, kNf4Shift + 0.5f, kNf4Codes),
    encode_buckets(kFp4Thresholds, kFp4Scale, kFp4Shift + 0.5f, kNf4Codes)};  // FP4: the rank, made a code below

// The bucket this lane keeps for its warp.
struct LaneBucket {
  float threshold;
  std::uint32_t below;
};
template <QuantType kType>
__device__ __forceinline__ LaneBucket lane_bucket() {
  const EncodeBuckets& all = quantize_buckets[int(kType)];
  return {all.threshold[threadIdx.x % kWarp], std::uint32_t(all.below[threadIdx.x % kWarp])};
}

// The packed word of values[first, first + 8); the warp's lanes call it together. Little endian: byte j holds values 2j
// (high nibble) and 2j + 1, so the values enter from the top nibble down in the order 6 7 4 5 2 3 0 1.
template <QuantType kType, int kValues>
__device__ __forceinline__ std::uint32_t encode(const float (&values)[kValues], int first, float scale,
                                                LaneBucket lane) {
  std::uint32_t ranks = 0, above = 0, negative = 0;  // above, negative: the top bit of each nibble counts
#pragma unroll
  for (int k = 0; k < kWordValues; ++k) {
    const float signed_x = __fmul_rn(values[first + (kWordValues - 2 - k / 2 * 2 + k % 2)], scale);
    const float x = kType == QuantType::nf4 ? signed_x : fabsf(signed_x);
    const float bucket = kType == QuantType::nf4 ? __fmaf_rn(x, kNf4Scale, kOneApart + kNf4Shift)
                                                 : __fmaf_rn(x, kFp4Scale, kOneApart + kFp4Shift);
    const int source = int(__float_as_uint(bucket));
    const float threshold = __shfl_sync(0xffffffffu, lane.threshold, source);
    ranks = ranks * 16 + __shfl_sync(0xffffffffu, lane.below, source);
    above = above << 4 | __float_as_uint(__fadd_rn(threshold, -x)) >> 28;
    if (kType == QuantType::fp4) negative = negative << 4 | __float_as_uint(signed_x) >> 28;
  }
  const std::uint32_t codes = ranks + (above >> 3 & 0x11111111u);
  if (kType == QuantType::nf4) return codes;
  // FP4: magnitudes of rank 0 to 7 have codes 0 1 6 7 4 5 2 3, so bit 2 flips where bit 1 is set; then the sign's 8,
  // but not for what rounds to zero
  static_assert(kFp4Ascending[2] == 6 && kFp4Ascending[3] == 7 && kFp4Ascending[4] == 4 && kFp4Ascending[7] == 3, "");
  const std::uint32_t not_zero = codes << 3 | codes << 2 | codes << 1;
  return (codes ^ (codes & 0x22222222u) << 1) | (negative & not_zero & 0x88888888u);
}

// Two values of 16 bits, the first in the low half.
template <typename T>
__device__ __forceinline__ float2 unpack(std::uint32_t pair) {
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {  // the upper half of an fp32
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  } else {
    __half2 halves;
    memcpy(&halves, &pair, sizeof halves);
    return __half22float2(halves);
  }
}

// values = weight[first, first + kValues) as fp32, zero from `left` on.
template <typename T, bool kWhole, int kValues>
__device__ __forceinline__ void load(const T* __restrict__ weight, unsigned first, std::int64_t left,
                                     float (&values)[kValues]) {
  if constexpr (kWhole) {
    constexpr int kChunks = kValues / Chunk<T>::kValues;
    uint4 chunks[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) chunks[c] = __ldcs(reinterpret_cast<const uint4*>(weight + first) + c);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const std::uint32_t words[4] = {chunks[c].x, chunks[c].y, chunks[c].z, chunks[c].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (sizeof(T) == 4) {
          values[4 * c + w] = __uint_as_float(words[w]);
        } else {
          const float2 two = unpack<T>(words[w]);
          values[8 * c + 2 * w] = two.x;
          values[8 * c + 2 * w + 1] = two.y;
        }
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = first + i < left ? as_f32(weight[first + i]) : 0.0f;
  }
}

// max |w| over the quantisation block this thread's values belong to, NaN if one of them is.
template <int kValues>
__device__ __forceinline__ float block_largest(const float (&values)[kValues], unsigned blocksize,
                                               float (&warp_largest)[kMaxWarps]) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) largest = kp::max_magnitude(largest, values[i]);
  const unsigned lanes = blocksize / kValues;  // that share it, unless it is more than a warp
#pragma unroll
  for (unsigned offset = 1; offset < kWarp; offset *= 2) {
    if (offset >= lanes) break;
    largest = kp::max_magnitude(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  }
  constexpr unsigned kWarpValues = kWarp * kValues;
  if (blocksize > kWarpValues) {
    const unsigned warp = threadIdx.x / kWarp, warps = blocksize / kWarpValues;  // 2 to 8 share a block
    if (threadIdx.x % kWarp == 0) warp_largest[warp] = largest;
    __syncthreads();
#pragma unroll 1
    for (unsigned w = 0; w < warps; ++w) largest = kp::max_magnitude(largest, warp_largest[(warp & ~(warps - 1)) + w]);
  }
  return largest;
}

// kWhole: the tile lies wholly below n and both pointers are aligned; else `left` says how many of the n values there
// are from the tile's first on. Pointers are those of the tile.
template <typename T, QuantType kType, bool kWhole>
__device__ __forceinline__ void quantize_tile(const T* __restrict__ weight, std::int64_t left, int log2_blocksize,
                                              float (&warp_largest)[kMaxWarps], std::uint8_t* __restrict__ packed,
                                              float* __restrict__ absmax, unsigned long long* __restrict__ bad) {
  constexpr int kValues = kThreadValues<T>, kWords = kValues / kWordValues;
  const unsigned blocksize = 1u << log2_blocksize, mine = threadIdx.x * kValues;
  float values[kValues];
  load<T, kWhole, kValues>(weight, mine, left, values);
  const LaneBucket lane = lane_bucket<kType>();
  const float largest = block_largest(values, blocksize, warp_largest);
  const float scale = __frcp_rn(fmaxf(largest, kAbsmaxFloor));
  std::uint32_t words[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) words[w] = encode<kType>(values, w * kWordValues, scale, lane);
  if constexpr (kWhole) {
    if constexpr (kWords == 4)
      reinterpret_cast<uint4*>(packed)[threadIdx.x] = make_uint4(words[0], words[1], words[2], words[3]);
    else
      reinterpret_cast<uint2*>(packed)[threadIdx.x] = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int j = 0; j < kValues / 2; ++j)  // values beyond n were zeros, so a last low nibble has the code of zero
      if (mine + 2 * j < left) packed[mine / 2 + j] = static_cast<std::uint8_t>(words[j / 4] >> (8 * (j % 4)));
  }
  if ((mine & (blocksize - 1)) == 0 && (kWhole || mine < left)) absmax[mine >> log2_blocksize] = largest;
  if (bad != nullptr && !(largest < INFINITY)) {
#pragma unroll 1
    for (unsigned i = mine; i < mine + kValues && (kWhole || i < left); ++i) {
      if (!(fabsf(as_f32(weight[i])) < INFINITY)) {
        atomicMin(bad, (unsigned long long)blockIdx.x * kTileValues + i);
        break;
      }
    }
  }
}

template <typename T, QuantType kType>
__global__ void __launch_bounds__(kThreads<T>) nf4_quantize_kernel(
    const T* __restrict__ weight,            // [n]
    std::int64_t n,                          //
    unsigned whole_tiles,                    // so many are below n and aligned: weight to 16, packed to 8
    int log2_blocksize,                      // 5 to 12
    std::uint8_t* __restrict__ packed,       // [packed_bytes(n)]
    float* __restrict__ absmax,              // [block_count(n, blocksize)]
    unsigned long long* __restrict__ bad) {  // lowered to the position of a NaN or infinity; or null
  KSHARED(float, warp_largest, [kMaxWarps]);
  const std::int64_t tile = std::int64_t(blockIdx.x) * kTileValues;
  weight += tile;
  packed += tile / 2;
  absmax += tile >> log2_blocksize;
  if (blockIdx.x < whole_tiles)
    quantize_tile<T, kType, true>(weight, kTileValues, log2_blocksize, warp_largest, packed, absmax, bad);
  else
    quantize_tile<T, kType, false>(weight, n - tile, log2_blocksize, warp_largest, packed, absmax, bad);
}

template <typename T>
void launch(QuantType type, const void* weight, std::int64_t n, std::int64_t blocksize, std::uint8_t* packed,
            float* absmax, std::int64_t* bad, void* stream) {
  const auto kernel =
      type == QuantType::nf4 ? nf4_quantize_kernel<T, QuantType::nf4> : nf4_quantize_kernel<T, QuantType::fp4>;
  int log2_blocksize = 0;
  while ((std::int64_t{1} << log2_blocksize) < blocksize) ++log2_blocksize;
  // a grid holds 2^31 - 1 blocks: enough for 2^43 values
  const bool aligned = is_aligned(weight, 16) && is_aligned(packed, 16);
  const cudaError_t error =
      KLAUNCH(kernel, unsigned(block_count(n, kTileValues)), kThreads<T>, 0, static_cast<cudaStream_t>(stream),
              static_cast<const T*>(weight), n, aligned ? unsigned(n / kTileValues) : 0u, log2_blocksize, packed,
              absmax, reinterpret_cast<unsigned long long*>(bad));
  check_cuda(error, "quantize_4bit", "launching nf4_quantize_kernel");
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
