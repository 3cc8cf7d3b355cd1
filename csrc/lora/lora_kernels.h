// The bodies of the three products as templates over one vector type of common/vec.h; lora_cpu*.cpp instantiate them.
//
// Every operand passes through a small fp32 panel that stays in the L1 or L2 cache: the panel is where 16-bit inputs are
// widened and dropout is applied, once per element, so the inner loops are plain fp32 FMA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/philox_fill.h"
#include "common/vec.h"
#include "lora/lora_cpu.h"

namespace pyfastpeft {
namespace {

// keep iff the 32 random bits of the position are at least p·2^32
inline std::uint64_t lora_drop_threshold(double p) { return std::uint64_t(p * 4294967296.0 + 0.5); }

// values[i] = keep(begin + i) ? values[i] / (1 - p) : 0
inline void lora_drop_values(float* values, std::int64_t begin, std::int64_t count, const LoraDropout& drop) {
  constexpr std::int64_t kNumbers = 256;
  const std::uint64_t threshold = lora_drop_threshold(drop.p);
  if (threshold > 0xFFFFFFFFu) {
    std::fill(values, values + count, 0.0f);
    return;
  }
  const auto least = std::uint32_t(threshold);
  const float scale = float(1.0 / (1.0 - drop.p));
  std::uint32_t random[kNumbers];
  for (std::int64_t i = 0; i < count;) {
    const std::int64_t skip = (begin + i) % 4;  // numbers of the first counter that belong to what comes before
    const std::int64_t some = std::min(count - i, kNumbers - skip);
    constexpr std::int64_t kBlock = 4 * kPhiloxCounters;
    philox_fill(std::uint64_t(begin + i) / 4, (skip + some + kBlock - 1) / kBlock, drop.seed, random);
    for (std::int64_t j = 0; j < some; ++j) values[i + j] = random[skip + j] >= least ? values[i + j] * scale : 0.0f;
    i += some;
  }
}

// panel[0, count) = drop(x[begin, begin + count)) in fp32
template <typename V, typename T>
void lora_load_panel(const T* x, std::int64_t begin, std::int64_t count, const LoraDropout& drop, float* panel) {
  std::int64_t i = 0;
  for (; i + V::width <= count; i += V::width) V::load(x + begin + i).store(panel + i);
  if (i < count) store_part(load_part<V>(x + begin + i, count - i), panel + i, count - i);
  if (drop.p > 0.0) lora_drop_values(panel, begin, count, drop);
}

template <typename V>
float lora_sum(V value) {
  float lanes[V::width];
  value.store(lanes);
  for (int step = V::width / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// `rows` x `ranks` dot products over `count` values (a multiple of the width), added to out[row][rank].
template <typename V, int rows, int ranks>
void lora_dots(const float* panel, std::int64_t panel_stride, const float* a, std::int64_t a_stride, std::int64_t count,
               float* out, std::int64_t out_stride) {
  V sum[rows][ranks];
  for (auto& row : sum)
    for (auto& value : row) value = V::set(0.0f);
  for (std::int64_t k = 0; k < count; k += V::width) {
    V right[ranks];
    for (int r = 0; r < ranks; ++r) right[r] = V::load(a + r * a_stride + k);
    for (int m = 0; m < rows; ++m) {
      const V left = V::load(panel + m * panel_stride + k);
      for (int r = 0; r < ranks; ++r) sum[m][r] = V::fma(left, right[r], sum[m][r]);
    }
  }
  for (int m = 0; m < rows; ++m)
    for (int r = 0; r < ranks; ++r) out[m * out_stride + r] += lora_sum(sum[m][r]);
}

template <typename V, int rows>
void lora_dots_of_ranks(const float* panel, std::int64_t panel_stride, const float* a, std::int64_t a_stride,
                        std::int64_t count, std::int64_t ranks, float* out, std::int64_t out_stride) {
  std::int64_t r = 0;
  for (; r + 4 <= ranks; r += 4)
    lora_dots<V, rows, 4>(panel, panel_stride, a + r * a_stride, a_stride, count, out + r, out_stride);
  for (; r < ranks; ++r)
    lora_dots<V, rows, 1>(panel, panel_stride, a + r * a_stride, a_stride, count, out + r, out_stride);
}

constexpr std::int64_t kLoraChunk = 1024;  // values of a row in a panel: 4 rows are 16 KiB, half of the L1 cache
constexpr int kLoraRows = 4;

template <typename V>
void lora_shrink_rows(const LoraShrinkArgs& args, std::int64_t begin, std::int64_t end) {
  std::vector<float> panel(kLoraRows * kLoraChunk), tail(std::size_t(args.R * V::width));
  const std::int64_t whole = args.D / V::width * V::width;  // the rest of a row of A is padded into `tail`
  for (std::int64_t r = 0; r < args.R && whole < args.D; ++r)
    for (std::int64_t k = whole; k < args.D; ++k) tail[r * V::width + (k - whole)] = args.a[r * args.D + k];
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* x = static_cast<const T*>(args.x);
    for (std::int64_t m = begin; m < end; m += kLoraRows) {
      const std::int64_t rows = std::min<std::int64_t>(kLoraRows, end - m);
      float* s = args.s + m * args.R;
      std::fill(s, s + rows * args.R, 0.0f);
      const auto dots = [&](const float* a, std::int64_t a_stride, std::int64_t count) {
        if (rows == kLoraRows) {
          lora_dots_of_ranks<V, kLoraRows>(panel.data(), kLoraChunk, a, a_stride, count, args.R, s, args.R);
        } else {
          for (std::int64_t i = 0; i < rows; ++i)
            lora_dots_of_ranks<V, 1>(panel.data() + i * kLoraChunk, kLoraChunk, a, a_stride, count, args.R,
                                     s + i * args.R, args.R);
        }
      };
      // one lane sums what sixteen would: a shorter run keeps the error of its long chain down
      constexpr std::int64_t chunk = V::width == 1 ? 64 : kLoraChunk;
      for (std::int64_t k = 0; k < whole; k += chunk) {
        const std::int64_t count = std::min(chunk, whole - k);
        for (std::int64_t i = 0; i < rows; ++i)
          lora_load_panel<V>(x, (m + i) * args.D + k, count, args.drop, panel.data() + i * kLoraChunk);
        dots(args.a + k, args.D, count);
      }
      if (whole < args.D) {
        for (std::int64_t i = 0; i < rows; ++i) {
          float* row = panel.data() + i * kLoraChunk;
          std::fill(row, row + V::width, 0.0f);
          lora_load_panel<V>(x, (m + i) * args.D + whole, args.D - whole, args.drop, row);
        }
        dots(tail.data(), V::width, V::width);
      }
      for (std::int64_t i = 0; i < rows * args.R; ++i) s[i] *= args.alpha;
    }
  });
}

// out[row][0, count) = Σ_r s[row][r] · c[r][0, count), count a multiple of the width
template <typename V, int rows, int vectors>
void lora_outer(const float* s, std::int64_t ranks, const float* c, std::int64_t c_stride, float* out,
                std::int64_t out_stride) {
  V sum[rows][vectors];
  for (auto& row : sum)
    for (auto& value : row) value = V::set(0.0f);
  for (std::int64_t r = 0; r < ranks; ++r) {
    V right[vectors];
    for (int j = 0; j < vectors; ++j) right[j] = V::load(c + r * c_stride + j * V::width);
    for (int m = 0; m < rows; ++m) {
      const V left = V::set(s[m * ranks + r]);
      for (int j = 0; j < vectors; ++j) sum[m][j] = V::fma(left, right[j], sum[m][j]);
    }
  }
  for (int m = 0; m < rows; ++m)
    for (int j = 0; j < vectors; ++j) sum[m][j].store(out + m * out_stride + j * V::width);
}

template <typename V, int rows>
void lora_outer_of_columns(const float* s, std::int64_t ranks, const float* c, std::int64_t c_stride,
                           std::int64_t count, float* out, std::int64_t out_stride) {
  std::int64_t d = 0;
  for (; d + 4 * V::width <= count; d += 4 * V::width)
    lora_outer<V, rows, 4>(s, ranks, c + d, c_stride, out + d, out_stride);
  for (; d < count; d += V::width) lora_outer<V, rows, 1>(s, ranks, c + d, c_stride, out + d, out_stride);
}

template <typename V>
void lora_expand_rows(const LoraExpandArgs& args, std::int64_t begin, std::int64_t end) {
  std::vector<float> panel(kLoraRows * kLoraChunk), tail(std::size_t(args.R * V::width));
  const std::int64_t whole = args.D / V::width * V::width;
  for (std::int64_t r = 0; r < args.R && whole < args.D; ++r)
    for (std::int64_t d = whole; d < args.D; ++d) tail[r * V::width + (d - whole)] = args.c[r * args.D + d];
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* y = static_cast<T*>(args.y);
    for (std::int64_t m = begin; m < end; m += kLoraRows) {
      const std::int64_t rows = std::min<std::int64_t>(kLoraRows, end - m);
      const auto outer = [&](const float* c, std::int64_t c_stride, std::int64_t count) {
        if (rows == kLoraRows) {
          lora_outer_of_columns<V, kLoraRows>(args.s + m * args.R, args.R, c, c_stride, count, panel.data(),
                                              kLoraChunk);
        } else {
          for (std::int64_t i = 0; i < rows; ++i)
            lora_outer_of_columns<V, 1>(args.s + (m + i) * args.R, args.R, c, c_stride, count,
                                        panel.data() + i * kLoraChunk, kLoraChunk);
        }
      };
      const auto add = [&](std::int64_t d, std::int64_t count) {
        for (std::int64_t i = 0; i < rows; ++i) {
          float* row = panel.data() + i * kLoraChunk;
          const std::int64_t first = (m + i) * args.D + d;
          if (args.drop.p > 0.0) lora_drop_values(row, first, count, args.drop);
          std::int64_t j = 0;
          for (; j + V::width <= count; j += V::width) (V::load(y + first + j) + V::load(row + j)).store(y + first + j);
          if (j < count)
            store_part(load_part<V>(y + first + j, count - j) + V::load(row + j), y + first + j, count - j);
        }
      };
      for (std::int64_t d = 0; d < whole; d += kLoraChunk) {
        const std::int64_t count = std::min(kLoraChunk, whole - d);
        outer(args.c + d, args.D, count);
        add(d, count);
      }
      if (whole < args.D) {
        outer(tail.data(), V::width, V::width);
        add(whole, args.D - whole);
      }
    }
  });
}

