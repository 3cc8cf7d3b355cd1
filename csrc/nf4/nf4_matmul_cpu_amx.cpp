// The 4-bit matrix product on AMX: nf4_panel_kernel.h with tiles of 16 rows of W (operand A: the decoded rows as they lie)
// by 16 tokens (operand B: V). Written without a machine that has AMX: run as tests/native/amx_twin.cpp, read as machine
// code; what follows is a model, not a measurement.
//
// One step of the inner loop is 32 rows, 32 tokens, 32 columns: 4 tdpbf16ps (64 cycles at one in 16), 4 tile loads of 1 KiB
// (32 cycles at one in 8, beside them): the two of V from the L1 cache (16 KiB for 256 columns), the two of W from the L2
// cache, 32 bytes a cycle of the 48 or so it sustains. Sums go through the L1 and L2 caches once for each 256 columns: 4
// loads and 4 stores for 32 products. So for N = K = 4096 on one thread at 2.3 TFLOP/s (half of what two cores of a Sapphire
// Rapids were measured at):
//   products   2·M·N·K / 2.3e12: M = 16 0.25 ms (tokens are filled up to 16), 128 1.9, 512 7.5
//   decoding   2 to 3 ms: the AVX-512 kernel's time for 16 tokens on Zen 4 less that of its products
// 16 tokens then cost about 2.8 ms where the dot products cost 3.5, and 8 tokens 2.6 and 1.7: hence _FEW_ROWS. 512 tokens on
// two threads: 5 ms, 75 % of the tile unit's rate.
#include "common/amx_tiles.h"
#include "nf4/nf4_backward_kernel.h"
#include "nf4/nf4_panel_kernel.h"

namespace pyfastpeft {
namespace {

// C += rows · V for 16·rows rows of W and 16·groups tokens. Tiles 0 to 3 are sums, 4 and 5 W, 6 and 7 tokens.
template <int rows, int groups>
__attribute__((noinline)) void panel_tile(const bf16* w, const bf16* v, std::int64_t v_group, std::int64_t pairs,
                                          float* c, bool first) {
  constexpr std::int64_t kStride = kNf4PanelStride * std::int64_t(sizeof(bf16));
  const bf16* const w1 = w + 16 * kNf4PanelStride;
  const bf16* const v1 = v + v_group;
  float* const c1 = c + kNf4PanelRows * 16;
  if (first) {
    amx_zero<0>();
    if (groups > 1) amx_zero<1>();
    if (rows > 1) amx_zero<2>();
    if (rows > 1 && groups > 1) amx_zero<3>();
  } else {
    amx_load<0>(c, 64);
    if (groups > 1) amx_load<1>(c1, 64);
    if (rows > 1) amx_load<2>(c + 256, 64);
    if (rows > 1 && groups > 1) amx_load<3>(c1 + 256, 64);
  }
#pragma GCC unroll 1
  for (std::int64_t p = 0; p < pairs; p += 16) {
    amx_load<6>(v + 32 * p, 64);
    amx_load<4>(w + 2 * p, kStride);
    amx_dot<0, 4, 6>();
    if (groups > 1) {
      amx_load<7>(v1 + 32 * p, 64);
      amx_dot<1, 4, 7>();
    }
    if (rows > 1) {
      amx_load<5>(w1 + 2 * p, kStride);
      amx_dot<2, 5, 6>();
      if (groups > 1) amx_dot<3, 5, 7>();
    }
  }
  amx_store<0>(c, 64);
  if (groups > 1) amx_store<1>(c1, 64);
  if (rows > 1) amx_store<2>(c + 256, 64);
  if (rows > 1 && groups > 1) amx_store<3>(c1 + 256, 64);
}

struct PanelAmx {
#if defined(__AVX512F__)
  using V = VecAvx512;
#else
  using V = VecScalar;  // the twin, compiled for any machine
#endif
  using Use = AmxTiles;

  template <int groups>
  static void tiles(const bf16* w, std::int64_t count, const bf16* v, std::int64_t v_group, std::int64_t pairs,
                    float* c, bool first) {
    std::int64_t r = 0;
    for (; r + 16 < count; r += 32)
      panel_tile<2, groups>(w + r * kNf4PanelStride, v, v_group, pairs, c + 16 * r, first);
    if (r < count) panel_tile<1, groups>(w + r * kNf4PanelStride, v, v_group, pairs, c + 16 * r, first);
  }
  static void block(const bf16* w, std::int64_t count, const bf16* v, std::int64_t v_group, std::int64_t groups,
                    std::int64_t pairs, float* c, bool first) {
    std::int64_t g = 0;
    for (; g + 2 <= groups; g += 2)
      tiles<2>(w, count, v + g * v_group, v_group, pairs, c + g * kNf4PanelRows * 16, first);
    if (g < groups) tiles<1>(w, count, v + g * v_group, v_group, pairs, c + g * kNf4PanelRows * 16, first);
  }
};

}  // namespace

#if !defined(PYFASTPEFT_AMX_TWIN)
const Nf4PanelVariant nf4_panel_amx = {nf4_panel_pack, nf4_panel_rows<PanelAmx>, 512};
const Nf4BackwardVariant nf4_backward_bf16_amx = nf4_backward_variant<BackwardBf16<PanelAmx>>(512);
#else
extern const Nf4PanelVariant nf4_panel_amx_twin;
extern const Nf4BackwardVariant nf4_backward_bf16_amx_twin;
const Nf4PanelVariant nf4_panel_amx_twin = {nf4_panel_pack, nf4_panel_rows<PanelAmx>, 512};
const Nf4BackwardVariant nf4_backward_bf16_amx_twin = nf4_backward_variant<BackwardBf16<PanelAmx>>(512);
#endif

}  // namespace pyfastpeft
