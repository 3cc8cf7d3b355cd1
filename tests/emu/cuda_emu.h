// CUDA's device side for g++: keywords, built-in variables, barriers, warp collectives, atomics and the intrinsics that
// CUDA's own headers do not offer to a host compiler. Kernels see it through kport_emu.h; README.md explains the whole.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// ---- keywords ----------------------------------------------------------------------------------------------------
// CUDA's headers define most of them as attributes that a host compiler ignores.
#undef __shared__
#define __shared__ use_KSHARED_or_kdyn_smem_instead_of_a_bare_shared  // does not compile, by design
#undef __constant__
#define __constant__ __attribute__((section("emu_constant"), aligned(64)))
#undef __launch_bounds__
// That many NOPs before the kernel's first instruction: launch_bound() counts them. sizeof, because the attribute takes
// only what g++ has already reduced to a number.
#define __launch_bounds__(threads, ...) \
  __attribute__((patchable_function_entry(sizeof(char[(threads)]), sizeof(char[(threads)]))))
#undef assert
#define assert(condition) ((condition) ? (void)0 : ::emu::fail("ASSERT failed: %s", #condition))

// ---- built-in variables: constant for the life of a thread ---------------------------------------------------------
#define EMU_HIDDEN __attribute__((visibility("hidden")))
EMU_HIDDEN extern const uint3 threadIdx asm("emu_threadIdx");
EMU_HIDDEN extern const uint3 blockIdx asm("emu_blockIdx");
EMU_HIDDEN extern const dim3 blockDim asm("emu_blockDim");
EMU_HIDDEN extern const dim3 gridDim asm("emu_gridDim");
constexpr int warpSize = 32;

namespace emu {

// Where in the kernel a call stands: the default argument is evaluated at the call.
struct Site {
  const char* file;
  int line;
};
#define EMU_SITE ::emu::Site site = {__builtin_FILE(), __builtin_LINE()}
// Calls whose place in the code is found by their return address must stand in the kernel itself.
#define EMU_INLINE [[gnu::always_inline]] inline

[[gnu::format(printf, 1, 2)]] void fail(const char* format, ...);  // reports, and gives the launch up

// ---- barriers and warp collectives ---------------------------------------------------------------------------------
enum class Barrier { plain, count, all, any };
int syncthreads(Barrier kind, int predicate, Site site);

// Each lane of `mask` brings `in` and receives `out`; the last one to arrive runs `body` once for all that came. With
// `aligned` all lanes must stand at the same place in the code.
using CollectiveBody = void (*)(void* const in[32], void* const out[32], std::uint32_t lanes);
void collective(const char* name, std::uint32_t mask, void* in, void* out, CollectiveBody body, bool aligned,
                Site site);
void syncwarp(std::uint32_t mask, Site site);
unsigned ballot(const char* name, std::uint32_t mask, bool predicate, Site site);
void ldmatrix_x4(std::uint32_t* r, const void* row, bool transpose, Site site);
void mma_m16n8k16(float* d, const std::uint32_t* a, const std::uint32_t* b, bool bf16, Site site);

enum class Shuffle { index, exclusive_or, down, up };
template <Shuffle kKind>
constexpr int shuffle_source(int lane, int argument, int width) {
  const int first = lane & ~(width - 1);
  int source = 0;
  if constexpr (kKind == Shuffle::index) return first + (argument & (width - 1));
  if constexpr (kKind == Shuffle::exclusive_or) source = lane ^ argument;
  if constexpr (kKind == Shuffle::down) source = lane + argument;
  if constexpr (kKind == Shuffle::up) source = lane - argument;
  return source < first || source >= first + width ? lane : source;
}
template <Shuffle kKind, typename T>
T shuffle(const char* name, std::uint32_t mask, T value, int argument, int width, Site site) {
  static_assert(std::is_trivially_copyable<T>::value && (sizeof(T) <= 8), "what a shuffle moves");
  struct In {
    T value;
    int argument, width;
  } in{value, argument, width};
  T result;
  collective(
      name, mask, &in, &result,
      [](void* const* ins, void* const* outs, std::uint32_t lanes) {
        for (int lane = 0; lane < 32; ++lane) {
          if (!(lanes >> lane & 1)) continue;
          const In& mine = *static_cast<const In*>(ins[lane]);
          const int source = shuffle_source<kKind>(lane, mine.argument, mine.width);
          if (lanes >> source & 1)
            __builtin_memcpy(outs[lane], &static_cast<const In*>(ins[source])->value, sizeof(T));
          else
            __builtin_memset(outs[lane], 0xff, sizeof(T));  // undefined in CUDA: the lane does not take part
        }
      },
      false, site);
  return result;
}

// ---- memory --------------------------------------------------------------------------------------------------------
struct SharedVariable {
  std::size_t bytes, alignment, element_bytes;
  const char* name;
  std::size_t offset;   // in the arena; 0: not yet placed
  std::uint32_t block;  // serial number of the block it was last cleared for
};
void* shared_variable(SharedVariable* variable);
void* dynamic_shared();

void atomic_begin(const void* address, std::size_t bytes);  // checked; until atomic_end other checks are off
void atomic_end();
template <typename T, typename F>
EMU_INLINE T atomic(T* address, F&& new_value) {
  atomic_begin(address, sizeof(T));
  const T old = *address;
  *address = new_value(old);
  atomic_end();
  return old;
}
void threadfence();
void yield();

void cp_async16(void* to, const void* from, int source_bytes);
void cp_async_commit();
void cp_async_wait(int pending);

// ---- launch --------------------------------------------------------------------------------------------------------
struct Launch {
  dim3 grid, block;
  std::size_t dynamic_smem;
  const void* entry;         // the kernel's first instruction
  void (*run)(const void*);  // runs the kernel for the current thread
  const void* arguments;     // what `run` is given: readable by the kernel
  std::size_t arguments_bytes;
  std::vector<std::pair<const void*, std::size_t>> parameters;  // (address, bytes) of each argument in there
};
cudaError_t take_launch_error();    // what emu_fail_launch asked for, once
void launch(const Launch& launch);  // throws Report, an error with all that was found

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t dynamic_smem,
                          Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "kernel parameters beyond 4 KiB need CUDA 12.1 and sm_70");
  if (const cudaError_t error = take_launch_error(); error != cudaSuccess) return error;
  using Values = std::tuple<std::decay_t<Parameters>...>;
  struct Call {
    void (*kernel)(Parameters...);
    Values values;
  } call{kernel, Values(static_cast<Parameters>(arguments)...)};
  launch({grid, block, dynamic_smem, reinterpret_cast<const void*>(kernel),
          [](const void* c) {
            const Call& call = *static_cast<const Call*>(c);
            std::apply(call.kernel, call.values);
          },
          &call, sizeof call,
          std::apply(
              [](const auto&... values) {
                return std::vector<std::pair<const void*, std::size_t>>{{&values, sizeof values}...};
              },
              call.values)});
  return cudaSuccess;
}

}  // namespace emu

