// Reading 4-bit weights on the GPU: levels from a table in registers, scales of blocks plain or double-quantised. The
// same arithmetic, and so the same bits, as nf4_dequantize_cpu.cpp.
//
// The 16 levels lie one per lane (twice in a warp) and are fetched by a shuffle: a shift, a shuffle and a product per
// value, no bank conflicts, no shared memory. What else there is, per value and SM (128 instructions a cycle, of them
// 64 integer ones; 32 lanes of shuffle or shared memory):
//   16 fp32 levels in shared memory   as many lanes, never a conflict (16 words in 16 banks), but a mask and a barrier
//   256 pairs in shared memory        half the look-ups of twice the width, 3-way conflicts on random bytes
//   byte permutes of the table        no look-up at all, but 5 or more integer instructions
#pragma once

#include "common/cuda_vec.cuh"
#include "nf4/nf4.h"

namespace pyfastpeft {

constexpr int kWordValues = 8;  // values in 32 packed bits

// In device memory, not in constant memory: 32 lanes read 16 different entries, which constant memory serves one by
// one.
static __device__ float quant_levels[2][16] = {{PYFASTPEFT_NF4_TABLE}, {PYFASTPEFT_FP4_TABLE}};

// This lane's level: the table's entry lane % 16. Every lane of the warp keeps one for decode_values.
__device__ __forceinline__ float lane_level(QuantType type) { return quant_levels[int(type)][threadIdx.x % 16]; }

// levels[i] = the level of value i of the word; the warp's lanes call it together, each with its own word. Little
// endian: byte j holds value 2j in its high nibble and 2j + 1 in its low one. (A shuffle of width 16 reads only the low
// four bits of its source lane, so the nibble needs no mask.)
template <int kValues>
__device__ __forceinline__ void decode_values(std::uint32_t word, float lane_level, float (&levels)[kValues]) {
  static_assert(kValues % 2 == 0 && kValues <= kWordValues, "whole bytes of one word");
#pragma unroll
  for (int j = 0; j < kValues / 2; ++j) {
    levels[2 * j] = __shfl_sync(0xffffffffu, lane_level, int(word >> (8 * j + 4)), 16);
    levels[2 * j + 1] = __shfl_sync(0xffffffffu, lane_level, int(word >> (8 * j)), 16);
  }
}
__device__ __forceinline__ void decode_word(std::uint32_t word, float lane_level, float (&levels)[kWordValues]) {
  decode_values(word, lane_level, levels);
}

// Nested: two roundings, a product and a sum, as the format says. `coarse` is the nested_absmax of the block's 256.
__device__ __forceinline__ float nested_scale(float level, float coarse, float offset) {
  return __fadd_rn(__fmul_rn(level, coarse), offset);
}

// The absmax of quantisation block `block`. `map` is absmax.nested_map, or a copy of it in shared memory; offset is
// *absmax.offset.
template <bool kNested>
__device__ __forceinline__ float block_scale(const Nf4Absmax& absmax, const float* map, float offset,
                                             std::int64_t block) {
  if constexpr (kNested) {
    const float coarse = absmax.nested_absmax[std::uint64_t(block) / kNestedBlocksize];
    return nested_scale(map[absmax.codes[block]], coarse, offset);
  } else {
    return absmax.plain[block];
  }
}

}  // namespace pyfastpeft
