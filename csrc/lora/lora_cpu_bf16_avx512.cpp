// Shrink and accumulation of bf16 x by vdpbf16ps, which multiplies 32 pairs where an fp32 FMA multiplies 16.
//
// The fp32 operand goes in as two bf16 numbers, high = bf16(a) and low = bf16(a - high): 16 bits of it, so a product is
// a·x·(1 + e) with |e| <= 2^-18 before the fp32 sums, where x is exact as it is. (bf16 alone: 2^-9. Values of a below
// 1e-36 lose their low part and x below 1.2e-38 counts as 0: the instruction knows no subnormal numbers.)
//
// Two products replace two FMAs, so the arithmetic costs what fp32's does (2 M D R flops at the fp32 rate); what is saved
// are the widening of x and its fp32 panel, and half the bytes of x in the caches. Lanes are ranks in the shrink (no sum
// across lanes) and columns in the accumulation.
//   shrink       bytes: x once, A's two parts (4 R D) once per 12 rows, from the L2 cache
//   accumulate   bytes: x once, its interleaved panel (64 KiB) from the L2 cache once per 8 ranks
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/vec.h"
#include "lora/lora_cpu.h"

namespace pyfastpeft {
namespace {

struct Parts {
  __m512i high, low;  // bf16 in the upper halves of the lanes, zeros below
};

__m512i rounded(__m512 value) {
  const __m512i u = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_and_si512(up, _mm512_set1_epi32(int(0xffff0000u)));
}

Parts split(__m512 value) {
  const __mmask16 special = _mm512_fpclass_ps_mask(value, 0x99);  // infinities and NaNs have no low part
  const __m512i quiet = _mm512_and_si512(_mm512_castps_si512(_mm512_add_ps(value, value)),
                                         _mm512_set1_epi32(int(0xffff0000u)));  // the sum makes NaNs quiet
  const __m512i high = _mm512_mask_mov_epi32(rounded(value), special, quiet);
  const __m512i low = rounded(_mm512_sub_ps(value, _mm512_castsi512_ps(high)));
  return {high, _mm512_mask_mov_epi32(low, special, _mm512_setzero_si512())};
}

// lane i: even[i] in the lower half, odd[i] in the upper
__m512i paired(__m512i even, __m512i odd) { return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd); }

// ---- shrink ---------------------------------------------------------------------------------------------------------
//
// Packed A: for each 16 ranks, for each pair of columns, 16 lanes of high parts and 16 of low ones. A last group of at
// most 8 ranks has both in one vector, 8 lanes each.

constexpr std::int64_t kRanks = 16;
constexpr std::int64_t kChunk = 512;               // columns of a panel of x
constexpr std::int64_t kStride = kChunk / 2 + 16;  // pairs: rows begin in different sets of the L1 cache

bool is_mixed(std::int64_t ranks) { return ranks <= 8; }

std::int64_t packed_pairs(std::int64_t D) { return (D + 1) / 2; }

// sums[row][16] += rows of the panel times a; 12, 8 or 4 chains of products, one or two a step
template <int rows, bool mixed>
void shrink_panel(const std::uint32_t* panel, const std::uint32_t* a, std::int64_t pairs, float* sums,
                  std::int64_t sums_stride) {
  __m512 sum[rows];
  for (int i = 0; i < rows; ++i) sum[i] = _mm512_loadu_ps(sums + i * sums_stride);
  for (std::int64_t k = 0; k < pairs; ++k) {
    const auto high = __m512bh(_mm512_loadu_si512(a + k * (mixed ? 16 : 32)));
    __m512i x[rows];
    for (int i = 0; i < rows; ++i) {
      x[i] = _mm512_set1_epi32(int(panel[i * kStride + k]));
      sum[i] = _mm512_dpbf16_ps(sum[i], __m512bh(x[i]), high);
    }
    if (!mixed) {
      const auto low = __m512bh(_mm512_loadu_si512(a + k * 32 + 16));
      for (int i = 0; i < rows; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], __m512bh(x[i]), low);
    }
  }
  for (int i = 0; i < rows; ++i) _mm512_storeu_ps(sums + i * sums_stride, sum[i]);
}

template <bool mixed>
void shrink_rows(std::int64_t rows, const std::uint32_t* panel, const std::uint32_t* a, std::int64_t pairs, float* sums,
                 std::int64_t sums_stride) {
  if (rows > 8)
    shrink_panel<12, mixed>(panel, a, pairs, sums, sums_stride);
  else if (rows > 4)
    shrink_panel<8, mixed>(panel, a, pairs, sums, sums_stride);
  else
    shrink_panel<4, mixed>(panel, a, pairs, sums, sums_stride);
}

__m512i load_masked(const bf16* x, std::int64_t count, const std::uint32_t* bits) {
  const __mmask32 there = count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
  return _mm512_maskz_loadu_epi16(bits == nullptr ? there : there & *bits, x);
}

}  // namespace

