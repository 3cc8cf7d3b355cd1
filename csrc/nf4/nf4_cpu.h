// Between the CPU launchers and their variants: a variant works on a range of whole blocks, on the calling thread.
// The scalar variants are the specification; the others hand what does not fill a vector to them.
#pragma once

#include <cstdint>

#include "nf4/nf4.h"

namespace pyfastpeft {

struct Nf4QuantizeArgs {
  const void* weight;
  DType dtype;
  std::int64_t n;
  std::int64_t blocksize;
  QuantType type;
  std::uint8_t* packed;
  float* absmax;
};
// Quantises blocks [begin, end); returns the flat position of the first NaN or infinity in them, or -1.
using Nf4QuantizeBlocks = std::int64_t(const Nf4QuantizeArgs& args, std::int64_t begin, std::int64_t end);
Nf4QuantizeBlocks nf4_quantize_blocks_scalar;

struct Nf4DequantizeArgs {
  const std::uint8_t* packed;
  std::int64_t n;
  std::int64_t blocksize;
  QuantType type;
  DType dtype;
  void* out;
};
// Dequantises blocks [begin, end), absmax[i] being that of block begin + i.
using Nf4DequantizeBlocks = void(const Nf4DequantizeArgs& args, const float* absmax, std::int64_t begin,
                                 std::int64_t end);
Nf4DequantizeBlocks nf4_dequantize_blocks_scalar;

#if defined(__x86_64__)
Nf4QuantizeBlocks nf4_quantize_blocks_avx2, nf4_quantize_blocks_avx512;
Nf4DequantizeBlocks nf4_dequantize_blocks_avx2, nf4_dequantize_blocks_avx512;
#endif

}  // namespace pyfastpeft
