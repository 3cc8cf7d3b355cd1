// The only header a CUDA kernel includes besides the project's own host-and-device headers, and the one place that
// knows which compiler reads the kernel: nvcc here, a host executor that runs kernels without a GPU beside it.
//
// What a kernel may use, so that both can run it:
//   - no <<<>>>, inline asm, __CUDA_ARCH__, CUB, CuTe or cooperative groups outside this file
//   - KLAUNCH to launch; KSHARED for shared memory, never a bare __shared__
//   - only the _sync intrinsics, with masks that are true; a shuffle orders no memory: __syncwarp does
//   - every thread of a block reaches every __syncthreads(); no return before one; no block waits for another
//   - where a bit matters: __fmul_rn, __fadd_rn, __fdiv_rn, __fmaf_rn (nvcc contracts a*b+c by itself)
//   - tables are __constant__ without const; launchers take raw pointers and a stream
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace pyfastpeft {

// Shared memory of a block: KSHARED(float, tile, [64][65]); declares `tile`, 16-byte aligned.
#define KSHARED(T, name, dims) __shared__ __align__(alignof(T) < 16 ? 16 : alignof(T)) T name dims

// Launches kernel<<<grid, block, dynamic_smem, stream>>>(args...) with the arguments converted to the parameters'
// types. Returns the launch's own error; what goes wrong while the kernel runs is reported by a later call.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t dynamic_smem,
                          cudaStream_t stream, Arguments&&... arguments) {
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  if (dynamic_smem > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, int(dynamic_smem));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_smem;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}
#define KLAUNCH(kernel, grid, block, dynamic_smem, stream, ...) \
  ::pyfastpeft::launch_kernel(kernel, dim3(grid), dim3(block), dynamic_smem, stream, __VA_ARGS__)

}  // namespace pyfastpeft