std::int64_t lora_packed_bytes_avx512(std::int64_t D, std::int64_t R) {
  const std::int64_t rest = R % kRanks, vectors = R / kRanks * 2 + (rest == 0 ? 0 : is_mixed(rest) ? 1 : 2);
  return vectors * packed_pairs(D) * 64;
}

void lora_pack_bf16_avx512(const LoraFactor& a, std::int64_t D, std::int64_t R, void* packed) {
  constexpr std::int64_t kBlock = 64;
  auto* to = static_cast<std::uint32_t*>(packed);
  float block[kBlock][kRanks];
  for (std::int64_t r = 0; r < R; r += kRanks) {
    const std::int64_t ranks = std::min(kRanks, R - r);
    std::memset(block, 0, sizeof block);
    for (std::int64_t d = 0; d < D; d += kBlock) {
      const std::int64_t columns = std::min(kBlock, D - d);
      const float* from = a.values + r * a.rank_stride + d * a.column_stride;
      if (columns % 2 != 0) std::memset(block[columns], 0, sizeof block[columns]);
      if (a.column_stride == 1) {
        for (std::int64_t i = 0; i < ranks; ++i)
          for (std::int64_t j = 0; j < columns; ++j) block[j][i] = from[i * a.rank_stride + j];
      } else {
        for (std::int64_t j = 0; j < columns; ++j)
          for (std::int64_t i = 0; i < ranks; ++i) block[j][i] = from[i * a.rank_stride + j * a.column_stride];
      }
      for (std::int64_t j = 0; j < columns; j += 2) {
        const Parts even = split(_mm512_loadu_ps(block[j])), odd = split(_mm512_loadu_ps(block[j + 1]));
        const __m512i high = paired(even.high, odd.high), low = paired(even.low, odd.low);
        if (is_mixed(ranks)) {
          _mm512_storeu_si512(to, _mm512_inserti64x4(high, _mm512_castsi512_si256(low), 1));
          to += 16;
        } else {
          _mm512_storeu_si512(to, high);
          _mm512_storeu_si512(to + 16, low);
          to += 32;
        }
      }
    }
  }
}

void lora_shrink_rows_bf16_avx512(const LoraShrinkArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t groups = (args.R + kRanks - 1) / kRanks, width = groups * kRanks, pairs = packed_pairs(args.D);
  std::vector<std::uint32_t> panel(std::size_t(kLoraBf16Rows * kStride));
  std::vector<float> sums(std::size_t(kLoraBf16Rows * width));
  const auto* x = static_cast<const bf16*>(args.x);
  const auto* packed = static_cast<const std::uint32_t*>(args.packed_a);
  const float alpha = args.alpha * args.mask.scale;
  for (std::int64_t m = begin; m < end; m += kLoraBf16Rows) {
    const std::int64_t rows = std::min(kLoraBf16Rows, end - m);
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (std::int64_t d = 0; d < args.D; d += kChunk) {
      const std::int64_t columns = std::min(kChunk, args.D - d);
      for (std::int64_t i = 0; i < rows; ++i) {
        const bf16* row = x + (m + i) * args.D + d;
        const std::uint32_t* bits = args.mask.row(m + i);
        for (std::int64_t j = 0; j < columns; j += 32)
          _mm512_storeu_si512(panel.data() + i * kStride + j / 2,
                              load_masked(row + j, columns - j, bits == nullptr ? nullptr : bits + (d + j) / 32));
      }
      const std::uint32_t* a = packed;
      for (std::int64_t g = 0; g < groups; ++g) {
        const bool mixed = is_mixed(args.R - g * kRanks);
        const std::int64_t step = mixed ? 16 : 32;
        (mixed ? shrink_rows<true> : shrink_rows<false>)(rows, panel.data(), a + d / 2 * step, (columns + 1) / 2,
                                                         sums.data() + g * kRanks, width);
        a += pairs * step;
      }
    }
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t r = 0; r < args.R; ++r) {
        const float* from = sums.data() + i * width + r;
        const bool mixed = is_mixed(args.R - r / kRanks * kRanks);
        args.s[(m + i) * args.R + r] = (mixed ? from[0] + from[8] : from[0]) * alpha;
      }
  }
}

// ---- accumulation ---------------------------------------------------------------------------------------------------
//
// Packed P: for each 8 ranks, for each pair of rows, 8 pairs of high parts and 8 of low ones.

namespace {

constexpr std::int64_t kGroup = 8;
constexpr std::int64_t kPanelRows = 64, kPanelColumns = 512;

struct alignas(64) Vector {
  __m512i v;
};

// sums[rank][32] += Σ over pairs of rows; the panel holds 32 columns of each pair in two vectors
template <int ranks>
void accumulate_panel(const Vector* panel, const std::uint32_t* p, std::int64_t pairs, float* sums) {
  __m512 sum[ranks][2];
  for (auto& row : sum) row[0] = row[1] = _mm512_setzero_ps();
  for (std::int64_t m = 0; m < pairs; ++m) {
    const auto left = __m512bh(panel[2 * m].v), right = __m512bh(panel[2 * m + 1].v);
    for (int part = 0; part < 2; ++part)
      for (int r = 0; r < ranks; ++r) {
        const auto value = __m512bh(_mm512_set1_epi32(int(p[(2 * m + part) * kGroup + r])));
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], value, left);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], value, right);
      }
  }
  for (int r = 0; r < ranks; ++r)  // a sum per panel, then the sum of those: shorter chains, smaller error
    for (int j = 0; j < 2; ++j) {
      float* to = sums + r * kLoraColumnGroup + j * 16;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[r][j]));
    }
}

}  // namespace

