// Planted bugs: barriers, and the order of accesses within a block and between blocks.
#include "bugs.h"

namespace bugs {
namespace {

// The block's sum by one partial sum a warp; between writing and reading them stands a barrier.
template <bool kBug>
__global__ void missing_syncthreads(Io io) {
  KSHARED(float, partial, [8]);
  const float sum = warp_sum(io.x[threadIdx.x]);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  if constexpr (!kBug) __syncthreads();
  float total = 0;
  for (int i = 0; i < 4; ++i) total += partial[i];  // BUG missing_syncthreads
  if (threadIdx.x == 0) io.y[0] = total;
}
PLANTED(missing_syncthreads, 1, 128, 128, 0, 0);

// Tiles one after the other through the same buffer: the next may be written when all have read the last.
template <bool kBug>
__global__ void missing_syncthreads_in_loop(Io io) {
  KSHARED(float, tile, [64]);
  float sum = 0;
  for (int first = 0; first < io.n; first += 64) {
    tile[threadIdx.x] = io.x[first + threadIdx.x];  // BUG missing_syncthreads_in_loop
    __syncthreads();
    sum += tile[63 - threadIdx.x];
    if constexpr (!kBug) __syncthreads();
  }
  io.y[threadIdx.x] = sum;
}
PLANTED(missing_syncthreads_in_loop, 1, 64, 64, 0, 0);

template <bool kBug>
__global__ void missing_syncwarp(Io io) {
  KSHARED(float, exchange, [32]);
  exchange[threadIdx.x] = io.x[threadIdx.x];
  if constexpr (!kBug) __syncwarp();
  io.y[threadIdx.x] = exchange[threadIdx.x ^ 1];  // BUG missing_syncwarp
}
PLANTED(missing_syncwarp, 1, 32, 32, 0, 0);

// A shuffle makes lanes wait for each other and orders no memory.
template <bool kBug>
__global__ void shuffle_as_barrier(Io io) {
  KSHARED(float, exchange, [32]);
  exchange[threadIdx.x] = io.x[threadIdx.x];
  if constexpr (kBug)
    io.y[32 + threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
  else
    __syncwarp();
  io.y[threadIdx.x] = exchange[threadIdx.x ^ 1];  // BUG shuffle_as_barrier
}
PLANTED(shuffle_as_barrier, 1, 32, 32, 0, 0);

// All lanes read, the last one writes: the reads of the others count although its own came after them.
template <bool kBug>
__global__ void write_after_lanes_read(Io io) {
  KSHARED(float, value, [1]);
  if (threadIdx.x == 0) value[0] = io.x[0];
  __syncwarp();
  const float v = value[0];
  if constexpr (!kBug) __syncwarp();
  if (threadIdx.x == 31) value[0] = v + 1;  // BUG write_after_lanes_read
  io.y[threadIdx.x] = v;
}
PLANTED(write_after_lanes_read, 1, 32, 32, 0, 0);
// Both warps read; the second one orders its own lanes only.
template <bool kBug>
__global__ void write_after_another_warp_read(Io io) {
  KSHARED(float, value, [1]);
  if (threadIdx.x == 0) value[0] = io.x[0];
  __syncthreads();
  const float v = value[0];
  if constexpr (kBug)
    __syncwarp();
  else
    __syncthreads();
  if (threadIdx.x == 63) value[0] = v + 1;  // BUG write_after_another_warp_read
  io.y[threadIdx.x] = v;
}
PLANTED(write_after_another_warp_read, 1, 64, 64, 0, 0);
// Both blocks read; the second one writes when all of its own threads have.
template <bool kBug>
__global__ void write_after_another_block_read(Io io) {
  const float v = io.y[kBug ? 200 : 200 + blockIdx.x];
  __syncthreads();
  if (blockIdx.x == 1 && threadIdx.x == 63) io.y[kBug ? 200 : 201] = v + 1;  // BUG write_after_another_block_read
  io.y[blockIdx.x * 64 + threadIdx.x] = v;
}
PLANTED(write_after_another_block_read, 2, 64, 64, 0, 0);

template <bool kBug>
__global__ void barrier_under_if(Io io) {
  KSHARED(float, last, [1]);
  if (threadIdx.x == 63) last[0] = io.x[0];
  if (!kBug || threadIdx.x >= 48) __syncthreads();
  if (kBug && threadIdx.x < 48) {
    __syncwarp(threadIdx.x < 32 ? 0xffffffffu : 0x0000ffffu);
    __syncthreads();  // BUG barrier_under_if
  }
  io.y[threadIdx.x] = last[0];
}
PLANTED(barrier_under_if, 1, 64, 64, 0, 0);

template <bool kBug>
__global__ void barrier_divergent_in_warp(Io io) {
  if (kBug && threadIdx.x % 2 != 0)
    __syncthreads();  // BUG barrier_divergent_in_warp
  else
    __syncthreads();
  io.y[threadIdx.x] = io.x[threadIdx.x];
}
PLANTED(barrier_divergent_in_warp, 1, 32, 32, 0, 0);

template <bool kBug>
__global__ void return_before_barrier(Io io) {
  if (kBug && threadIdx.x >= 40) return;
  __syncthreads();  // BUG return_before_barrier
  io.y[threadIdx.x] = io.x[threadIdx.x];
}
PLANTED(return_before_barrier, 1, 64, 64, 0, 0);

template <bool kBug>
__global__ void barrier_never_reached(Io io) {
  if (!kBug || threadIdx.x < 32)
    __syncthreads();  // BUG barrier_never_reached
  else if (threadIdx.x % 2 == 0)
    __syncwarp(0xffffffffu);
  else
    io.y[64] = float(__ballot_sync(0xffffffffu, 1));
  io.y[threadIdx.x] = io.x[threadIdx.x];
}
PLANTED(barrier_never_reached, 1, 64, 64, 0, 0);

// All threads write the same place.
template <bool kBug>
__global__ void same_address(Io io) {
  const float sum = warp_sum(io.x[threadIdx.x]);
  if (kBug || threadIdx.x % 32 == 0) io.y[threadIdx.x / 32] = sum;  // BUG same_address
}
PLANTED(same_address, 1, 128, 128, 0, 0);

template <bool kBug>
__global__ void race_between_blocks(Io io) {
  io.y[kBug ? threadIdx.x : blockIdx.x * 32 + threadIdx.x] = io.x[threadIdx.x];  // BUG race_between_blocks
}
PLANTED(race_between_blocks, 4, 32, 32, 0, 0);

// "The last block adds up the parts": each block writes its part, fences, counts itself; the last to count reads all.
enum class HandOver { whole, no_fence, fence_before_write, no_barrier };
template <HandOver kHow>
__device__ __forceinline__ void hand_over(const Io& io) {
  KSHARED(bool, last, [1]);
  if (kHow == HandOver::fence_before_write) __threadfence();
  io.y[blockIdx.x * 64 + threadIdx.x] = io.x[threadIdx.x];
  if (kHow != HandOver::no_barrier) __syncthreads();
  if (threadIdx.x == 0) {
    if (kHow == HandOver::whole || kHow == HandOver::no_barrier) __threadfence();
    last[0] = atomicAdd(io.count, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last[0]) return;
  float sum = 0;
  for (int b = 0; b < int(gridDim.x); ++b)
    sum += io.y[b * 64 + threadIdx.x];  // BUG missing_threadfence BUG fence_before_write BUG hand_over_without_barrier
  if (threadIdx.x == 100) io.y[0] = sum;
}
template <bool kBug>
__global__ void missing_threadfence(Io io) {
  hand_over<kBug ? HandOver::no_fence : HandOver::whole>(io);
}
PLANTED(missing_threadfence, 4, 64, 64, 0, 0);
template <bool kBug>
__global__ void fence_before_write(Io io) {
  hand_over<kBug ? HandOver::fence_before_write : HandOver::whole>(io);
}
PLANTED(fence_before_write, 4, 64, 64, 0, 0);
template <bool kBug>
__global__ void hand_over_without_barrier(Io io) {
  hand_over<kBug ? HandOver::no_barrier : HandOver::whole>(io);
}
PLANTED(hand_over_without_barrier, 4, 64, 64, 0, 0);

// Every thread fences its own writes, then a barrier: right too.
template <bool kBug>
__global__ void fence_by_each_thread(Io io) {
  KSHARED(bool, last, [1]);
  io.y[blockIdx.x * 64 + threadIdx.x] = io.x[threadIdx.x];
  if (!kBug || threadIdx.x != 5) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last[0] = atomicAdd(io.count, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last[0]) return;
  float sum = 0;
  for (int b = 0; b < int(gridDim.x); ++b) sum += io.y[b * 64 + threadIdx.x];  // BUG fence_by_each_thread
  if (threadIdx.x == 100) io.y[0] = sum;
}
PLANTED(fence_by_each_thread, 4, 64, 64, 0, 0);

// The same by one warp: __syncwarp before the fence, and after the atomic. The shuffle between them orders nothing.
template <bool kBefore, bool kAfter>
__device__ __forceinline__ void hand_over_by_warp(const Io& io) {
  io.y[blockIdx.x * 32 + threadIdx.x] = io.x[threadIdx.x];
  if constexpr (kBefore) __syncwarp();
  int last = 0;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(io.count, 1u) == gridDim.x - 1;
  }
  last = __shfl_sync(0xffffffffu, last, 0);
  if constexpr (kAfter) __syncwarp();
  if (!last) return;
  float sum = 0;
  for (int b = 0; b < int(gridDim.x); ++b)
    sum += io.y[b * 32 + (threadIdx.x ^ 1)];  // BUG no_syncwarp_before_fence BUG no_syncwarp_after_atomic
  if (threadIdx.x == 100) io.y[0] = sum;
}
template <bool kBug>
__global__ void no_syncwarp_before_fence(Io io) {
  hand_over_by_warp<!kBug, true>(io);
}
PLANTED(no_syncwarp_before_fence, 4, 32, 32, 0, 0);
template <bool kBug>
__global__ void no_syncwarp_after_atomic(Io io) {
  hand_over_by_warp<true, !kBug>(io);
}
PLANTED(no_syncwarp_after_atomic, 4, 32, 32, 0, 0);

// A block that waits for another: the other may never get a processor.
template <bool kBug>
__global__ void wait_for_another_block(Io io) {
  if (blockIdx.x == 1 || !kBug) {
    atomicExch(io.count, 1u);
  } else {
    while (atomicCAS(io.count, 1u, 1u) == 0u) {  // BUG wait_for_another_block
    }
  }
  if (blockIdx.x == 0) io.y[threadIdx.x] = 0;
}
PLANTED(wait_for_another_block, 2, 1, 1, 0, 0);

}  // namespace
}  // namespace bugs