// g[rank][0, vectors·width) += Σ_m p[m][rank] · panel[m][...]
template <typename V, int ranks, int vectors>
void lora_gather(const float* p, std::int64_t p_stride, const float* panel, std::int64_t panel_stride,
                 std::int64_t rows, float* g, std::int64_t g_stride) {
  V sum[ranks][vectors];
  for (auto& row : sum)
    for (auto& value : row) value = V::set(0.0f);
  for (std::int64_t m = 0; m < rows; ++m) {
    V right[vectors];
    for (int j = 0; j < vectors; ++j) right[j] = V::load(panel + m * panel_stride + j * V::width);
    for (int r = 0; r < ranks; ++r) {
      const V left = V::set(p[m * p_stride + r]);
      for (int j = 0; j < vectors; ++j) sum[r][j] = V::fma(left, right[j], sum[r][j]);
    }
  }
  for (int r = 0; r < ranks; ++r)
    for (int j = 0; j < vectors; ++j) {  // a sum per panel, then the sum of those: shorter chains, smaller error
      float* to = g + r * g_stride + j * V::width;
      (V::load(to) + sum[r][j]).store(to);
    }
}

template <typename V>
void lora_accumulate_columns(const LoraAccumulateArgs& args, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kWidth = kLoraColumnGroup, kPanelRows = 128;  // 128 x 64 floats: 32 KiB
  constexpr int kVectors = V::width >= 16 ? 4 : 2;
  static_assert(kWidth % (kVectors * V::width) == 0);
  std::vector<float> panel(kWidth * kPanelRows), sums(std::size_t(args.R * kWidth));
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* x = static_cast<const T*>(args.x);
    for (std::int64_t d = begin; d < end; d += kWidth) {
      const std::int64_t width = std::min(kWidth, end - d);
      std::fill(sums.begin(), sums.end(), 0.0f);
      if (width < kWidth) std::fill(panel.begin(), panel.end(), 0.0f);
      for (std::int64_t m = 0; m < args.M; m += kPanelRows) {
        const std::int64_t rows = std::min(kPanelRows, args.M - m);
        for (std::int64_t i = 0; i < rows; ++i)
          lora_load_panel<V>(x, (m + i) * args.D + d, width, args.drop, panel.data() + i * kWidth);
        for (std::int64_t j = 0; j < width; j += kVectors * V::width) {
          std::int64_t r = 0;
          for (; r + 4 <= args.R; r += 4)
            lora_gather<V, 4, kVectors>(args.p + m * args.R + r, args.R, panel.data() + j, kWidth, rows,
                                        sums.data() + r * kWidth + j, kWidth);
          for (; r < args.R; ++r)
            lora_gather<V, 1, kVectors>(args.p + m * args.R + r, args.R, panel.data() + j, kWidth, rows,
                                        sums.data() + r * kWidth + j, kWidth);
        }
      }
      for (std::int64_t r = 0; r < args.R; ++r) std::copy_n(sums.data() + r * kWidth, width, args.g + r * args.D + d);
    }
  });
}

}  // namespace
}  // namespace pyfastpeft
