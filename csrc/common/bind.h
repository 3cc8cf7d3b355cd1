// What every *_bind.cpp uses. Tensors arrive as data_ptr() integers: the compiled code knows no torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

#include "common/check.h"
#include "common/dtype.h"
#if defined(PYFASTPEFT_EMULATED)
#include "emu/registry.h"
#endif

namespace pyfastpeft {

namespace py = pybind11;
using Address = std::uintptr_t;

// Tells the host executor (tests/emu) that kernels may touch this memory during the binding's call: nothing elsewhere.
// pointer() calls it; for addresses that reach a kernel on another way, such as a table of them, the binding does.
inline void register_range([[maybe_unused]] Address address, [[maybe_unused]] std::int64_t bytes,
                           [[maybe_unused]] const char* name, [[maybe_unused]] bool read_only) {
#if defined(PYFASTPEFT_EMULATED)
  emu::register_range(address, bytes, name, read_only);
#endif
}

// A tensor's memory. Refuses null where there are values: the data_ptr() of a fake or meta tensor is 0.
// A const T says that no kernel writes it. A kernel may touch nothing of a pointer<void> without a dtype.
template <typename T>
T* pointer(Address address, std::int64_t numel, const char* op, const char* name) {
  check(address != 0 || numel == 0, op, ": ", name, " has no memory (a fake or meta tensor?), expected ", numel,
        " values; call through torch.ops.pyfastpeft, which has an implementation for such tensors");
  if constexpr (!std::is_void_v<T>) register_range(address, numel * std::int64_t(sizeof(T)), name, std::is_const_v<T>);
  return reinterpret_cast<T*>(address);
}

// The same for a dtype known at run time; V is void, or const void where the kernel only reads.
template <typename V>
V* pointer(Address address, std::int64_t numel, DType dtype, const char* op, const char* name) {
  using Wide = std::conditional_t<std::is_const_v<V>, const float, float>;
  using Half = std::conditional_t<std::is_const_v<V>, const std::uint16_t, std::uint16_t>;
  if (dtype == DType::f32) return pointer<Wide>(address, numel, op, name);
  return pointer<Half>(address, numel, op, name);
}

void register_adamw(py::module_& m);
void register_common(py::module_& m);
void register_ia3(py::module_& m);
void register_lora(py::module_& m);
void register_momentum(py::module_& m);
void register_nf4(py::module_& m);
void register_nf4_matmul(py::module_& m);
void register_paged_memory(py::module_& m);
void register_segmented_lora(py::module_& m);

}  // namespace pyfastpeft
