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

#if defined(PYFASTPEFT_EMULATED)
#include "emu/kport_emu.h"  // tests/emu: the same names for g++, run thread by thread and checked
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

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

// Dynamic shared memory of the launch, 128-byte aligned.
__device__ __forceinline__ unsigned char* kdyn_smem() {
  extern __shared__ __align__(128) unsigned char kdyn_smem_[];
  return kdyn_smem_;
}

// KiB of shared memory on a multiprocessor of the architecture that is being compiled, for __launch_bounds__: blocks that
// do not fit side by side need not share the registers. 228 on the host.
#if !defined(__CUDA_ARCH__)
constexpr int kMultiprocessorSharedKiB = 228;
#elif __CUDA_ARCH__ < 800
constexpr int kMultiprocessorSharedKiB = 64;
#elif __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
constexpr int kMultiprocessorSharedKiB = 100;
#elif __CUDA_ARCH__ < 900
constexpr int kMultiprocessorSharedKiB = 164;
#else
constexpr int kMultiprocessorSharedKiB = 228;
#endif

// PTX without a CUDA C++ spelling. All take generic pointers. On sm_75 cp_async16 is a plain copy; the tensor-core
// functions need sm_80 and end the kernel there: launchers never choose such a kernel for it.
namespace kp {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define PYFASTPEFT_BEFORE_SM80 1
#endif

// Starts the copy of 16 bytes from global to shared memory, both 16-byte aligned; of the source only the first
// `source_bytes` (0 to 16) are read, the rest of the destination becomes zero.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, int source_bytes = 16) {
#if defined(PYFASTPEFT_BEFORE_SM80)
  auto* to = static_cast<uint4*>(shared);
  if (source_bytes == 16) {
    *to = *static_cast<const uint4*>(global);
  } else {  // byte by byte where it is to be: an array between them would lie in memory too
    *to = make_uint4(0, 0, 0, 0);
    for (int i = 0; i < source_bytes; ++i)
      static_cast<unsigned char*>(shared)[i] = static_cast<const unsigned char*>(global)[i];
  }
#else
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(source_bytes) : "memory");
#endif
}

// Closes this thread's group of copies started since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#if !defined(PYFASTPEFT_BEFORE_SM80)
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's groups are unfinished. Other threads' copies need a barrier after it.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if !defined(PYFASTPEFT_BEFORE_SM80)
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit values from shared memory: lane l names row l % 8 of matrix l / 8 (16 bytes, 16-byte
// aligned). Lane l receives in r[m] the values (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of matrix m, the first in
// the low half; with kTranspose those of the matrix transposed.
template <bool kTranspose = false>
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
#if defined(PYFASTPEFT_BEFORE_SM80)
  __trap();
#else
  const auto from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  }
#endif
}

// d [16, 8] += a [16, 16] · b [16, 8], fp32 accumulation. With g = lane / 4 and t = 2 (lane % 4), a register holding two
// neighbours in K, the lower in its low half:
//   a[0] rows g, columns t    a[1] g + 8, t    a[2] g, t + 8    a[3] g + 8, t + 8
//   b[0] rows t, t + 1 of column g             b[1] rows t + 8, t + 9
//   d[0], d[1] row g, columns t, t + 1         d[2], d[3] row g + 8
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16".
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  static_assert(std::is_same<T, __nv_bfloat16>::value || std::is_same<T, __half>::value, "bf16 or fp16 operands");
#if defined(PYFASTPEFT_BEFORE_SM80)
  __trap();
#else
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// max(largest, |v|), NaN when either is: fmaxf drops NaN.
__device__ __forceinline__ float max_magnitude(float largest, float v) {
#if defined(PYFASTPEFT_BEFORE_SM80)  // as integers, magnitudes order like numbers, and NaN above infinity
  const unsigned a = __float_as_uint(largest) & 0x7fffffffu, b = __float_as_uint(v) & 0x7fffffffu;
  return __uint_as_float(a > b ? a : b);
#else
  float result;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(result) : "f"(largest), "f"(fabsf(v)));
  return result;
#endif
}

}  // namespace kp
}  // namespace pyfastpeft
#endif  // PYFASTPEFT_EMULATED
