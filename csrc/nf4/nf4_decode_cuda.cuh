// Reading 4-bit weights on the GPU: levels from a register table, scales of blocks plain or double-quantised. The same
// arithmetic, and so the same bits, as nf4_dequantize_cpu.cpp.
//
// The 16 levels lie one per lane (twice in a warp) and are fetched by a shuffle: a shift, a shuffle and a product per
// value, no bank conflicts, no shared memory. A shared table of 256 pairs costs a third of the look-ups but conflicts
// three ways on random bytes.
#pragma once

#include "common/cuda_vec.cuh"
#include "nf4/nf4.h"

namespace pyfastpeft {

constexpr int kWordValues = 8;  // values in 32 packed bits

static __constant__ float nf4_levels[16] = {PYFASTPEFT_NF4_TABLE};
static __constant__ float fp4_levels[16] = {PYFASTPEFT_FP4_TABLE};

// This lane's level: the table's entry lane % 16. Every lane of the warp keeps one for level_of.
__device__ __forceinline__ float lane_level(QuantType type) {
  const int entry = threadIdx.x % 16;
  return type == QuantType::nf4 ? nf4_levels[entry] : fp4_levels[entry];
}

// levels[i] = the level of value i of the word; the warp's lanes call it together, each with its own word. Little
// endian: byte j holds value 2j in its high nibble and 2j + 1 in its low one. (A shuffle of width 16 reads only the low
// four bits of its source lane, so the nibble needs no mask.)
__device__ __forceinline__ void decode_word(std::uint32_t word, float lane_level, float (&levels)[kWordValues]) {
#pragma unroll
  for (int j = 0; j < kWordValues / 2; ++j) {
    levels[2 * j] = __shfl_sync(0xffffffffu, lane_level, int(word >> (8 * j + 4)), 16);
    levels[2 * j + 1] = __shfl_sync(0xffffffffu, lane_level, int(word >> (8 * j)), 16);
  }
}

// The absmax of quantisation block `block`. Nested: two roundings, a product and a sum, as the format says. `map` is
// absmax.nested_map, or a copy of it in shared memory.
template <bool kNested>
__device__ __forceinline__ float block_scale(const Nf4Absmax& absmax, const float* map, float offset,
                                             std::int64_t block) {
  if constexpr (kNested) {
    const float coarse = absmax.nested_absmax[block / kNestedBlocksize];
    return __fadd_rn(__fmul_rn(map[absmax.codes[block]], coarse), offset);
  } else {
    return absmax.plain[block];
  }
}

}  // namespace pyfastpeft
