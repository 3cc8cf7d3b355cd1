// What the executor's operations cost: each kernel does one of them `rounds` times in every thread (costs.py).
#include "common/cuda_vec.cuh"
#include "costs.h"

namespace {

using namespace pyfastpeft;

enum Operation { kNothing, kGlobalRead, kSharedWrite, kBarrier, kShuffle, kMma };

template <int operation>
__global__ void cost_kernel(const float* x, float* y, int rounds) {
  KSHARED(float, tile, [256]);
  const int i = threadIdx.x;
  float sum = 0, fragment[4] = {};
  const std::uint32_t a[4] = {}, b[2] = {};
  for (int r = 0; r < rounds; ++r) {
    if constexpr (operation == kGlobalRead) sum += x[i];
    if constexpr (operation == kSharedWrite) tile[i] = sum;
    if constexpr (operation == kBarrier) __syncthreads();
    if constexpr (operation == kShuffle) sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    if constexpr (operation == kMma) kp::mma_m16n8k16<__nv_bfloat16>(fragment, a, b);
  }
  y[i] = sum + fragment[0];
}

template <int operation>
int start(const float* x, float* y, int rounds) {
  return KLAUNCH((cost_kernel<operation>), 1, 256, 0, nullptr, x, y, rounds);
}

}  // namespace

int run_cost(int operation, const float* x, float* y, int rounds) {
  constexpr decltype(&start<0>) kernels[] = {start<kNothing>, start<kGlobalRead>, start<kSharedWrite>,
                                             start<kBarrier>, start<kShuffle>,    start<kMma>};
  return kernels[operation](x, y, rounds);
}
