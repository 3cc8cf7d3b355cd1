// The three floating-point storage types of the kernels, their conversions to and from fp32 (bit-exact, round to
// nearest even), and the switch from a run-time DType to a compile-time type.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/check.h"

namespace pyfastpeft {

// The values are part of the binding: pyfastpeft/ops/_library.py maps torch dtypes to them.
enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

inline float bits_to_f32(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline std::uint32_t f32_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float to_f32(float v) { return v; }
inline float to_f32(bf16 v) { return bits_to_f32(std::uint32_t(v.bits) << 16); }
inline float to_f32(f16 v) {
  const std::uint32_t sign = std::uint32_t(v.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_f32(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return bits_to_f32(sign | ((magnitude << 13) + 0x38000000u));
  // zero and subnormals: magnitude · 2^-24, exact in fp32
  return bits_to_f32(sign | f32_to_bits(float(magnitude) * 5.9604644775390625e-8f));
}

template <typename T>
T from_f32(float v);
template <>
inline float from_f32<float>(float v) {
  return v;
}
template <>
inline bf16 from_f32<bf16>(float v) {
  const std::uint32_t u = f32_to_bits(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {std::uint16_t((u >> 16) | 0x0040u)};  // NaN stays NaN
  return {std::uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
inline f16 from_f32<f16>(float v) {
  const std::uint32_t u = f32_to_bits(v);
  const std::uint16_t sign = std::uint16_t((u >> 16) & 0x8000u);
  const std::uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return {std::uint16_t(sign | 0x7e00u)};
  if (a >= 0x477ff000u) return {std::uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more: infinity
  if (a < 0x38800000u) {                                         // subnormal or zero: the sum rounds to even for us
    const float shifted = bits_to_f32(a) + 0.5f;
    return {std::uint16_t(sign | (f32_to_bits(shifted) - 0x3f000000u))};
  }
  const std::uint32_t rounded = a + 0xfffu + ((a >> 13) & 1u);
  return {std::uint16_t(sign | ((rounded - 0x38000000u) >> 13))};
}

// dispatch(dtype, [&](auto tag) { using T = typename decltype(tag)::type; ... });
template <typename T>
struct Tag {
  using type = T;
};
template <typename F>
inline void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(Tag<float>{});
    case DType::f16:
      return f(Tag<f16>{});
    case DType::bf16:
      return f(Tag<bf16>{});
  }
  throw std::invalid_argument(message("unknown dtype code ", int(dtype), "; supported: f32 (0), f16 (1), bf16 (2)"));
}

}  // namespace pyfastpeft
