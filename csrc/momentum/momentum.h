// Optimizers whose state is one fp32 tensor of momentum, over a list of tensors in one call: Lion and SGD. The maths is the
// `update` of pyfastpeft/optim/lion.py and sgd.py, operation for operation.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pyfastpeft {

// One tensor, or a part of one, and its state: values in the order of memory, all of one layout.
struct MomentumTensor {
  void* param;       // [n] param_dtype
  const void* grad;  // [n] grad_dtype: f32 or param_dtype
  float* momentum;   // [n]
  float* step;       // [1], incremented
  std::int64_t n;
  DType param_dtype, grad_dtype;
};

enum class MomentumRule : int { kLion, kSgd };

struct MomentumOptions {
  MomentumRule rule;
  double lr, weight_decay;
  double first, second;  // Lion: beta1 and beta2; SGD: momentum and dampening
  bool nesterov;         // SGD
  bool maximize;
};

// Threads share the values of all tensors; every value's result is the same for any thread count and any cut into parts.
void momentum_cpu(const MomentumTensor* tensors, std::int64_t count, const MomentumOptions& options);

}  // namespace pyfastpeft
