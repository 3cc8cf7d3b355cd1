// The 4-bit matmul on the CPU: launchers, thread split, and the scalar variant.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "common/check.h"
#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "nf4/nf4_matvec_kernel.h"

namespace pyfastpeft {
namespace {

constexpr std::int64_t kGrainValues = 16384;  // of W, below which a second thread costs more than it brings
constexpr std::int64_t kGrainPacked = 65536;  // the same for values of x to pack
constexpr std::int64_t kRowGroup = 4;         // of W's rows, that a thread's range begins at a multiple of
constexpr std::int64_t kRun = 64;             // blocks whose absmax is decoded at a time

const Nf4MatvecVariant& variant(const Nf4Matrix& w, DType dtype) {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  const bool whole = nf4_whole_groups(w);
  if (isa >= CpuIsa::avx512) {
    if (!whole) return nf4_matvec_any_avx512;
    return dtype == DType::bf16 ? nf4_matvec_bf16_avx512 : nf4_matvec_f32_avx512;
  }
  if (isa >= CpuIsa::avx2) return whole ? nf4_matvec_f32_avx2 : nf4_matvec_any_avx2;
#endif
  return nf4_matvec_any_scalar;
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

const Nf4MatvecVariant nf4_matvec_any_scalar = {nf4_pack_any<VecScalar>, nf4_matvec_rows<VecScalar>, kNf4MatvecPad, 4};

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

void nf4_matvec_cpu(const Nf4Matrix& w, const void* x, std::int64_t M, const float* bias, const Nf4LowRank& low,
                    DType dtype, void* y) {
  const Nf4MatvecVariant& way = variant(w, dtype);
  const std::int64_t stride = (w.K + way.pad - 1) / way.pad * way.pad;
  const std::int64_t s_stride = (low.R + kNf4MatvecPad - 1) / kNf4MatvecPad * kNf4MatvecPad;
  // 64 bytes more, so that packed rows can begin at a cache line
  const std::unique_ptr<char[]> space(new char[std::size_t(M * stride * way.size + 64)]);
  char* const packed = space.get() + (64 - reinterpret_cast<std::uintptr_t>(space.get()) % 64) % 64;
  const std::int64_t part = nf4_part(M), parts = (M + part - 1) / part;
  parallel_for(parts, kGrainPacked / (part * stride + 1) + 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      way.pack(static_cast<const char*>(x) + i * part * w.K * size_of(dtype), dtype, w.K, stride,
               std::min(part, M - i * part), packed + i * part * stride * way.size);
  });
  std::vector<float> s(std::size_t(M * s_stride));
  for (std::int64_t m = 0; m < M && low.R > 0; ++m) std::copy_n(low.s + m * low.R, low.R, s.data() + m * s_stride);
  const Nf4MatvecArgs args{&w, packed, M, stride, {bias, s.data(), low.b, low.R, s_stride}, dtype, y};
  // whole groups of rows: a panel is then cut in the same way for every number of threads
  const std::int64_t groups = (w.N + kRowGroup - 1) / kRowGroup;
  parallel_for(groups, kGrainValues / (w.K * kRowGroup + 1) + 1, [&](std::int64_t begin, std::int64_t end) {
    way.rows(args, begin * kRowGroup, std::min(w.N, end * kRowGroup));
  });
}

void nf4_decode_values(const Nf4Matrix& w, std::int64_t first, std::int64_t count, DType dtype, void* out) {
  Nf4DequantizeBlocks* const dequantize = dequantize_variant();
  const std::int64_t end = first + count, block = w.blocksize, bytes = size_of(dtype);
  char* to = static_cast<char*>(out);
  float absmax[kRun], scales[kRun];
  alignas(64) char edge[kNf4Group * 4];
  // a long block is decoded as short ones of one scale
  const std::int64_t size = std::min(block, kNf4Group);
  for (std::int64_t at = first; at < end;) {
    const std::int64_t origin = at / size * size;
    const bool part = at != origin || end - at < size;
    const std::int64_t pieces = part ? 1 : std::min(kRun, (end - at) / size);
    const std::int64_t from = origin / block, blocks = (origin + pieces * size - 1) / block - from + 1;
    nf4_decode_absmax(w.absmax, from, blocks, absmax);
    for (std::int64_t i = 0; i < pieces; ++i) scales[i] = absmax[(origin + i * size) / block - from];
    dequantize({w.packed + origin / 2, w.N * w.K - origin, size, w.type, dtype, part ? edge : to}, scales, 0, pieces);
    const std::int64_t done = std::min(end, origin + pieces * size) - at;
    if (part) std::memcpy(to, edge + (at - origin) * bytes, std::size_t(done * bytes));
    at += done;
    to += done * bytes;
  }
}

namespace {

const Nf4PanelVariant* panel_variant() {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
#if defined(PYFASTPEFT_HAS_AMX)
  if (isa >= CpuIsa::amx) return &nf4_panel_amx;
#endif
  if (isa >= CpuIsa::avx512) return &nf4_panel_avx512;
#endif
  return nullptr;
}

constexpr std::int64_t kPanelBytes = 4 << 20;  // of packed x at a time, and little more
constexpr std::int64_t kPanelGrain = 1 << 20;  // products, below which a second thread costs more than it brings

}  // namespace

bool nf4_panel_available() { return panel_variant() != nullptr; }

void nf4_panel_cpu(const Nf4Matrix& w, const bf16* x, std::int64_t M, const float* bias, const Nf4LowRank& low,
                   bf16* y) {
  const Nf4PanelVariant* const way = panel_variant();
  check(way != nullptr, "linear_4bit: the bf16 panel kernel needs AVX-512 BF16 or AMX, this is ",
        cpu_isa_name(cpu_isa()));
  const std::int64_t low_rank = nf4_panel_columns(w, low.R).low_rank, columns = nf4_panel_columns(w, low.R).end;
  const std::int64_t by_size = kPanelBytes / 2 / std::max<std::int64_t>(columns, 1) / 32 * 32;
  const std::int64_t step = std::min(M, std::min(way->tokens, std::max<std::int64_t>(by_size, 64)));
  if (step == 0 || w.N == 0) return;
  const std::unique_ptr<char[]> space(new char[std::size_t((step + 15) / 16 * 16 * columns * 2 + 64)]);
  bf16* const v = reinterpret_cast<bf16*>(space.get() + (64 - reinterpret_cast<std::uintptr_t>(space.get()) % 64) % 64);
  for (std::int64_t m = 0; m < M; m += step) {
    const Nf4PanelArgs args{&w,
                            x + m * w.K,
                            std::min(step, M - m),
                            bias,
                            low.R > 0 ? low.s + m * low.R : nullptr,
                            low.b,
                            low.R,
                            low_rank,
                            columns,
                            v,
                            y + m * w.N};
    parallel_for((args.M + 15) / 16, kGrainPacked / (16 * columns + 1) + 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t group = begin; group < end; ++group) way->pack(args, group);
    });
    const std::int64_t groups = (w.N + 15) / 16;
    parallel_for(groups, kPanelGrain / (16 * columns * args.M + 1) + 1,
                 [&](std::int64_t begin, std::int64_t end) { way->rows(args, 16 * begin, std::min(w.N, 16 * end)); });
  }
}

}  // namespace pyfastpeft
