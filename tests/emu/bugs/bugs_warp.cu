// Planted bugs: shuffles, cp.async, ldmatrix.
#include "bugs.h"

namespace bugs {
namespace {

template <bool kBug>
__global__ void shuffle_in_half_a_warp(Io io) {
  float v = io.x[threadIdx.x];
  if (!kBug || threadIdx.x < 16) v += __shfl_xor_sync(0xffffffffu, v, 1);  // BUG shuffle_in_half_a_warp
  if (kBug && threadIdx.x >= 16) __syncwarp(0xffffffffu);
  io.y[threadIdx.x] = v;
}
PLANTED(shuffle_in_half_a_warp, 1, 32, 32, 0, 0);

template <bool kBug>
__global__ void mask_without_caller(Io io) {
  const unsigned mask = threadIdx.x < 16 || kBug ? 0x0000ffffu : 0xffff0000u;
  io.y[threadIdx.x] = __shfl_xor_sync(mask, io.x[threadIdx.x], 1, 16);  // BUG mask_without_caller
}
PLANTED(mask_without_caller, 1, 32, 32, 0, 0);

// Two buffers: while one is read, the next is on its way.
enum class Pipeline { whole, no_wait, no_barrier, no_second_barrier };
template <Pipeline kHow>
__device__ __forceinline__ void pipeline(const Io& io) {
  float* tiles = reinterpret_cast<float*>(kdyn_smem());  // [2][64]
  const int t = threadIdx.x;
  const auto fetch = [&](int tile) {
    if (t < 16) kp::cp_async16(tiles + tile % 2 * 64 + t * 4, io.x + tile * 64 + t * 4);  // BUG pipeline_refill
    kp::cp_async_commit();
  };
  fetch(0);
  float sum = 0;
  for (int tile = 0; tile < 4; ++tile) {
    if (tile < 3)
      fetch(tile + 1);
    else
      kp::cp_async_commit();
    if (kHow != Pipeline::no_wait) kp::cp_async_wait<1>();
    if (kHow != Pipeline::no_barrier) __syncthreads();
    sum += tiles[tile % 2 * 64 + 63 - t];  // BUG cp_async_without_wait BUG cp_async_without_barrier
    if (kHow != Pipeline::no_second_barrier) __syncthreads();
  }
  io.y[t] = sum;
}
template <bool kBug>
__global__ void cp_async_without_wait(Io io) {
  pipeline<kBug ? Pipeline::no_wait : Pipeline::whole>(io);
}
PLANTED(cp_async_without_wait, 1, 64, 64, 512, 512);
template <bool kBug>
__global__ void cp_async_without_barrier(Io io) {
  pipeline<kBug ? Pipeline::no_barrier : Pipeline::whole>(io);
}
PLANTED(cp_async_without_barrier, 1, 64, 64, 512, 512);
template <bool kBug>
__global__ void pipeline_refill(Io io) {
  pipeline<kBug ? Pipeline::no_second_barrier : Pipeline::whole>(io);
}
PLANTED(pipeline_refill, 1, 64, 64, 512, 512);

template <int kOffset, int kBytes>
__device__ __forceinline__ void copy_one(const Io& io, const float* from) {
  float* tile = reinterpret_cast<float*>(kdyn_smem());
  kp::cp_async16(tile + kOffset, from, kBytes);  // BUG cp_async_misaligned BUG cp_async_beyond_source
  kp::cp_async_commit();
  kp::cp_async_wait<0>();
  io.y[0] = tile[kOffset];
}
template <bool kBug>
__global__ void cp_async_misaligned(Io io) {
  copy_one<kBug ? 2 : 0, 16>(io, io.x);
}
PLANTED(cp_async_misaligned, 1, 1, 1, 64, 64);
template <bool kBug>
__global__ void cp_async_beyond_source(Io io) {
  copy_one<0, kBug ? 4 : 0>(io, io.x + io.n);
}
PLANTED(cp_async_beyond_source, 1, 1, 1, 64, 64);

template <bool kBug>
__global__ void ldmatrix_misaligned(Io io) {
  KSHARED(std::uint16_t, tile, [32 * 8 + 8]);
  for (int i = threadIdx.x; i < 32 * 8 + 8; i += 32) tile[i] = std::uint16_t(i);
  __syncwarp();
  std::uint32_t r[4];
  kp::ldmatrix_x4(r, tile + threadIdx.x * 8 + (kBug && threadIdx.x == 7 ? 2 : 0));  // BUG ldmatrix_misaligned
  io.y[threadIdx.x] = float(r[0] & 0xffffu);
}
PLANTED(ldmatrix_misaligned, 1, 32, 32, 0, 0);

template <bool kBug>
__global__ void ldmatrix_before_syncwarp(Io io) {
  KSHARED(std::uint16_t, tile, [32 * 8]);
  for (int i = threadIdx.x; i < 32 * 8; i += 32) tile[i] = std::uint16_t(i);
  if (!kBug) __syncwarp();
  std::uint32_t r[4];
  kp::ldmatrix_x4<true>(r, tile + threadIdx.x * 8);  // BUG ldmatrix_before_syncwarp
  io.y[threadIdx.x] = float(r[0] & 0xffffu);
}
PLANTED(ldmatrix_before_syncwarp, 1, 32, 32, 0, 0);

}  // namespace
}  // namespace bugs
