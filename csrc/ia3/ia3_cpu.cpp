// (IA)³ scaling on the CPU: cuts [M, D] into tiles, hands them to threads, and adds up the column sums.
//
// Bytes moved: forward x + y, backward grad_y + x + grad_x; the partial sums add 4 bytes per 64 rows.
#include <vector>

#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "common/subnormals.h"
#include "ia3/ia3.h"
#include "ia3/ia3_kernel.h"

namespace pyfastpeft {
namespace {

constexpr std::int64_t kTileRows = 64, kTileColumns = 16384;
constexpr std::int64_t kGrain = 1 << 15;      // values per thread at least
constexpr std::int64_t kNarrowColumns = 512;  // contiguous rows are joined up to about this many columns

const Ia3Kernels kScalar = ia3_kernels<VecScalar>();

const Ia3Kernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case CpuIsa::scalar:
      return kScalar;
    case CpuIsa::avx2:
      return ia3_kernels_avx2;
    case CpuIsa::avx512:
    case CpuIsa::amx:
      return ia3_kernels_avx512;
  }
#endif
  return kScalar;
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// [M, D] as tiles. Narrow contiguous rows are joined, `joined` to a row, the scale repeated as often: D = 1 then runs
// at full vector width. The bounds depend on the shape only.
struct Tiling {
  std::int64_t M, D;          // of a joined row
  std::int64_t last_columns;  // of the last, possibly shorter, joined row
  std::int64_t joined;
  std::int64_t runs, blocks;  // tiles down and across
  Tiling(std::int64_t rows, std::int64_t columns, bool contiguous) {
    joined = contiguous ? std::max<std::int64_t>(1, std::min(rows, kNarrowColumns / columns)) : 1;
    M = ceil_div(rows, joined);
    D = columns * joined;
    last_columns = columns * (rows - (M - 1) * joined);
    runs = ceil_div(M, kTileRows);
    blocks = ceil_div(D, kTileColumns);
  }
  // Calls f(run, first_row, rows, first_column, columns) for each tile, a shorter last row as a tile of its own.
  template <typename F>
  void for_each_tile(F&& f) const {
    const std::int64_t tile_values = std::max<std::int64_t>(1, M * D / (runs * blocks));
    parallel_for(runs * blocks, std::max<std::int64_t>(1, kGrain / tile_values),
                 [&](std::int64_t begin, std::int64_t end) {
                   const KeepSubnormals keep;
                   for (std::int64_t i = begin; i < end; ++i) {
                     const std::int64_t run = i / blocks, column = (i % blocks) * kTileColumns;
                     const std::int64_t first = run * kTileRows, last = std::min(M, first + kTileRows);
                     const std::int64_t columns = std::min(D, column + kTileColumns) - column;
                     const bool ragged = last == M && last_columns < D;
                     f(run, first, last - first - (ragged ? 1 : 0), column, columns);
                     const std::int64_t rest = std::min(last_columns - column, columns);
                     if (ragged && rest > 0) f(run, M - 1, std::int64_t{1}, column, rest);
                   }
                 });
  }
};

std::vector<float> repeat(const float* scale, std::int64_t D, std::int64_t times) {
  std::vector<float> out;
  out.reserve(std::size_t(D * times));
  for (std::int64_t i = 0; i < times; ++i) out.insert(out.end(), scale, scale + D);
  return out;
}

template <typename T>
T* offset(T* base, std::int64_t elements, std::size_t size) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return base == nullptr ? nullptr : reinterpret_cast<Byte*>(base) + elements * std::int64_t(size);
}

std::size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace

void ia3_scale_cpu(const void* x, const float* scale, void* y, std::int64_t M, std::int64_t D, std::int64_t x_stride,
                   DType dtype) {
  if (M == 0 || D == 0) return;
  const Ia3Kernel kernel = kernels().forward[int(dtype)];
  const std::size_t size = size_of(dtype);
  const Tiling tiling(M, D, x_stride == D);
  if (tiling.joined > 1) x_stride = tiling.D;
  const std::vector<float> repeated = repeat(scale, tiling.joined > 1 ? D : 0, tiling.joined);
  if (tiling.joined > 1) scale = repeated.data();
  tiling.for_each_tile(
      [&](std::int64_t, std::int64_t row, std::int64_t rows, std::int64_t column, std::int64_t columns) {
        kernel({nullptr, 0, offset(x, row * x_stride + column, size), x_stride, scale + column,
                offset(y, row * tiling.D + column, size), tiling.D, nullptr, rows, columns});
      });
}

void ia3_scale_backward_cpu(const void* grad_y, const void* x, const float* scale, void* grad_x, float* grad_scale,
                            std::int64_t M, std::int64_t D, std::int64_t grad_stride, std::int64_t x_stride,
                            DType dtype) {
  if (D == 0) return;
  if (M == 0) {
    if (grad_scale) std::fill(grad_scale, grad_scale + D, 0.0f);
    return;
  }
  const Ia3Kernel kernel = kernels().backward[int(dtype)];
  const std::size_t size = size_of(dtype);
  const Tiling tiling(M, D, grad_stride == D && (x_stride == D || grad_scale == nullptr));
  if (tiling.joined > 1) grad_stride = x_stride = tiling.D;
  const std::vector<float> repeated = repeat(scale, tiling.joined > 1 ? D : 0, tiling.joined);
  if (tiling.joined > 1) scale = repeated.data();
  std::vector<float> sums(grad_scale ? std::size_t(tiling.runs * tiling.D) : 0, 0.0f);
  tiling.for_each_tile(
      [&](std::int64_t run, std::int64_t row, std::int64_t rows, std::int64_t column, std::int64_t columns) {
        kernel({offset(grad_y, row * grad_stride + column, size), grad_stride, offset(x, row * x_stride + column, size),
                x_stride, scale + column, offset(grad_x, row * tiling.D + column, size), tiling.D,
                grad_scale ? sums.data() + run * tiling.D + column : nullptr, rows, columns});
      });
  if (grad_scale == nullptr) return;
  parallel_for(D, std::max<std::int64_t>(16, kGrain / (tiling.runs * tiling.joined)),
               [&](std::int64_t begin, std::int64_t end) {
                 const KeepSubnormals keep;
                 std::vector<double> total(std::size_t(end - begin), 0.0);
                 for (std::int64_t i = 0; i < tiling.runs * tiling.joined; ++i)
                   for (std::int64_t d = begin; d < end; ++d)
                     total[std::size_t(d - begin)] += sums[std::size_t(i * D + d)];
                 for (std::int64_t d = begin; d < end; ++d) grad_scale[d] = float(total[std::size_t(d - begin)]);
               });
}

}  // namespace pyfastpeft
