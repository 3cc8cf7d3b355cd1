// The bodies of the three products as templates over one vector type of common/vec.h; lora_cpu*.cpp instantiate them.
//
// Inputs of the shrink and of the accumulation pass through a small fp32 panel that stays in the L1 cache: the panel is
// where 16-bit values are widened and the mask is applied, once per value, so the inner loops are plain fp32 FMA. The
// expansion keeps its sums in registers until they are added to y.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/philox_fill.h"
#include "common/vec.h"
#include "lora/lora_cpu.h"

namespace pyfastpeft {
namespace {

// bit i: random[i] >= least
inline std::uint32_t lora_bits32(const std::uint32_t* random, std::uint32_t least) {
#if defined(__AVX512F__)
  const __m512i limit = _mm512_set1_epi32(int(least));
  return std::uint32_t(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(random), limit)) |
         std::uint32_t(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(random + 16), limit)) << 16;
#else
  std::uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= std::uint32_t(random[i] >= least) << i;
  return bits;
#endif
}

inline void lora_mask_rows(std::uint64_t first, std::int64_t D, double p, std::uint64_t seed, std::uint32_t* bits,
                           std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kNumbers = 256, kBlock = 4 * kPhiloxCounters;
  const std::int64_t words = lora_mask_words(D);
  const auto threshold = std::uint64_t(p * 4294967296.0 + 0.5);
  if (threshold > 0xFFFFFFFFu) {
    std::fill(bits + begin * words, bits + end * words, 0u);
    return;
  }
  std::uint32_t random[kNumbers + kBlock + 32] = {};
  for (std::int64_t m = begin; m < end; ++m)
    for (std::int64_t d = 0; d < D; d += kNumbers) {
      const std::uint64_t position = first + std::uint64_t(m * D + d);
      const auto skip = std::int64_t(position % 4);  // numbers of the first counter that belong to what comes before
      const std::int64_t some = std::min(D - d, kNumbers);
      philox_fill(position / 4, (skip + some + kBlock - 1) / kBlock, seed, random);
      std::uint32_t* to = bits + m * words + d / 32;
      for (std::int64_t i = 0; i < some; i += 32) {
        const std::uint32_t whole = lora_bits32(random + skip + i, std::uint32_t(threshold));
        *to++ = some - i < 32 ? whole & ((1u << (some - i)) - 1) : whole;
      }
    }
}

// zeros those of values[0, count) that `bits`, a row of a mask, drops from column d on
inline void lora_apply_mask(float* values, const std::uint32_t* bits, std::int64_t d, std::int64_t count) {
  std::int64_t i = 0;
  for (; i < count && (d + i) % 32 != 0; ++i)
    if ((bits[(d + i) / 32] >> ((d + i) % 32) & 1) == 0) values[i] = 0.0f;
  for (; i + 32 <= count; i += 32) {
    const std::uint32_t word = bits[(d + i) / 32];
    for (int j = 0; j < 32; ++j) values[i + j] = word >> j & 1 ? values[i + j] : 0.0f;
  }
  for (; i < count; ++i)
    if ((bits[(d + i) / 32] >> ((d + i) % 32) & 1) == 0) values[i] = 0.0f;
}

// panel[0, count) = x[begin, begin + count) in fp32
template <typename V, typename T>
void lora_load_panel(const T* x, std::int64_t begin, std::int64_t count, float* panel) {
  std::int64_t i = 0;
  for (; i + V::width <= count; i += V::width) V::load(x + begin + i).store(panel + i);
  if (i < count) store_part(load_part<V>(x + begin + i, count - i), panel + i, count - i);
}

// panel[0, count) = row m of x [M, D] from column d on, masked but not scaled
template <typename V, typename T>
void lora_load_masked(const T* x, std::int64_t m, std::int64_t D, std::int64_t d, std::int64_t count,
                      const LoraMaskBits& mask, float* panel) {
  lora_load_panel<V>(x, m * D + d, count, panel);
  if (mask.bits != nullptr) lora_apply_mask(panel, mask.row(m), d, count);
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
          lora_load_masked<V>(x, m + i, args.D, k, count, args.mask, panel.data() + i * kLoraChunk);
        dots(args.a + k, args.D, count);
      }
      if (whole < args.D) {
        for (std::int64_t i = 0; i < rows; ++i) {
          float* row = panel.data() + i * kLoraChunk;
          std::fill(row, row + V::width, 0.0f);
          lora_load_masked<V>(x, m + i, args.D, whole, args.D - whole, args.mask, row);
        }
        dots(tail.data(), V::width, V::width);
      }
      for (std::int64_t i = 0; i < rows * args.R; ++i) s[i] *= args.alpha * args.mask.scale;
    }
  });
}

// out[row][0, count) = Σ_r s[row][r] · c[r][0, count), count a multiple of the width (segmented_lora's)
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

