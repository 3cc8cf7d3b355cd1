// Double quantisation of absmax on the GPU, in one launch: the bits of nf4_absmax_cpu.cpp for the same offset.
//
//   d = absmax - offset;   nested_absmax = max |d| per 256;
//   code = how many midpoints of the map lie strictly below d · (1 / max(nested_absmax, floor))
//
// A warp owns a nested block of 256, a lane eight of its values, 32 apart: absmax is read once. The map and its
// midpoints arrive in the launch's parameters, so that no copy from the host stands in the way of a CUDA graph; the
// first thread block writes the map out. A search takes eight dependent reads of shared memory, a lane's eight values
// hand in hand.
//
// The offset is read from the GPU's memory: torch.mean has just put it there. Its order of summation on a GPU is not
// that on a CPU, so the offset of the same weight may differ between them by some ulp, and a few codes with it. Given
// the offset, every bit is the CPU's.
//
// Moves 4 bytes in and 1 out per quantisation block: 4096 x 14336 at 64 has 917,504 of them, 4.6 MB, 1.1 us at the 4.3
// TB/s an H200 copies. Predicted 3.5 us: 448 thread blocks are one wave, so launch, parameters to shared memory (32
// lanes read 32 words of the constant bank one by one: 0.3 us), a trip to memory, the search (conflicts of 32 lanes in
// any of 255 words: 3 to 4 cycles a read, 64 reads a lane) and the way out follow each other.
#include <cmath>
#include <limits>

#include "common/check.h"
#include "common/cuda_device.h"
#include "common/cuda_vec.cuh"
#include "nf4/nf4.h"

namespace pyfastpeft {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kLaneValues = int(kNestedBlocksize) / kWarp;
static_assert(kThreads == kNestedMapSize, "a thread brings one midpoint");

struct Map {
  float entries[kNestedMapSize];
  float midpoints[kNestedMapSize];  // with the next entry; the last is infinity
};

__global__ void __launch_bounds__(kThreads) nf4_quantize_absmax_kernel(
    const float* __restrict__ absmax,        // [blocks]
    std::int64_t blocks,                     //
    const float* __restrict__ offset,        // [1]
    const Map map,                           //
    std::uint8_t* __restrict__ codes,        // [blocks]
    float* __restrict__ nested_absmax,       // [ceil(blocks / 256)]
    float* __restrict__ nested_map,          // [256]
    unsigned long long* __restrict__ bad) {  // lowered to the first d without a code; or null
  KSHARED(float, midpoints, [kNestedMapSize]);
  const std::int64_t nested = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const std::int64_t first = nested * kNestedBlocksize + threadIdx.x % kWarp;
  const float mean = *offset;
  float values[kLaneValues];
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    const std::int64_t position = first + i * kWarp;
    values[i] = position < blocks ? __fadd_rn(absmax[position], -mean) : 0.0f;
  }
  midpoints[threadIdx.x] = map.midpoints[threadIdx.x];
  if (blockIdx.x == 0) nested_map[threadIdx.x] = map.entries[threadIdx.x];

  float largest = 0;
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) largest = kp::max_magnitude(largest, values[i]);
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2)
    largest = kp::max_magnitude(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
  if (first < blocks && threadIdx.x % kWarp == 0) nested_absmax[nested] = largest;
  const float scale = __frcp_rn(fmaxf(largest, kAbsmaxFloor));
  __syncthreads();  // midpoints

  int below[kLaneValues] = {};
#pragma unroll
  for (int step = kNestedMapSize / 2; step > 0; step /= 2)
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i)
      if (midpoints[below[i] + step - 1] < __fmul_rn(values[i], scale)) below[i] += step;
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    const std::int64_t position = first + i * kWarp;
    if (position >= blocks) continue;
    codes[position] = static_cast<std::uint8_t>(below[i]);
    if (bad != nullptr && !(fabsf(values[i]) < INFINITY)) atomicMin(bad, static_cast<unsigned long long>(position));
  }
}

}  // namespace

void nf4_quantize_absmax_cuda(const float* absmax, std::int64_t blocks, const float* offset, const float* host_map,
                              std::uint8_t* codes, float* nested_absmax, float* nested_map, std::int64_t* bad,
                              void* stream) {
  Map map;
  for (int i = 0; i < kNestedMapSize; ++i) map.entries[i] = host_map[i];
  for (int i = 0; i < kNestedMapSize - 1; ++i) map.midpoints[i] = (map.entries[i] + map.entries[i + 1]) * 0.5f;
  map.midpoints[kNestedMapSize - 1] = std::numeric_limits<float>::infinity();
  const std::int64_t thread_blocks = block_count(blocks, kWarps * kNestedBlocksize);
  const cudaError_t error =
      KLAUNCH(nf4_quantize_absmax_kernel, unsigned(thread_blocks == 0 ? 1 : thread_blocks), kThreads, 0,
              static_cast<cudaStream_t>(stream), absmax, blocks, offset, map, codes, nested_absmax, nested_map,
              reinterpret_cast<unsigned long long*>(bad));  // no absmax: the map is still written
  check_cuda(error, "quantize_absmax", "launching nf4_quantize_absmax_kernel");
}

}  // namespace pyfastpeft
