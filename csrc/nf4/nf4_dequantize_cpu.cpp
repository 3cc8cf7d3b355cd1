// NF4 / FP4 dequantisation: the launcher and the scalar kernel, which is the specification of the vector ones.
//
// Moves n/2 + 4n/blocksize bytes in (n/2 + n/blocksize when double-quantised) and n·sizeof(T) out. The absmax of a run
// of blocks is decoded into a small array on the stack just before use, so nested statistics cost no pass of their own.
// Tried and lost: non-temporal stores (Zen 4, outputs of 4 to 117 MB: no faster, and the reader after it slower).
#include <algorithm>

#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "common/subnormals.h"
#include "nf4/nf4_cpu.h"

namespace pyfastpeft {
namespace {

constexpr std::int64_t kGrainValues = 16384;  // below this a second thread costs more than it brings
constexpr std::int64_t kRun = 256;            // blocks whose absmax is decoded at a time: 1 KiB of stack

template <typename T>
void dequantize_blocks(const Nf4DequantizeArgs& args, const float* absmax, std::int64_t begin, std::int64_t end) {
  const float* table = args.type == QuantType::nf4 ? kNf4Table : kFp4Table;
  T* out = static_cast<T*>(args.out);
  for (std::int64_t block = begin; block < end; ++block) {
    T level[16];
    for (int code = 0; code < 16; ++code) level[code] = from_f32<T>(table[code] * absmax[block - begin]);
    const std::int64_t first = block * args.blocksize, last = std::min(args.n, first + args.blocksize);
    for (std::int64_t i = first; i + 1 < last; i += 2) {
      const std::uint8_t byte = args.packed[i / 2];
      out[i] = level[even_code(byte)];
      out[i + 1] = level[odd_code(byte)];
    }
    if (last % 2 != 0) out[last - 1] = level[even_code(args.packed[last / 2])];
  }
}

Nf4DequantizeBlocks* variant() {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  if (isa >= CpuIsa::avx512) return nf4_dequantize_blocks_avx512;
  if (isa >= CpuIsa::avx2) return nf4_dequantize_blocks_avx2;
#endif
  return nf4_dequantize_blocks_scalar;
}

}  // namespace

void nf4_dequantize_blocks_scalar(const Nf4DequantizeArgs& args, const float* absmax, std::int64_t begin,
                                  std::int64_t end) {
  dispatch(args.dtype, [&](auto tag) { dequantize_blocks<typename decltype(tag)::type>(args, absmax, begin, end); });
}

void nf4_decode_absmax(const Nf4Absmax& absmax, std::int64_t begin, std::int64_t count, float* out) {
  if (absmax.plain != nullptr) {
    std::copy_n(absmax.plain + begin, count, out);
    return;
  }
  const std::int64_t end = begin + count;
  while (begin < end) {  // up to the next nested block at a time: its scale is one number
    const std::int64_t stop = std::min(end, (begin / kNestedBlocksize + 1) * kNestedBlocksize);
    const float scale = absmax.nested_absmax[begin / kNestedBlocksize];
    for (; begin < stop; ++begin) *out++ = absmax.nested_map[absmax.codes[begin]] * scale + *absmax.offset;
  }
}

void nf4_dequantize_cpu(const std::uint8_t* packed, const Nf4Absmax& absmax, std::int64_t n, std::int64_t blocksize,
                        QuantType type, DType out_dtype, void* out) {
  const Nf4DequantizeArgs args{packed, n, blocksize, type, out_dtype, out};
  Nf4DequantizeBlocks* const dequantize = variant();
  parallel_for(block_count(n, blocksize), kGrainValues / blocksize, [&](std::int64_t begin, std::int64_t end) {
    const KeepSubnormals keep;
    float decoded[kRun];
    for (std::int64_t block = begin; block < end; block += kRun) {
      const std::int64_t run = std::min(kRun, end - block);
      nf4_decode_absmax(absmax, block, run, decoded);
      dequantize(args, decoded, block, block + run);
    }
  });
}

}  // namespace pyfastpeft
