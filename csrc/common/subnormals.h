// Keeps subnormal floats alive for a scope. torch.set_flush_denormal sets a flag of the calling thread only, so without
// this a result would depend on how many threads share the work. Create one on every thread that computes bits others
// must reproduce; integer-only code needs none.
#pragma once

#include <cstdint>

namespace pyfastpeft {

class KeepSubnormals {
 public:
  KeepSubnormals() {
#if defined(__x86_64__)
    constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
    saved_ = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(saved_ & ~(kFlushToZero | kDenormalsAreZero));
#elif defined(__aarch64__)
    constexpr std::uint64_t kFlushToZero = std::uint64_t{1} << 24;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" ::"r"(saved_ & ~kFlushToZero));
#endif
  }
  ~KeepSubnormals() {
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(saved_);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" ::"r"(saved_));
#endif
  }
  KeepSubnormals(const KeepSubnormals&) = delete;
  KeepSubnormals& operator=(const KeepSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  unsigned saved_;
#elif defined(__aarch64__)
  std::uint64_t saved_;
#endif
};

}  // namespace pyfastpeft
