// What the CPU and CUDA kernels of AdamW share: the scalars of a step, the 8-bit maps' thresholds, stochastic rounding.
// Host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "adamw/adamw.h"
#include "common/philox.h"

namespace pyfastpeft {

// The scalars of one tensor's step, rounded to fp32 where torch rounds them.
struct AdamwCoefficients {
  float grad_factor;  // 1 / grad_scale, negated to maximize
  float decay;        // 1 - lr · weight_decay, or 1
  float l2;           // weight_decay added to the gradient, or 0
  float lerp1;        // 1 - beta1
  float beta2, one_minus_beta2;
  float correction2_sqrt;        // sqrt(1 - beta2^step)
  float correction2_reciprocal;  // 1 / correction2_sqrt
  float eps;
  float negative_step_size;  // -lr / (1 - beta1^step)
};

// `product(a, b)` is a · b rounded: nvcc would fuse the plain one with the subtraction.
template <typename Product>
static PYFASTPEFT_HOST_DEVICE inline AdamwCoefficients adamw_coefficients(const AdamwOptions& o, double step,
                                                                          Product product) {
  AdamwCoefficients c;
  c.grad_factor = float(o.maximize ? -1.0 / o.grad_scale : 1.0 / o.grad_scale);
  c.decay = o.decoupled ? float(1.0 - product(o.lr, o.weight_decay)) : 1.0f;
  c.l2 = o.decoupled ? 0.0f : float(o.weight_decay);
  c.lerp1 = float(1.0 - o.beta1);
  c.beta2 = float(o.beta2);
  c.one_minus_beta2 = float(1.0 - o.beta2);
  c.correction2_sqrt = float(sqrt(1.0 - pow(o.beta2, step)));
  c.correction2_reciprocal = 1.0f / c.correction2_sqrt;
  c.eps = float(o.eps);
  c.negative_step_size = float(-(o.lr / (1.0 - pow(o.beta1, step))));
  return c;
}

static PYFASTPEFT_HOST_DEVICE inline std::uint32_t adamw_bits(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
static PYFASTPEFT_HOST_DEVICE inline float adamw_float(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// The next float above, of a finite x.
static PYFASTPEFT_HOST_DEVICE inline float adamw_next(float x) {
  const std::uint32_t bits = adamw_bits(x);
  if ((bits & 0x7fffffffu) == 0) return adamw_float(1u);
  return adamw_float(bits >> 31 ? bits - 1 : bits + 1);
}

// The midpoint of two levels as the largest float not above it: comparing with it is comparing with the midpoint.
static PYFASTPEFT_HOST_DEVICE inline float adamw_threshold(float level, float next_level) {
  const double exact = (double(level) + double(next_level)) * 0.5;
  const float nearest = float(exact);
  return double(nearest) > exact ? -adamw_next(-nearest) : nearest;
}

// Rounds x up or down with the odds of the distance. Not for x at the largest finite value or beyond: those are
// rounded to nearest (adamw_beyond_*).
static PYFASTPEFT_HOST_DEVICE inline bool adamw_beyond_bf16(float x) {
  return (adamw_bits(x) & 0x7fffffffu) >= 0x7f7f0000u;
}
static PYFASTPEFT_HOST_DEVICE inline std::uint16_t adamw_stochastic_bf16(float x, std::uint32_t random) {
  return std::uint16_t((adamw_bits(x) + (random & 0xffffu)) >> 16);
}
static PYFASTPEFT_HOST_DEVICE inline bool adamw_beyond_f16(float x) {
  return (adamw_bits(x) & 0x7fffffffu) >= 0x477fe000u;
}
static PYFASTPEFT_HOST_DEVICE inline std::uint16_t adamw_stochastic_f16(float x, std::uint32_t random) {
  const std::uint32_t bits = adamw_bits(x), a = bits & 0x7fffffffu;
  const std::uint16_t sign = std::uint16_t((bits >> 16) & 0x8000u);
  if (a >= 0x38800000u) return std::uint16_t(sign | ((a - 0x38000000u + (random & 0x1fffu)) >> 13));
  // subnormal: mantissa · 2^-shift in units of 2^-24
  const std::uint32_t exponent = a >> 23, shift = 126 - (exponent ? exponent : 1u);
  const std::uint64_t mantissa = (a & 0x7fffffu) | (exponent ? 0x800000u : 0u);
  if (shift > 56) return sign;
  const std::uint64_t units = shift <= 32 ? (mantissa + (random & ((std::uint64_t(1) << shift) - 1))) >> shift
                                          : ((mantissa >> (shift - 32)) + random) >> 32;
  return std::uint16_t(sign | units);
}

}  // namespace pyfastpeft
