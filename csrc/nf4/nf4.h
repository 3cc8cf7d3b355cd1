// Launchers of the 4-bit kernels: raw pointers, 64-bit sizes, no torch. The format is nf4_format.h.
//
// The callers (nf4_bind.cpp) have checked sizes, block sizes and pointers. n = 0 is allowed everywhere and does nothing.
// Results are the same bits on every instruction set and for every number of threads, whatever the caller has set the
// processor's flush-denormals flags to.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "nf4/nf4_format.h"

namespace pyfastpeft {

// The scale of each block, plain or double-quantised; a kernel reads it through nf4_decode_absmax.
struct Nf4Absmax {
  const float* plain;          // [blocks], or null when nested
  const std::uint8_t* codes;   // [blocks] nested only
  const float* nested_absmax;  // [ceil(blocks / 256)] nested only
  const float* nested_map;     // [256] nested only
  const float* offset;         // [1] nested only; a pointer, for on a GPU it lies in the GPU's memory
};

// out[i] = the fp32 absmax of block begin + i, for i in [0, count).
void nf4_decode_absmax(const Nf4Absmax& absmax, std::int64_t begin, std::int64_t count, float* out);

// Returns the flat position of the first NaN or infinity in the weight (the outputs are then unspecified), or -1.
std::int64_t nf4_quantize_cpu(const void* weight,      // [n] of `dtype`
                              DType dtype,             //
                              std::int64_t n,          //
                              std::int64_t blocksize,  // values, a power of two in [32, 4096]
                              QuantType type,          //
                              std::uint8_t* packed,    // [packed_bytes(n)]
                              float* absmax);          // [block_count(n, blocksize)]

// Enqueues the same on the current CUDA device. *bad is lowered to the flat position of the first NaN or infinity; the
// caller has set it to the largest int64 and reads it when the stream has come that far.
void nf4_quantize_cuda(const void* weight,      // [n] of `dtype`; this and what follows in device memory
                       DType dtype,             //
                       std::int64_t n,          //
                       std::int64_t blocksize,  // values, a power of two in [32, 4096]
                       QuantType type,          //
                       std::uint8_t* packed,    // [packed_bytes(n)]
                       float* absmax,           // [block_count(n, blocksize)]
                       std::int64_t* bad,       // [1], or null: then the codes of blocks with such values mean nothing
                       void* stream);           // cudaStream_t

// Double quantisation of the blocks' absmax: d = absmax - offset in blocks of 256, nested_absmax = max |d|,
// code = how many midpoints of neighbouring map entries lie strictly below d · (1 / max(nested_absmax, 1e-38)).
// Returns the position of the first absmax whose d is NaN or infinite, or -1.
std::int64_t nf4_quantize_absmax_cpu(const float* absmax,      // [blocks]
                                     std::int64_t blocks,      //
                                     float offset,             // mean of absmax
                                     const float* nested_map,  // [256] ascending
                                     std::uint8_t* codes,      // [blocks]
                                     float* nested_absmax);    // [ceil(blocks / 256)]

// Enqueues the same on the current CUDA device, and the map's copy; *bad as in nf4_quantize_cuda.
void nf4_quantize_absmax_cuda(const float* absmax,    // [blocks]; in device memory, as what follows but host_map
                              std::int64_t blocks,    //
                              const float* offset,    // [1] mean of absmax
                              const float* host_map,  // [256] ascending, in the host's memory: read before this returns
                              std::uint8_t* codes,    // [blocks]
                              float* nested_absmax,   // [ceil(blocks / 256)]
                              float* nested_map,      // [256] host_map on the device
                              std::int64_t* bad,      // [1] or null
                              void* stream);          // cudaStream_t

// out[i] = table[code(i)] · absmax(i / blocksize) in fp32, rounded once to out_dtype (to nearest even).
void nf4_dequantize_cpu(const std::uint8_t* packed,  // [packed_bytes(n)]
                        const Nf4Absmax& absmax,     // of block_count(n, blocksize) blocks
                        std::int64_t n,              //
                        std::int64_t blocksize,      // values, a power of two in [32, 4096]
                        QuantType type,              //
                        DType out_dtype,             //
                        void* out);                  // [n] of out_dtype

// Enqueues the same on the current CUDA device; every pointer, those of `absmax` included, in its memory.
void nf4_dequantize_cuda(const std::uint8_t* packed, const Nf4Absmax& absmax, std::int64_t n, std::int64_t blocksize,
                         QuantType type, DType out_dtype, void* out,
                         void* stream);  // cudaStream_t

}  // namespace pyfastpeft