// ---- CUDA's names: barriers and collectives --------------------------------------------------------------------------
inline void __syncthreads(EMU_SITE) { emu::syncthreads(emu::Barrier::plain, 0, site); }
inline int __syncthreads_count(int p, EMU_SITE) { return emu::syncthreads(emu::Barrier::count, p, site); }
inline int __syncthreads_and(int p, EMU_SITE) { return emu::syncthreads(emu::Barrier::all, p, site); }
inline int __syncthreads_or(int p, EMU_SITE) { return emu::syncthreads(emu::Barrier::any, p, site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_SITE) { emu::syncwarp(mask, site); }

template <typename T>
T __shfl_sync(unsigned mask, T v, int lane, int width = 32, EMU_SITE) {
  return emu::shuffle<emu::Shuffle::index>("__shfl_sync", mask, v, lane, width, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int lane_mask, int width = 32, EMU_SITE) {
  return emu::shuffle<emu::Shuffle::exclusive_or>("__shfl_xor_sync", mask, v, lane_mask, width, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, EMU_SITE) {
  return emu::shuffle<emu::Shuffle::down>("__shfl_down_sync", mask, v, int(delta), width, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, EMU_SITE) {
  return emu::shuffle<emu::Shuffle::up>("__shfl_up_sync", mask, v, int(delta), width, site);
}
inline unsigned __ballot_sync(unsigned mask, int p, EMU_SITE) { return emu::ballot("__ballot_sync", mask, p, site); }
inline int __any_sync(unsigned mask, int p, EMU_SITE) { return emu::ballot("__any_sync", mask, p, site) != 0; }
inline int __all_sync(unsigned mask, int p, EMU_SITE) { return emu::ballot("__all_sync", mask, !p, site) == 0; }

inline void __threadfence() { emu::threadfence(); }
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emu::yield(); }

// ---- atomics ---------------------------------------------------------------------------------------------------------
template <typename T>
EMU_INLINE T atomicAdd(T* p, std::common_type_t<T> v) {
  return emu::atomic(p, [&](T old) { return T(old + v); });
}
template <typename T>
EMU_INLINE T atomicMax(T* p, std::common_type_t<T> v) {
  return emu::atomic(p, [&](T old) { return old > v ? old : v; });
}
template <typename T>
EMU_INLINE T atomicMin(T* p, std::common_type_t<T> v) {
  return emu::atomic(p, [&](T old) { return old < v ? old : v; });
}
template <typename T>
EMU_INLINE T atomicOr(T* p, std::common_type_t<T> v) {
  return emu::atomic(p, [&](T old) { return T(old | v); });
}
template <typename T>
EMU_INLINE T atomicAnd(T* p, std::common_type_t<T> v) {
  return emu::atomic(p, [&](T old) { return T(old & v); });
}
template <typename T>
EMU_INLINE T atomicExch(T* p, std::common_type_t<T> v) {
  return emu::atomic(p, [&](T) { return v; });
}
template <typename T>
EMU_INLINE T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> v) {
  return emu::atomic(p, [&](T old) { return old == expected ? v : old; });
}
EMU_INLINE unsigned atomicInc(unsigned* p, unsigned last) {
  return emu::atomic(p, [&](unsigned old) { return old >= last ? 0u : old + 1; });
}

#include "emu/intrinsics_emu.h"
