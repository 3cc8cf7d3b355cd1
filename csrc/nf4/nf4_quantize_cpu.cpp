// NF4 / FP4 quantisation: the launcher and the scalar kernel, which is the specification of the vector ones.
//
// Moves n·sizeof(T) bytes in and n/2 + 4n/blocksize out; each thread owns a run of whole blocks.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "common/subnormals.h"
#include "nf4/nf4_cpu.h"

namespace pyfastpeft {
namespace {

constexpr std::int64_t kGrainValues = 16384;  // below this a second thread costs more than it brings

// The magnitudes of floats order as their bits do, with infinity and every NaN above all numbers: one integer maximum
// gives absmax and tells whether the block holds something that has no code.
constexpr std::uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;

template <typename T>
std::int64_t quantize_blocks(const Nf4QuantizeArgs& args, std::int64_t begin, std::int64_t end) {
  const T* weight = static_cast<const T*>(args.weight);
  const auto encode = [&](float x) {
    return args.type == QuantType::nf4 ? encode_nf4(x, kNf4Thresholds) : encode_fp4(x, kFp4Thresholds, kFp4Ascending);
  };
  for (std::int64_t block = begin; block < end; ++block) {
    const std::int64_t first = block * args.blocksize, last = std::min(args.n, first + args.blocksize);
    std::uint32_t largest = 0;
    for (std::int64_t i = first; i < last; ++i)
      largest = std::max(largest, f32_to_bits(to_f32(weight[i])) & kMagnitude);
    if (largest >= kInfinity) {
      std::int64_t i = first;
      while ((f32_to_bits(to_f32(weight[i])) & kMagnitude) < kInfinity) ++i;
      return i;
    }
    const float absmax = bits_to_f32(largest);
    const float scale = 1.0f / std::max(absmax, kAbsmaxFloor);
    args.absmax[block] = absmax;
    for (std::int64_t i = first; i < last; i += 2) {
      const std::uint8_t even = encode(to_f32(weight[i]) * scale);
      const std::uint8_t odd = i + 1 < last ? encode(to_f32(weight[i + 1]) * scale) : zero_code(args.type);
      args.packed[i / 2] = pack(even, odd);
    }
  }
  return -1;
}

Nf4QuantizeBlocks* variant() {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  if (isa >= CpuIsa::avx512) return nf4_quantize_blocks_avx512;
  if (isa >= CpuIsa::avx2) return nf4_quantize_blocks_avx2;
#endif
  return nf4_quantize_blocks_scalar;
}

}  // namespace

std::int64_t nf4_quantize_blocks_scalar(const Nf4QuantizeArgs& args, std::int64_t begin, std::int64_t end) {
  std::int64_t bad = -1;
  dispatch(args.dtype, [&](auto tag) { bad = quantize_blocks<typename decltype(tag)::type>(args, begin, end); });
  return bad;
}

std::int64_t nf4_quantize_cpu(const void* weight, DType dtype, std::int64_t n, std::int64_t blocksize, QuantType type,
                              std::uint8_t* packed, float* absmax) {
  const Nf4QuantizeArgs args{weight, dtype, n, blocksize, type, packed, absmax};
  Nf4QuantizeBlocks* const quantize = variant();
  constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::max();
  std::atomic<std::int64_t> first_bad{kNone};
  parallel_for(block_count(n, blocksize), kGrainValues / blocksize, [&](std::int64_t begin, std::int64_t end) {
    const KeepSubnormals keep;
    const std::int64_t bad = quantize(args, begin, end);
    if (bad < 0) return;
    std::int64_t seen = first_bad.load();
    while (bad < seen && !first_bad.compare_exchange_weak(seen, bad)) {
    }
  });
  return first_bad == kNone ? -1 : first_bad.load();
}

}  // namespace pyfastpeft
