// Planted bugs: bounds, alignment, initialisation, arithmetic, launches.
#include <cstring>

#include "bugs.h"

namespace bugs {
namespace {

template <bool kBug>
__global__ void shared_out_of_bounds(Io io) {
  KSHARED(float, tile, [32]);
  tile[threadIdx.x + (kBug ? 1 : 0)] = io.x[threadIdx.x];  // BUG shared_out_of_bounds
  __syncthreads();
  io.y[threadIdx.x] = 0;
}
PLANTED(shared_out_of_bounds, 1, 32, 32, 0, 0);

template <bool kBug>
__global__ void shared_out_of_bounds_by_pointer(Io io) {
  KSHARED(float, tile, [32]);
  float* p = tile;
  p[threadIdx.x + (kBug ? 1 : 0)] = io.x[threadIdx.x];  // BUG shared_out_of_bounds_by_pointer
  __syncthreads();
  io.y[threadIdx.x] = 0;
}
PLANTED(shared_out_of_bounds_by_pointer, 1, 32, 32, 0, 0);

// The first half of an access lies within the variable, the second behind it.
template <bool kBug>
__global__ void shared_access_beyond_end(Io io) {
  KSHARED(float, tile, [3]);
  if (threadIdx.x < 3) tile[threadIdx.x] = io.x[threadIdx.x];
  __syncwarp();
  const float* p = tile;
  const auto* pair = reinterpret_cast<const unsigned long long*>(p + (kBug ? 2 : 0));
  io.y[threadIdx.x] = float(*pair);  // BUG shared_access_beyond_end
}
PLANTED(shared_access_beyond_end, 1, 32, 32, 0, 0);

template <bool kBug>
__global__ void dynamic_shared_too_small(Io io) {
  float* tile = reinterpret_cast<float*>(kdyn_smem());
  tile[threadIdx.x] = io.x[threadIdx.x];  // BUG dynamic_shared_too_small
  __syncthreads();
  io.y[threadIdx.x] = tile[threadIdx.x ^ 1];
}
PLANTED(dynamic_shared_too_small, 1, 64, 64, 256, 254);

template <bool kBug>
__global__ void read_beyond_tail(Io io) {
  const int i = blockIdx.x * 96 + threadIdx.x;
  const float v = kBug || i < io.n ? io.x[i] : 0.0f;  // BUG read_beyond_tail
  const float sum = warp_sum(v);
  if (threadIdx.x % 32 == 0) io.y[i / 32] = sum;
}
PLANTED(read_beyond_tail, 3, 96, 96, 0, 0);

template <bool kBug>
__global__ void write_beyond_tail(Io io) {
  const int i = blockIdx.x * 96 + threadIdx.x;
  if (kBug || i < io.n) io.y[i] = 1.0f;  // BUG write_beyond_tail
}
PLANTED(write_beyond_tail, 3, 96, 96, 0, 0);

template <bool kBug>
__global__ void vector_read_beyond_tail(Io io) {
  const int first = int(threadIdx.x) * 4 + (kBug ? 4 : 0);
  const Chunk<float> chunk = *reinterpret_cast<const Chunk<float>*>(io.x + first);  // BUG vector_read_beyond_tail
  io.y[threadIdx.x] = chunk.values[3];
}
PLANTED(vector_read_beyond_tail, 1, 64, 64, 0, 0);

template <bool kBug>
__global__ void memcpy_beyond_tail(Io io) {
  float values[40];
  std::memcpy(values, io.x + io.n - 40 + (kBug ? 1 : 0), std::size_t(io.n) * 160 / 256);  // BUG memcpy_beyond_tail
  io.y[0] = values[io.n % 40];
}
PLANTED(memcpy_beyond_tail, 1, 1, 1, 0, 0);

template <bool kBug>
__global__ void unregistered_pointer(Io io) {
  const float* p = kBug ? reinterpret_cast<const float*>(std::uintptr_t(64)) : io.x;
  io.y[0] = *p;  // BUG unregistered_pointer
}
PLANTED(unregistered_pointer, 1, 1, 1, 0, 0);

template <bool kBug>
__global__ void write_to_input(Io io) {
  io.y[threadIdx.x] = 0;
  if (kBug) const_cast<float*>(io.x)[threadIdx.x] = 1.0f;  // BUG write_to_input
}
PLANTED(write_to_input, 1, 32, 32, 0, 0);

__constant__ float table[15] = {1, 2, 3};
__device__ __forceinline__ float look_up(const float* t, int i) { return t[i]; }
template <bool kBug>
__global__ void constant_out_of_bounds(Io io) {
  io.y[threadIdx.x] = look_up(table, int(threadIdx.x) + (kBug ? 1 : 0));  // BUG constant_out_of_bounds
}
PLANTED(constant_out_of_bounds, 1, 15, 15, 0, 0);

template <bool kBug>
__global__ void write_to_constant(Io io) {
  io.y[threadIdx.x] = 0;
  if (kBug) table[threadIdx.x] = 0;  // BUG write_to_constant
}
PLANTED(write_to_constant, 1, 1, 1, 0, 0);

template <bool kBug>
__global__ void misaligned_vector(Io io) {
  const float4 v = *reinterpret_cast<const float4*>(io.x + threadIdx.x * 4 + (kBug ? 1 : 0));  // BUG misaligned_vector
  io.y[threadIdx.x] = v.x + v.w;
}
PLANTED(misaligned_vector, 1, 32, 32, 0, 0);

template <bool kBug>
__global__ void uninitialised_shared(Io io) {
  KSHARED(float, tile, [64]);
  if (!kBug || threadIdx.x < 60) tile[threadIdx.x] = io.x[threadIdx.x];
  __syncthreads();
  io.y[threadIdx.x] = tile[63 - threadIdx.x];  // BUG uninitialised_shared
}
PLANTED(uninitialised_shared, 1, 64, 64, 0, 0);

template <bool kBug>
__global__ void uninitialised_dynamic_shared(Io io) {
  float* tile = reinterpret_cast<float*>(kdyn_smem());
  if (!kBug || threadIdx.x < 60) tile[threadIdx.x] = io.x[threadIdx.x];
  __syncthreads();
  io.y[threadIdx.x] = tile[63 - threadIdx.x];  // BUG uninitialised_dynamic_shared
}
PLANTED(uninitialised_dynamic_shared, 1, 64, 64, 256, 256);

// Shared memory does not keep its content from one block to the next.
template <bool kBug>
__global__ void shared_of_former_block(Io io) {
  KSHARED(float, tile, [32]);
  if (!kBug || blockIdx.x == 0) tile[threadIdx.x] = io.x[threadIdx.x];
  io.y[blockIdx.x * 32 + threadIdx.x] = tile[threadIdx.x];  // BUG shared_of_former_block
}
PLANTED(shared_of_former_block, 2, 32, 32, 0, 0);

// y comes from torch.empty.
template <bool kBug>
__global__ void uninitialised_global(Io io) {
  if (!kBug) io.y[threadIdx.x] = 0;
  io.y[threadIdx.x] += io.x[threadIdx.x];  // BUG uninitialised_global
}
PLANTED(uninitialised_global, 1, 32, 32, 0, 0);

template <bool kBug>
__global__ void index_overflow(Io io) {
  const int row = io.n << 16, stride = kBug ? 1 << 10 : 1;
  const std::int64_t first = row * stride;  // BUG index_overflow
  io.y[0] = first < 0 ? 1.0f : 0.0f;
}
PLANTED(index_overflow, 1, 1, 1, 0, 0);

template <bool kBug>
__global__ void shift_out_of_range(Io io) {
  const unsigned bits = 1u << (kBug ? io.n / 8 : io.n / 16);  // BUG shift_out_of_range
  io.y[0] = float(bits);
}
PLANTED(shift_out_of_range, 1, 1, 1, 0, 0);

template <bool kBug>
__global__ void __launch_bounds__(64) too_many_threads_for_bounds(Io io) {
  io.y[threadIdx.x] = 0;
}
PLANTED(too_many_threads_for_bounds, 1, 64, 96, 0, 0);

template <bool kBug>
__global__ void too_many_threads(Io io) {
  if (threadIdx.x < 256) io.y[threadIdx.x] = 0;
}
PLANTED(too_many_threads, 1, 1024, 1056, 0, 0);

template <bool kBug>
__global__ void too_much_shared(Io io) {
  io.y[threadIdx.x] = 0;
}
PLANTED(too_much_shared, 1, 32, 32, 227 << 10, (227 << 10) + 16);

template <bool kBug>
__global__ void grid_too_high(Io io) {
  if (blockIdx.y == 0) io.y[threadIdx.x] = 0;
}
PLANTED(grid_too_high, dim3(1, bug ? 65536 : 2), 1, 1, 0, 0);

}  // namespace
}  // namespace bugs
