// Which memory a kernel may touch: every pointer that a binding hands to a launcher is registered for the length of
// that binding's call, with its exact size. csrc/common/bind.h calls this; memory.cpp keeps the list, one per OS thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emu {

void register_range(std::uintptr_t begin, std::int64_t bytes, const char* name, bool read_only);
void forget_ranges();  // the binding's call is over

// Memory that an allocation returned and nobody has filled: reading it is an error until a kernel has written it.
void mark_fresh(std::uintptr_t begin, std::int64_t bytes);
void mark_filled(std::uintptr_t begin, std::int64_t bytes);              // by something else than a kernel
std::int64_t first_unwritten(std::uintptr_t begin, std::int64_t bytes);  // -1: all of it has been written
void forget_fresh();

}  // namespace emu