std::int64_t lora_packed_rows_bytes_avx512(std::int64_t M, std::int64_t R) {
  return (R + kGroup - 1) / kGroup * ((M + 1) / 2) * 2 * kGroup * 4;
}

void lora_pack_rows_bf16_avx512(const float* p, std::int64_t M, std::int64_t R, void* packed) {
  auto* to = static_cast<std::uint32_t*>(packed);
  for (std::int64_t r = 0; r < R; r += kGroup) {
    const auto there = __mmask16((1u << std::min(kGroup, R - r)) - 1);
    for (std::int64_t m = 0; m < M; m += 2, to += 2 * kGroup) {
      const Parts even = split(_mm512_maskz_loadu_ps(there, p + m * R + r));
      const Parts odd = split(_mm512_maskz_loadu_ps(m + 1 < M ? there : __mmask16{0}, p + (m + 1) * R + r));
      const __m512i high = paired(even.high, odd.high), low = paired(even.low, odd.low);
      _mm512_storeu_si512(to, _mm512_inserti64x4(high, _mm512_castsi512_si256(low), 1));
    }
  }
}

void lora_accumulate_columns_bf16_avx512(const LoraAccumulateArgs& args, std::int64_t begin, std::int64_t end) {
  const __m512i first =
      _mm512_add_epi32(_mm512_set1_epi32(32 << 16),
                       _mm512_mullo_epi32(_mm512_set1_epi32(0x10001),
                                          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(0x100010));
  const std::int64_t all_pairs = (args.M + 1) / 2, groups = (end - begin + kLoraColumnGroup - 1) / kLoraColumnGroup;
  constexpr std::int64_t kPairs = kPanelRows / 2;
  std::vector<Vector> panel(std::size_t(kPanelColumns / 32 * kPairs * 2));
  const std::int64_t ranks = (args.R + kGroup - 1) / kGroup * kGroup;  // sums of ranks that are not there: zeros
  std::vector<float> sums(std::size_t(groups * ranks * kLoraColumnGroup), 0.0f);
  const auto* x = static_cast<const bf16*>(args.x);
  const auto* p = static_cast<const std::uint32_t*>(args.packed_p);
  for (std::int64_t m = 0; m < args.M; m += kPanelRows) {
    const std::int64_t rows = std::min(kPanelRows, args.M - m), pairs = (rows + 1) / 2;
    for (std::int64_t d = begin; d < end; d += kPanelColumns) {
      const std::int64_t columns = std::min(kPanelColumns, end - d);
      for (std::int64_t i = 0; i < rows; i += 2) {
        const bf16* row = x + (m + i) * args.D + d;
        const bool both = i + 1 < rows;
        const std::uint32_t *bits = args.mask.row(m + i), *bits1 = both ? args.mask.row(m + i + 1) : nullptr;
        for (std::int64_t j = 0; j < columns; j += 32) {
          const std::int64_t word = (d + j) / 32;
          const __m512i even = load_masked(row + j, columns - j, bits == nullptr ? nullptr : bits + word);
          const __m512i odd =
              both ? load_masked(row + args.D + j, columns - j, bits1 == nullptr ? nullptr : bits1 + word)
                   : _mm512_setzero_si512();
          Vector* to = panel.data() + (j / 32 * kPairs + i / 2) * 2;
          to[0].v = _mm512_permutex2var_epi16(even, first, odd);
          to[1].v = _mm512_permutex2var_epi16(even, second, odd);
        }
      }
      for (std::int64_t j = 0; j < columns; j += 32) {
        float* to = sums.data() + (d - begin + j) / kLoraColumnGroup * ranks * kLoraColumnGroup + j % kLoraColumnGroup;
        const Vector* from = panel.data() + j / 32 * kPairs * 2;
        for (std::int64_t r = 0; r < args.R; r += kGroup) {
          const std::uint32_t* left = p + (r / kGroup * all_pairs + m / 2) * 2 * kGroup;
          (args.R - r > 4 ? accumulate_panel<8> : accumulate_panel<4>)(from, left, pairs, to + r * kLoraColumnGroup);
        }
      }
    }
  }
  for (std::int64_t d = begin; d < end; ++d) {
    const float* from =
        sums.data() + (d - begin) / kLoraColumnGroup * ranks * kLoraColumnGroup + (d - begin) % kLoraColumnGroup;
    for (std::int64_t r = 0; r < args.R; ++r)
      args.g[r * args.g_rank_stride + d * args.g_column_stride] = from[r * kLoraColumnGroup] * args.mask.scale;
  }
}

}  // namespace pyfastpeft
