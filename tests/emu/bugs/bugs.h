// Kernels with one planted bug each, and their clean twins: template <bool kBug>. The line to be reported says
// "// BUG name"; test_emu_selfcheck.py looks for it.
#pragma once

#include <map>
#include <string>

#include "common/cuda_vec.cuh"

namespace bugs {

using namespace pyfastpeft;

struct Io {
  const float* x;   // [n]
  float* y;         // [n]
  unsigned* count;  // [1], zero
  int n;            // 256
};
using Launcher = void (*)(Io io, bool bug);

std::map<std::string, Launcher>& launchers();

struct Registration {
  Registration(const char* name, Launcher launcher) { launchers()[name] = launcher; }
};

// PLANTED(name, blocks, threads of the clean and of the wrong launch, dynamic shared memory of both)
#define PLANTED(name, blocks, threads, bug_threads, smem, bug_smem)                \
  const Registration name##_registration(#name, [](Io io, bool bug) {              \
    (void)(bug ? KLAUNCH((name<true>), blocks, bug_threads, bug_smem, nullptr, io) \
               : KLAUNCH((name<false>), blocks, threads, smem, nullptr, io));      \
  })

}  // namespace bugs
