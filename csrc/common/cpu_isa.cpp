#include "common/cpu_isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "common/check.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyfastpeft {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "amx"};
constexpr int kUndecided = -1;
std::atomic<int> g_isa{kUndecided};

#if defined(__x86_64__)
bool cpuid_bit(unsigned leaf, unsigned subleaf, int reg, int bit) {
  unsigned r[4];
  __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(subleaf));
  return (r[reg] >> bit) & 1u;
}
enum Register { eax, ebx, ecx, edx };

// Linux hands out the tile registers on request, once per process.
bool amx_permitted() {
#if defined(__linux__)
  constexpr int kArchRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kArchRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

CpuIsa parse(const char* name) {
  for (int i = 0; i < 4; ++i)
    if (std::strcmp(name, kNames[i]) == 0) return CpuIsa(i);
  throw std::invalid_argument(
      message("PYFASTPEFT_CPU_ISA is '", name, "', expected scalar, avx2, avx512 or amx; unset it for the best one"));
}

CpuIsa choose(const char* name) {
  const CpuIsa best = detected_cpu_isa();
  if (name == nullptr || *name == '\0') return best;
  const CpuIsa wanted = parse(name);
  check(wanted <= best, "PYFASTPEFT_CPU_ISA is '", name, "', but this machine has at most ", cpu_isa_name(best),
        "; unset it, or name one up to ", cpu_isa_name(best));
  return wanted;
}

}  // namespace

CpuIsa detected_cpu_isa() {
#if defined(__x86_64__)
  static const CpuIsa detected = [] {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpuid_bit(1, 0, ecx, 29)))
      return CpuIsa::scalar;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        cpuid_bit(7, 1, eax, 5);
    if (!avx512) return CpuIsa::avx2;
    const bool amx = cpuid_bit(7, 0, edx, 24) && cpuid_bit(7, 0, edx, 22) && amx_permitted();
    return amx ? CpuIsa::amx : CpuIsa::avx512;
  }();
  return detected;
#else
  return CpuIsa::scalar;
#endif
}

CpuIsa cpu_isa() {
  int isa = g_isa.load(std::memory_order_relaxed);
  if (isa == kUndecided) {
    isa = int(choose(std::getenv("PYFASTPEFT_CPU_ISA")));
    g_isa.store(isa, std::memory_order_relaxed);
  }
  return CpuIsa(isa);
}

void force_cpu_isa(const char* name) { g_isa.store(int(choose(name)), std::memory_order_relaxed); }

const char* cpu_isa_name(CpuIsa isa) { return kNames[int(isa)]; }

}  // namespace pyfastpeft
