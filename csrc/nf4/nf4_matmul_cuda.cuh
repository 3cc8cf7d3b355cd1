// What the two 4-bit matmul kernels share: the table of byte pairs in shared memory, a lane's piece of a weight row, and
// the epilogue.
#pragma once

#include "nf4/nf4_decode_cuda.cuh"
#include "nf4/nf4_matmul_cuda.h"

namespace pyfastpeft {

// A byte's two levels at entry byte, kept once per lane: with 256-byte entries each lane reads its own two banks, so
// random bytes never conflict, and the address byte · 256 + lane · 8 is one byte permutation of the packed word. 64 KiB.
constexpr int kPairEntryBytes = 256;
constexpr int kPairTableBytes = 256 * kPairEntryBytes;

// All threads of the block together; a __syncthreads() belongs behind it. A warp writes the 16 bytes of one high nibble
// after another: the levels are loaded once, side by side, and nothing waits between the stores.
__device__ __forceinline__ void fill_pair_table(unsigned char* table, QuantType type) {
  const float* levels = quant_levels[int(type)];
  float low[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) low[i] = levels[i];
  for (int high = threadIdx.x / kWarp; high < 16; high += blockDim.x / kWarp) {
    const float level = levels[high];
    unsigned char* entries = table + high * 16 * kPairEntryBytes + threadIdx.x % kWarp * 8;
#pragma unroll
    for (int i = 0; i < 16; ++i) *reinterpret_cast<float2*>(entries + i * kPairEntryBytes) = make_float2(level, low[i]);
  }
}

// The levels of one of the word's four bytes: .x of its high nibble, the earlier value. lane8 is 8 · lane.
__device__ __forceinline__ float2 pair_levels(const unsigned char* table, std::uint32_t word, std::uint32_t lane8,
                                              int byte) {
  // the address's bytes: lane8's lowest, the word's, two of lane8's zeros
  return *reinterpret_cast<const float2*>(table + __byte_perm(word, lane8, 0x5504u | (byte << 4)));
}

// 32 neighbouring values of one weight row as they were loaded; the scale is decoded when it is used, so that nothing
// waits for its loads before.
struct Piece {
  uint4 bytes;
  float coarse;  // absmax, or the nested absmax
  int code;      // nested only
};

// Of row n from input k on, both inside W: who is beyond an edge gives the nearest place inside, and either has no x
// other than zero or throws the sum away. Fewer than 2^32 blocks, rows and columns up to 2^30: nf4_fits_kernels.
template <bool kNested>
__device__ __forceinline__ Piece load_piece(const Nf4Matrix& w, int log2_blocksize, int n, int k) {
  Piece piece;
  const std::uint64_t first = std::uint64_t(n) * std::uint32_t(w.K) + k;
  piece.bytes = __ldg(reinterpret_cast<const uint4*>(w.packed + first / 2));
  const auto block = std::uint32_t(first >> log2_blocksize);
  if constexpr (kNested) {
    piece.code = w.absmax.codes[block];
    piece.coarse = w.absmax.nested_absmax[block / kNestedBlocksize];
  } else {
    piece.code = 0;
    piece.coarse = w.absmax.plain[block];
  }
  return piece;
}
template <bool kNested>
__device__ __forceinline__ float piece_scale(const Nf4Matrix& w, float offset, const Piece& piece) {
  if constexpr (kNested) {
    return nested_scale(__ldg(w.absmax.nested_map + piece.code), piece.coarse, offset);
  } else {
    return piece.coarse;
  }
}

// The finished value of column n. The low-rank term is in the sum already.
__device__ __forceinline__ float finish(const Nf4Epilogue& e, float sum, std::int64_t n) {
  if (e.bias != nullptr) sum += e.bias[n];
  return e.scale != nullptr ? sum * e.scale[n] : sum;
}

inline int log2_of(std::int64_t power) {
  int log2 = 0;
  while ((std::int64_t{1} << log2) < power) ++log2;
  return log2;
}

}  // namespace pyfastpeft