// y[row][0, vectors·width) += keep(Σ_r s[row][r] · c[r][...]) · scale; c in a group of packed columns. `count` of the
// columns are there: all of them, or fewer than a vector.
template <typename V, typename T, int rows, int vectors>
void lora_outer_add(const LoraExpandArgs& args, std::int64_t m, std::int64_t d, const float* c, std::int64_t count) {
  V sum[rows][vectors];
  for (auto& row : sum)
    for (auto& value : row) value = V::set(0.0f);
  const float* s = args.s + m * args.R;
  for (std::int64_t r = 0; r < args.R; ++r) {
    V right[vectors];
    for (int j = 0; j < vectors; ++j) right[j] = V::load(c + r * kLoraColumnGroup + j * V::width);
    for (int i = 0; i < rows; ++i) {
      const V left = V::set(s[i * args.R + r]);
      for (int j = 0; j < vectors; ++j) sum[i][j] = V::fma(left, right[j], sum[i][j]);
    }
  }
  const V scale = V::set(args.mask.scale);
  for (int i = 0; i < rows; ++i) {
    T* y = static_cast<T*>(args.y) + (m + i) * args.D + d;
    const std::uint32_t* bits = args.mask.row(m + i);
    for (int j = 0; j < vectors; ++j) {
      const std::int64_t column = d + j * V::width;
      if (bits != nullptr) sum[i][j] = V::keep(sum[i][j] * scale, bits[column / 32] >> (column % 32));
      if (count >= V::width)
        (V::load(y + j * V::width) + sum[i][j]).store(y + j * V::width);
      else
        store_part(load_part<V>(y, count) + sum[i][j], y, count);
    }
  }
}

// One group of packed columns, from column d on, of `rows` rows from m on.
template <typename V, typename T, int rows>
void lora_outer_of_group(const LoraExpandArgs& args, std::int64_t m, std::int64_t d, const float* c) {
  constexpr int kVectors = V::width >= 16 ? 4 : 2;  // 6 x 4 sums of 32 registers, 6 x 2 of 16
  const std::int64_t count = std::min(kLoraColumnGroup, args.D - d);
  std::int64_t j = 0;
  for (; j + kVectors * V::width <= count; j += kVectors * V::width)
    lora_outer_add<V, T, rows, kVectors>(args, m, d + j, c + j, kVectors * V::width);
  for (; j < count; j += V::width) lora_outer_add<V, T, rows, 1>(args, m, d + j, c + j, count - j);
}

template <typename V>
void lora_expand_rows(const LoraExpandArgs& args, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kRows = 6;
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    std::int64_t m = begin;
    for (; m + kRows <= end; m += kRows)
      for (std::int64_t d = 0; d < args.D; d += kLoraColumnGroup)
        lora_outer_of_group<V, T, kRows>(args, m, d, args.packed_c + d * args.R);
    for (; m < end; ++m)
      for (std::int64_t d = 0; d < args.D; d += kLoraColumnGroup)
        lora_outer_of_group<V, T, 1>(args, m, d, args.packed_c + d * args.R);
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

// g from sums [groups][R][64]: columns [begin, end), scaled
inline void lora_write_columns(const LoraAccumulateArgs& args, const float* sums, std::int64_t begin,
                               std::int64_t end) {
  const float scale = args.mask.scale;
  for (std::int64_t d = begin; d < end; d += kLoraColumnGroup, sums += args.R * kLoraColumnGroup) {
    const std::int64_t width = std::min(kLoraColumnGroup, end - d);
    float* g = args.g + d * args.g_column_stride;
    if (args.g_column_stride == 1) {
      for (std::int64_t r = 0; r < args.R; ++r)
        for (std::int64_t j = 0; j < width; ++j) g[r * args.g_rank_stride + j] = sums[r * kLoraColumnGroup + j] * scale;
    } else {
      for (std::int64_t j = 0; j < width; ++j)
        for (std::int64_t r = 0; r < args.R; ++r)
          g[r * args.g_rank_stride + j * args.g_column_stride] = sums[r * kLoraColumnGroup + j] * scale;
    }
  }
}

// A block of rows after the other, so that x is read in runs; the sums of all columns of the range wait beside it.
template <typename V>
void lora_accumulate_columns(const LoraAccumulateArgs& args, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kWidth = 2 * kLoraColumnGroup, kPanelRows = 64;  // 64 x 128 floats: 32 KiB
  constexpr int kVectors = V::width >= 16 ? 4 : 2;
  static_assert(kLoraColumnGroup % (kVectors * V::width) == 0);
  const std::int64_t groups = (end - begin + kLoraColumnGroup - 1) / kLoraColumnGroup;
  std::vector<float> panel(kWidth * kPanelRows), sums(std::size_t(groups * args.R * kLoraColumnGroup), 0.0f);
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* x = static_cast<const T*>(args.x);
    for (std::int64_t m = 0; m < args.M; m += kPanelRows) {
      const std::int64_t rows = std::min(kPanelRows, args.M - m);
      for (std::int64_t d = begin; d < end; d += kWidth) {
        const std::int64_t width = std::min(kWidth, end - d);
        const std::int64_t padded = (width + kLoraColumnGroup - 1) / kLoraColumnGroup * kLoraColumnGroup;
        for (std::int64_t i = 0; i < rows; ++i) {
          float* row = panel.data() + i * kWidth;
          lora_load_masked<V>(x, m + i, args.D, d, width, args.mask, row);
          std::fill(row + width, row + padded, 0.0f);
        }
        for (std::int64_t j = 0; j < padded; j += kVectors * V::width) {
          float* to =
              sums.data() + (d - begin + j) / kLoraColumnGroup * args.R * kLoraColumnGroup + j % kLoraColumnGroup;
          std::int64_t r = 0;
          for (; r + 4 <= args.R; r += 4)
            lora_gather<V, 4, kVectors>(args.p + m * args.R + r, args.R, panel.data() + j, kWidth, rows,
                                        to + r * kLoraColumnGroup, kLoraColumnGroup);
          for (; r < args.R; ++r)
            lora_gather<V, 1, kVectors>(args.p + m * args.R + r, args.R, panel.data() + j, kWidth, rows,
                                        to + r * kLoraColumnGroup, kLoraColumnGroup);
        }
      }
    }
  });
  lora_write_columns(args, sums.data(), begin, end);
}

}  // namespace
}  // namespace pyfastpeft
