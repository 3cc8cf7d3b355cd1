// Between the matmul launcher and its variants: a variant works on a range of W's rows, on the calling thread.
#pragma once

#include "nf4/nf4_cpu.h"
#include "nf4/nf4_matmul.h"

namespace pyfastpeft {

// What is added to each dot product before its one rounding.
struct Nf4Added {
  const float* bias;  // [N] or null
  const float* s;     // [M, s_stride]: the low-rank path's S, rows padded with zeros to a multiple of kNf4MatvecPad
  const float* b;     // [N, R] contiguous
  std::int64_t R;     // 0: no low-rank path
  std::int64_t s_stride;
};

struct Nf4MatvecArgs {
  const Nf4Matrix* w;
  const void* x;  // parts of nf4_part(M) rows, as the variant's `pack` wrote them: M · stride values
  std::int64_t M;
  std::int64_t stride;  // in values
  Nf4Added added;
  DType dtype;  // of y
  void* y;      // [M, N]
};
constexpr std::int64_t kNf4MatvecPad = 16;  // the widest vector

// Rows of x that share a decoded vector of weights; M is cut into parts as equal as can be.
constexpr std::int64_t kNf4MaxTokens = 8;
inline std::int64_t nf4_part(std::int64_t M) {
  const std::int64_t parts = (M + kNf4MaxTokens - 1) / kNf4MaxTokens;
  return parts == 0 ? 1 : (M + parts - 1) / parts;
}

// One way of computing the product. `pack` writes a part of x, `tokens` rows [tokens, K], in the order `rows` reads it in,
// each row padded with zeros to `stride` values; what type packed values have is the variant's own affair.
struct Nf4MatvecVariant {
  void (*pack)(const void* x, DType dtype, std::int64_t K, std::int64_t stride, std::int64_t tokens, void* to);
  void (*rows)(const Nf4MatvecArgs& args, std::int64_t begin, std::int64_t end);  // rows of W
  std::int64_t pad;                                                               // stride is K rounded up to this
  std::int64_t size;                                                              // bytes of a packed value
};

// Any shape: rows of W are decoded in fp32, then multiplied.
extern const Nf4MatvecVariant nf4_matvec_any_scalar;
#if defined(__x86_64__)
extern const Nf4MatvecVariant nf4_matvec_any_avx2, nf4_matvec_any_avx512;
// Straight from the packed bytes, for weights that nf4_whole_groups holds for.
extern const Nf4MatvecVariant nf4_matvec_f32_avx2, nf4_matvec_f32_avx512, nf4_matvec_bf16_avx512;
#endif

// Rows of W are whole groups of this many values, and a group lies in one block.
constexpr std::int64_t kNf4Group = 64;
inline bool nf4_whole_groups(const Nf4Matrix& w) {
  return w.K > 0 && w.K % kNf4Group == 0 && w.blocksize % kNf4Group == 0;
}

// Writes whole blocks [first, first + blocks) of W to out, which starts at the first one's first value.
void nf4_decode_blocks(const Nf4Matrix& w, std::int64_t first, std::int64_t blocks, DType dtype, void* out);

// ---- many rows of x: nf4_panel_kernel.h ------------------------------------------------------------------------------
constexpr std::int64_t kNf4PanelRows = 128;  // of W, decoded at a time: a multiple of every variant's rows
constexpr std::int64_t kNf4PanelColumns =
    256;  // likewise: those of two token groups stay in half of the smallest L1 cache
constexpr std::int64_t kNf4PanelStride = kNf4PanelColumns + 32;  // rows begin 64 bytes apart in the cache's sets

// Where the columns of a panel end: K rounded up to what a variant decodes at a time, then R to a tile's.
struct Nf4PanelColumns {
  std::int64_t low_rank, end;
};
inline Nf4PanelColumns nf4_panel_columns(const Nf4Matrix& w, std::int64_t R) {
  const std::int64_t pad = nf4_whole_groups(w) ? 2 * kNf4Group : 32;
  const std::int64_t low_rank = (w.K + pad - 1) / pad * pad;
  return {low_rank, low_rank + (R + 31) / 32 * 32};
}

struct Nf4PanelArgs {
  const Nf4Matrix* w;
  const bf16* x;  // [M, K]
  std::int64_t M;
  const float* bias;      // [N] or null
  const float* s;         // [M, R]
  const float* b;         // [N, R]
  std::int64_t R;         // 0: no low-rank path
  std::int64_t low_rank;  // nf4_panel_columns: where the low-rank columns begin
  std::int64_t columns;   // and end
  bf16* v;                // [ceil(M / 16), columns / 2, 16, 2]: x and s as `pack` wrote them
  bf16* y;                // [M, N]
};

struct Nf4PanelVariant {
  void (*pack)(const Nf4PanelArgs& args, std::int64_t group);                    // tokens [16·group, …)
  void (*rows)(const Nf4PanelArgs& args, std::int64_t begin, std::int64_t end);  // rows of W
  std::int64_t tokens;  // at a time: their sums, and what is multiplied with them, stay in the L2 cache
};
#if defined(__x86_64__)
extern const Nf4PanelVariant nf4_panel_avx512, nf4_panel_amx;
#endif

// ---- dX = dY·W: nf4_backward_kernel.h --------------------------------------------------------------------------------
struct Nf4BackwardArgs {
  const Nf4Matrix* w;
  const void* dy;  // [M, N] of `dtype`
  std::int64_t M;
  DType dtype;
  const float* ds;        // [M, R]
  const float* a;         // [R, K]
  std::int64_t R;         // 0: no low-rank path
  std::int64_t low_rank;  // the first term of the low-rank path: N rounded up to the variant's pad
  std::int64_t terms;     // and the last: as many more, rounded up likewise
  void* u;                // [ceil(terms / chunk), nf4_backward_tokens(M), stride]: dy and ds as `pack` wrote them
  void* dx;               // [M, K] of `dtype`
};

struct Nf4BackwardVariant {
  void (*pack)(const Nf4BackwardArgs& args, std::int64_t begin, std::int64_t end);     // of nf4_backward_tokens(M)
  void (*columns)(const Nf4BackwardArgs& args, std::int64_t begin, std::int64_t end);  // of dX, in groups of kNf4Group
  std::int64_t chunk, stride, size;                                                    // of u; bytes of a value
  std::int64_t pad;
  std::int64_t tokens;  // at a time
};
constexpr std::int64_t kNf4AmxTokens = 12;  // from which on AMX, whose tile has 16, gains on AVX-512: a cycle model's
inline std::int64_t nf4_backward_tokens(std::int64_t M) { return (M + 31) / 32 * 32; }  // as many as a product may read

extern const Nf4BackwardVariant nf4_backward_f32_scalar;
#if defined(__x86_64__)
extern const Nf4BackwardVariant nf4_backward_f32_avx2, nf4_backward_f32_avx512, nf4_backward_bf16_avx512;
extern const Nf4BackwardVariant nf4_backward_bf16_amx;
#endif

// Writes values [first, first + count) of W to out.
void nf4_decode_values(const Nf4Matrix& w, std::int64_t first, std::int64_t count, DType dtype, void* out);

}  // namespace pyfastpeft
