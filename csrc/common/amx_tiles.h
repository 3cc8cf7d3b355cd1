// The AMX instructions the kernels use, and their twin in plain C++: with PYFASTPEFT_AMX_TWIN defined a kernel's source
// runs on any machine, as the tests do. Eight tiles of 16 rows of 64 bytes each; only files named *_amx.cpp include this.
//
// The twin rounds as the processor does (Intel's SDM, TDPBF16PS): for each of an output's two sums, that of the even and
// that of the odd bf16 of a pair, FMAs in the order of pairs, starting from zero; then the two are added, then that is
// added to the output. Every one of these rounds to nearest even, takes subnormal operands as zero and gives zero for a
// subnormal result, whatever MXCSR says.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace pyfastpeft {
namespace {

constexpr int kAmxRows = 16, kAmxRowBytes = 64;

#if !defined(PYFASTPEFT_AMX_TWIN)

// Tiles exist from here to the end of the scope. The memory clobbers order them with the stores to what they load: the
// compiler's intrinsics have none. tilerelease: torch's threads go on with other work.
class AmxTiles {
 public:
  AmxTiles() {
    alignas(64) std::uint8_t config[64] = {1};  // palette 1; bytes 16.. the row lengths in 16 bits, 48.. the row counts
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = kAmxRowBytes;
      config[48 + t] = kAmxRows;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~AmxTiles() { __asm__ volatile("tilerelease" ::: "memory"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

// volatile: tiles are no operands the compiler knows, the order of these statements is what binds them
template <int tile>
[[gnu::always_inline]] inline void amx_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
[[gnu::always_inline]] inline void amx_load(const void* rows, std::int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
[[gnu::always_inline]] inline void amx_store(void* rows, std::int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(tile) : "memory");
}
// c [16, 16] fp32 += a [16, 32] · b [16 pairs, 16 columns, 2], in bf16
template <int c, int a, int b>
[[gnu::always_inline]] inline void amx_dot() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#else

struct AmxTile {
  std::uint8_t row[kAmxRows][kAmxRowBytes];
};
inline AmxTile& amx_tile(int tile) {
  static thread_local AmxTile tiles[8];
  return tiles[tile];
}
inline int& amx_scopes() {
  static thread_local int scopes = 0;
  return scopes;
}
inline AmxTile& amx_live(int tile) {  // the processor raises #UD without a configuration
  if (amx_scopes() != 1) __builtin_trap();
  return amx_tile(tile);
}

class AmxTiles {
 public:
  AmxTiles() {
    ++amx_scopes();
    for (int t = 0; t < 8; ++t) std::memset(&amx_live(t), 0, sizeof(AmxTile));
  }
  ~AmxTiles() { --amx_scopes(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

template <int tile>
void amx_zero() {
  std::memset(&amx_live(tile), 0, sizeof(AmxTile));
}
template <int tile>
void amx_load(const void* rows, std::int64_t stride) {
  for (int i = 0; i < kAmxRows; ++i)
    std::memcpy(amx_live(tile).row[i], static_cast<const char*>(rows) + i * stride, kAmxRowBytes);
}
template <int tile>
void amx_store(void* rows, std::int64_t stride) {
  for (int i = 0; i < kAmxRows; ++i)
    std::memcpy(static_cast<char*>(rows) + i * stride, amx_live(tile).row[i], kAmxRowBytes);
}

inline float amx_flush(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }
inline void amx_operands(const AmxTile& tile, float (*to)[2][16]) {  // [row][of a pair][pair]
  for (int i = 0; i < kAmxRows; ++i)
    for (int j = 0; j < 32; ++j) {
      bf16 value;
      std::memcpy(&value, tile.row[i] + 2 * j, 2);
      to[i][j % 2][j / 2] = amx_flush(to_f32(value));
    }
}

template <int c, int a, int b>
void amx_dot() {
  AmxTile& to = amx_live(c);
  float left[16][2][16], right[16][2][16];
  amx_operands(amx_live(a), left);
  amx_operands(amx_live(b), right);
  for (int m = 0; m < kAmxRows; ++m) {
    float half[2][16] = {}, sum[16];
    for (int k = 0; k < 16; ++k)
      for (int i = 0; i < 2; ++i)
        for (int n = 0; n < 16; ++n) half[i][n] = amx_flush(__builtin_fmaf(left[m][i][k], right[k][i][n], half[i][n]));
    std::memcpy(sum, to.row[m], sizeof sum);
    for (int n = 0; n < 16; ++n) sum[n] = amx_flush(amx_flush(sum[n]) + amx_flush(half[0][n] + half[1][n]));
    std::memcpy(to.row[m], sum, sizeof sum);
  }
}

#endif

}  // namespace
}  // namespace pyfastpeft
