// The host executor's side of csrc/common/kport.cuh: the same names, with the same meaning.
#pragma once

#include "emu/cuda_emu.h"

namespace pyfastpeft {

#define KSHARED(T, name, dims)                                                             \
  using name##_emu_type = T dims;                                                          \
  static ::emu::SharedVariable name##_emu_variable = {                                     \
      sizeof(name##_emu_type), alignof(T) < 16 ? 16 : alignof(T), sizeof(T), #name, 0, 0}; \
  name##_emu_type& name = *static_cast<name##_emu_type*>(::emu::shared_variable(&name##_emu_variable))

#define KLAUNCH(kernel, grid, block, dynamic_smem, stream, ...) \
  (((void)(stream)), ::emu::launch_kernel(kernel, dim3(grid), dim3(block), dynamic_smem, __VA_ARGS__))

constexpr int kMultiprocessorSharedKiB = 228;

inline unsigned char* kdyn_smem() { return static_cast<unsigned char*>(::emu::dynamic_shared()); }

namespace kp {

EMU_INLINE void cp_async16(void* shared, const void* global, int source_bytes = 16) {
  ::emu::cp_async16(shared, global, source_bytes);
}
EMU_INLINE void cp_async_commit() { ::emu::cp_async_commit(); }
template <int kPending>
EMU_INLINE void cp_async_wait() {
  ::emu::cp_async_wait(kPending);
}

template <bool kTranspose = false>
void ldmatrix_x4(std::uint32_t (&r)[4], const void* row, EMU_SITE) {
  ::emu::ldmatrix_x4(r, row, kTranspose, site);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], EMU_SITE) {
  static_assert(std::is_same<T, __nv_bfloat16>::value || std::is_same<T, __half>::value, "bf16 or fp16 operands");
  ::emu::mma_m16n8k16(d, a, b, std::is_same<T, __nv_bfloat16>::value, site);
}

EMU_INLINE float max_magnitude(float largest, float v) {
  return std::isnan(largest) || std::isnan(v) ? std::nanf("") : std::fmax(largest, std::fabs(v));
}

}  // namespace kp
}  // namespace pyfastpeft
