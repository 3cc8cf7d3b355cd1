// What the compiler calls. Kernels are compiled with -fsanitize=thread and some of -fsanitize=undefined, but linked
// without their libraries: the functions below take the place of theirs.
#include <cstring>

#include "emu/executor.h"

namespace emu {

namespace {

constexpr std::uint64_t kMostAccesses = 300'000'000;  // of a block: ten seconds

inline void access(void* address, std::size_t bytes, bool write, const void* caller, bool aligned) {
  if (!in_kernel() || checks_off) return;
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  if (on_own_stack(at)) return;
  const Code code = last_access = code_of_return(caller);
  if (aligned && at % bytes != 0)
    fail("MISALIGNED %s of %zu bytes at %s", write ? "write" : "read", bytes, describe(code).c_str());
  check_access(address, bytes, write, Kind::plain, code, *current);
  if (++block.accesses > kMostAccesses)
    fail("LIVELOCK: a block has touched memory %llu times, the last time at %s",
         static_cast<unsigned long long>(kMostAccesses), describe(code).c_str());
  preempt_maybe();
}

}  // namespace

void atomic_begin(const void* address, std::size_t bytes) {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  if (!on_own_stack(at)) {
    const Code code = last_access = code_of_return(__builtin_return_address(0));
    if (at % bytes != 0) fail("MISALIGNED atomic of %zu bytes at %s", bytes, describe(code).c_str());
    check_access(address, bytes, false, Kind::atomic, code, *current);
    check_access(address, bytes, true, Kind::atomic, code, *current);
    if (std::size_t(static_cast<const char*>(address) - shared_arena()) >= kArenaBytes) note_atomic(address, *current);
  }
  checks_off = true;
}

void atomic_end() {
  checks_off = false;
  yield();  // others' turn: a loop around an atomic waits for them
}

}  // namespace emu

extern "C" {

#define HOOKS(bytes)                                                                                               \
  EMU_HIDDEN void __tsan_read##bytes(void* p) { emu::access(p, bytes, false, __builtin_return_address(0), true); } \
  EMU_HIDDEN void __tsan_write##bytes(void* p) { emu::access(p, bytes, true, __builtin_return_address(0), true); } \
  EMU_HIDDEN void __tsan_unaligned_read##bytes(void* p) {                                                          \
    emu::access(p, bytes, false, __builtin_return_address(0), false);                                              \
  }                                                                                                                \
  EMU_HIDDEN void __tsan_unaligned_write##bytes(void* p) {                                                         \
    emu::access(p, bytes, true, __builtin_return_address(0), false);                                               \
  }                                                                                                                \
  EMU_HIDDEN void __tsan_volatile_read##bytes(void* p) {                                                           \
    emu::access(p, bytes, false, __builtin_return_address(0), true);                                               \
    if (emu::in_kernel() && !emu::checks_off) emu::yield(); /* a loop that waits reads through a volatile */       \
  }                                                                                                                \
  EMU_HIDDEN void __tsan_volatile_write##bytes(void* p) {                                                          \
    emu::access(p, bytes, true, __builtin_return_address(0), true);                                                \
  }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
EMU_HIDDEN void __tsan_read_range(void* p, std::size_t bytes) {
  emu::access(p, bytes, false, __builtin_return_address(0), false);
}
EMU_HIDDEN void __tsan_write_range(void* p, std::size_t bytes) {
  emu::access(p, bytes, true, __builtin_return_address(0), false);
}
// build.py makes kernels call these instead of the C library's.
EMU_HIDDEN void* emu_memcpy(void* to, const void* from, std::size_t bytes) {
  emu::access(const_cast<void*>(from), bytes, false, __builtin_return_address(0), false);
  emu::access(to, bytes, true, __builtin_return_address(0), false);
  return std::memcpy(to, from, bytes);
}
EMU_HIDDEN void* emu_memmove(void* to, const void* from, std::size_t bytes) {
  emu::access(const_cast<void*>(from), bytes, false, __builtin_return_address(0), false);
  emu::access(to, bytes, true, __builtin_return_address(0), false);
  return std::memmove(to, from, bytes);
}
EMU_HIDDEN void* emu_memset(void* to, int value, std::size_t bytes) {
  emu::access(to, bytes, true, __builtin_return_address(0), false);
  return std::memset(to, value, bytes);
}
EMU_HIDDEN void __tsan_init() {}
EMU_HIDDEN void __tsan_func_entry(void*) {}
EMU_HIDDEN void __tsan_func_exit() {}
EMU_HIDDEN void __tsan_vptr_update(void**, void*) {}
EMU_HIDDEN void __tsan_vptr_read(void**) {}
// std:: code of the launchers, which run on one thread each
EMU_HIDDEN std::uint8_t __tsan_atomic8_load(const volatile std::uint8_t* p, int) { return *p; }

struct UbsanLocation {
  const char* file;
  std::uint32_t line, column;
};
#define UBSAN(name, what)                                                                              \
  EMU_HIDDEN void __ubsan_handle_##name(UbsanLocation* at, std::uintptr_t, std::uintptr_t) {           \
    emu::fail(what " at %s", emu::describe(emu::code_of(emu::Site{at->file, int(at->line)})).c_str()); \
  }
UBSAN(type_mismatch_v1, "MISALIGNED address, for its type,")
UBSAN(out_of_bounds, "OUT OF BOUNDS array index")
UBSAN(shift_out_of_bounds, "SHIFT out of range")
UBSAN(add_overflow, "OVERFLOW of a signed addition")
UBSAN(sub_overflow, "OVERFLOW of a signed subtraction")
UBSAN(mul_overflow, "OVERFLOW of a signed multiplication")
UBSAN(negate_overflow, "OVERFLOW of a signed negation")
UBSAN(divrem_overflow, "DIVISION by zero or overflow of one")

}  // extern "C"
