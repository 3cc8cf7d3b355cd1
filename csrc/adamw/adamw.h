// AdamW over a list of tensors in one call. The maths is pyfastpeft/reference/adamw.py.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace pyfastpeft {

constexpr std::int64_t kAdamwBlock = 256;  // values per absmax of the 8-bit state

// One tensor and its state: values in the order of memory, all of one layout.
struct AdamwTensor {
  void* param;       // [n] param_dtype
  const void* grad;  // [n] grad_dtype: f32 or param_dtype
  void* exp_avg;     // [n] f32, or u8 codes where bits8
  void* exp_avg_sq;  // the same
  float* absmax1;    // [ceil(n / 256)] of exp_avg; null unless bits8
  float* absmax2;    // of exp_avg_sq
  float* master;     // [n] f32 weights that param is a rounded copy of; null: none
  float* step;       // [1], incremented
  std::int64_t n;
  DType param_dtype, grad_dtype;
  bool bits8;
  // For a part of a tensor: where it begins, a multiple of 256, and the whole one's number in the call. Both belong to
  // the counter of the random numbers of stochastic rounding; CPU only.
  std::int64_t first = 0;
  std::int64_t index = -1;  // -1: the number in this call
};

struct AdamwOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled;  // AdamW's decay of the weights; false: L2, added to the gradient
  bool maximize;
  double grad_scale;         // gradients are divided by it
  const float* map1;         // [256] ascending levels of exp_avg's codes; null where no tensor is bits8
  const float* map2;         // [256] of exp_avg_sq's
  const std::int64_t* seed;  // stochastic rounding of f16 and bf16 params without a master; null: round to nearest
};

// Threads share the values of all tensors, in units of 256; every value's result is the same for any thread count.
void adamw_cpu(const AdamwTensor* tensors, std::int64_t count, const AdamwOptions& options);

// On the GPU all pointers are the device's, and so are these; null: the value in AdamwOptions holds.
struct AdamwDeviceScalars {
  const void* lr;  // [1], f64 where lr_is_f64, else f32
  bool lr_is_f64;
  const float* grad_scale;  // [1]
  const float* found_inf;   // [1] not 0: nothing is changed, steps included
};

// The kernel reads the list of tensors from a table in device memory of adamw_table_words(count) words.
std::int64_t adamw_table_words(std::int64_t count);

// What is known to lie in such a table, so that a list that is as it was is not sent again.
struct AdamwTableContent {
  std::vector<std::uint64_t> words;  // empty: nothing is known
};

// One launch for all tensors, and before it one for each 3.8 KiB of the table that changed. The table travels as kernel
// arguments: nothing on the host has to outlive the call, and a captured graph repeats what it was captured with.
void adamw_cuda(const AdamwTensor* tensors, std::int64_t count, const AdamwOptions& options,
                const AdamwDeviceScalars& scalars,
                std::uint64_t* table,        // [adamw_table_words(count)], only touched by this function
                AdamwTableContent& content,  // of `table`; brought up to date
                int multiprocessors, void* stream);

}  // namespace pyfastpeft
