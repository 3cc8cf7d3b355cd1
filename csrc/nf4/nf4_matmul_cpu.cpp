// The 4-bit matmul on the CPU: launchers, thread split, and the scalar variant.
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "nf4/nf4_matvec_kernel.h"

namespace pyfastpeft {
namespace {

constexpr std::int64_t kGrainValues = 16384;  // of W, below which a second thread costs more than it brings
constexpr std::int64_t kRun = 64;             // blocks whose absmax is decoded at a time

Nf4MatvecRows* matvec_variant() {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  if (isa >= CpuIsa::avx512) return nf4_matvec_rows_avx512;
  if (isa >= CpuIsa::avx2) return nf4_matvec_rows_avx2;
#endif
  return nf4_matvec_rows_scalar;
}

Nf4DequantizeBlocks* dequantize_variant() {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  if (isa >= CpuIsa::avx512) return nf4_dequantize_blocks_avx512;
  if (isa >= CpuIsa::avx2) return nf4_dequantize_blocks_avx2;
#endif
  return nf4_dequantize_blocks_scalar;
}

std::int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace

void nf4_decode_blocks(const Nf4Matrix& w, std::int64_t first, std::int64_t blocks, DType dtype, void* out) {
  Nf4DequantizeBlocks* const dequantize = dequantize_variant();
  float absmax[kRun];
  for (std::int64_t done = 0; done < blocks; done += kRun) {
    const std::int64_t run = std::min(kRun, blocks - done), begin = (first + done) * w.blocksize;
    nf4_decode_absmax(w.absmax, first + done, run, absmax);
    // the blocks of this run as an array of their own, which starts where they do
    dequantize({w.packed + begin / 2, w.N * w.K - begin, w.blocksize, w.type, dtype,
                static_cast<char*>(out) + done * w.blocksize * size_of(dtype)},
               absmax, 0, run);
  }
}

void nf4_matvec_rows_scalar(const Nf4MatvecArgs& args, std::int64_t begin, std::int64_t end) {
  nf4_matvec_rows<VecScalar>(args, begin, end);
}

void nf4_dequantize_tile_cpu(const Nf4Matrix& w, std::int64_t row, std::int64_t rows, std::int64_t col,
                             std::int64_t cols, DType out_dtype, void* out) {
  const std::int64_t size = size_of(out_dtype);
  const bool whole_blocks = w.K % w.blocksize == 0 && col % w.blocksize == 0 && cols % w.blocksize == 0;
  parallel_for(rows, kGrainValues / (cols + 1) + 1, [&](std::int64_t begin, std::int64_t end) {
    const KeepSubnormals keep;
    std::vector<char> scratch(whole_blocks ? 0 : std::size_t((cols + 2 * w.blocksize) * size));
    for (std::int64_t i = begin; i < end; ++i) {
      char* to = static_cast<char*>(out) + i * cols * size;
      const std::int64_t from = (row + i) * w.K + col, first = from / w.blocksize;
      const std::int64_t blocks = (from + cols + w.blocksize - 1) / w.blocksize - first;
      if (whole_blocks) {
        nf4_decode_blocks(w, first, blocks, out_dtype, to);
      } else {
        nf4_decode_blocks(w, first, blocks, out_dtype, scratch.data());
        std::memcpy(to, scratch.data() + (from - first * w.blocksize) * size, std::size_t(cols * size));
      }
    }
  });
}

void nf4_matvec_cpu(const Nf4Matrix& w, const void* x, std::int64_t M, const float* bias, DType dtype, void* y) {
  const std::int64_t stride = (w.K + kNf4MatvecPad - 1) / kNf4MatvecPad * kNf4MatvecPad;
  std::vector<float> wide(std::size_t(M * stride)), sums(dtype == DType::f32 ? 0 : std::size_t(M * w.N));
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (std::int64_t m = 0; m < M; ++m)
      for (std::int64_t k = 0; k < w.K; ++k) wide[m * stride + k] = to_f32(static_cast<const T*>(x)[m * w.K + k]);
  });
  const Nf4MatvecArgs args{&w,     wide.data(), M,
                           stride, bias,        dtype == DType::f32 ? static_cast<float*>(y) : sums.data()};
  Nf4MatvecRows* const rows = matvec_variant();
  parallel_for(w.N, kGrainValues / (w.K + 1) + 1,
               [&](std::int64_t begin, std::int64_t end) { rows(args, begin, end); });
  if (dtype == DType::f32) return;
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (std::int64_t i = 0; i < M * w.N; ++i) static_cast<T*>(y)[i] = from_f32<T>(sums[i]);
  });
}

}  // namespace pyfastpeft
