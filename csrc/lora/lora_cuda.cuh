// What the CUDA kernels of the three low-rank products share: how the work is split, the dropout mask, 16-byte pieces.
#pragma once

#include <algorithm>

#include "common/check.h"
#include "common/cuda_device.h"
#include "common/cuda_vec.cuh"
#include "common/philox.h"
#include "lora/lora.h"

namespace pyfastpeft {

constexpr int kLoraThreads = 256, kLoraWarps = kLoraThreads / kWarp;
constexpr int kLoraRankTile = 64;  // ranks a block of the tensor-core kernels holds; more are further blocks or turns

// Sums are cut so that about this many blocks are at work, two on each of an H200's SMs; a constant, so that a result
// does not depend on the GPU.
constexpr std::int64_t kLoraBlocks = 264;
constexpr std::int64_t kMaxGridY = 65535;

inline std::int64_t lora_ceil_div(std::int64_t n, std::int64_t d) { return (n + d - 1) / d; }

// `total` steps of a sum in `parts` pieces of `steps`, the last one shorter, for a grid that has `blocks` without
// cutting.
struct LoraSplit {
  std::int64_t steps, parts;
};
inline LoraSplit lora_split(std::int64_t total, std::int64_t blocks) {
  const std::int64_t wanted =
      std::max<std::int64_t>(1, std::min(total, lora_ceil_div(kLoraBlocks, std::max<std::int64_t>(1, blocks))));
  const std::int64_t steps = std::max<std::int64_t>(1, lora_ceil_div(total, wanted));
  return {steps, std::max<std::int64_t>(1, lora_ceil_div(total, steps))};
}

// out[r·row_stride + c·column_stride] = Σ_part partial[part][r][c], in the order of the parts.
void lora_sum_parts(const float* partial, std::int64_t parts, std::int64_t rows, std::int64_t columns, float* out,
                    std::int64_t row_stride, std::int64_t column_stride, const char* op, cudaStream_t stream);

// ---- dropout --------------------------------------------------------------------------------------------------------

struct LoraMask {
  const std::uint64_t* seed;
  std::uint32_t least;  // a value is kept iff its random number is at least this
  bool nothing_kept;    // p = 1
  float scale;          // 1/(1-p); 1 without dropout
};
inline LoraMask lora_mask(const LoraDropoutCuda& drop) {
  if (drop.p <= 0) return {nullptr, 0, false, 1.0f};
  const auto threshold = std::uint64_t(drop.p * 4294967296.0 + 0.5);
  const bool nothing_kept = threshold > 0xFFFFFFFFu;
  return {reinterpret_cast<const std::uint64_t*>(drop.seed), std::uint32_t(threshold), nothing_kept,
          nothing_kept ? 0.0f : float(1.0 / (1.0 - drop.p))};
}

// Bit i: the value at flat position first + i is kept. Four random numbers come from one counter; unless `first` is a
// multiple of four, as kWhole says it is, the values straddle one more.
template <int kValues, bool kWhole>
__device__ __forceinline__ unsigned lora_kept(const LoraMask& mask, std::uint64_t key, std::int64_t first) {
  static_assert(kValues % 4 == 0 && kValues <= 8, "whole counters");
  if (mask.nothing_kept) return 0;
  const auto counter = std::uint64_t(first) / 4;
  unsigned bits = 0;
#pragma unroll
  for (int c = 0; c < kValues / 4 + (kWhole ? 0 : 1); ++c) {
    const Philox4 random = philox4x32_10(counter + c, 0, key);
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= unsigned(random.v[i] >= mask.least) << (4 * c + i);
  }
  return kWhole ? bits : bits >> (first & 3);
}

// ---- eight neighbours of a row --------------------------------------------------------------------------------------

// Whether rows start and end at multiples of 16 bytes: the tensor-core kernels ask for it, the others are faster so.
inline bool lora_vectors(const void* matrix, std::int64_t D, std::size_t itemsize) {
  return is_aligned(matrix, 16) && D * std::int64_t(itemsize) % 16 == 0;
}

// The bits of two rounded values, `low` in the low half.
template <typename T>
__device__ __forceinline__ std::uint32_t lora_pack(float low, float high) {
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
}

struct alignas(16) LoraEight {
  std::uint32_t words[4];  // eight 16-bit values
};

__device__ __forceinline__ void lora_zero_dropped(LoraEight& eight, unsigned kept) {
#pragma unroll
  for (int w = 0; w < 4; ++w)
    eight.words[w] &= (kept >> (2 * w) & 1u) * 0xFFFFu | (kept >> (2 * w + 1) & 1u) * 0xFFFF0000u;
}

// values = row[first, first + kValues) in fp32, zero from `end` on.
template <int kValues, typename T>
__device__ __forceinline__ void lora_load_f32(const T* __restrict__ row, std::int64_t first, std::int64_t end,
                                              bool vectors, float (&values)[kValues]) {
  constexpr int kChunk = Chunk<T>::kValues;
  if (kValues % kChunk == 0 && vectors && first + kValues <= end) {
#pragma unroll
    for (int c = 0; c < kValues; c += kChunk) {
      const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(row + first + c);
#pragma unroll
      for (int i = 0; i < kChunk && c + i < kValues; ++i) values[c + i] = as_f32(chunk.values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = first + i < end ? as_f32(row[first + i]) : 0.0f;
  }
}

}  // namespace pyfastpeft
