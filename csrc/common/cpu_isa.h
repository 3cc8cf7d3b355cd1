// Which instruction set the CPU kernels use: the best the machine has, or the one PYFASTPEFT_CPU_ISA names.
#pragma once

namespace pyfastpeft {

// Ordered: a machine that has one has all below it. avx2 means AVX2 + FMA + F16C; avx512 means F, BW, VL, DQ and BF16;
// amx adds AMX-TILE and AMX-BF16 (with the kernel's permission to use the tile registers).
enum class CpuIsa : int { scalar = 0, avx2 = 1, avx512 = 2, amx = 3 };

CpuIsa detected_cpu_isa();  // what the machine has
CpuIsa cpu_isa();           // what the kernels use; throws std::invalid_argument for an unknown or missing forced one
void force_cpu_isa(const char* name);  // "scalar" | "avx2" | "avx512" | "amx"; null or "" = automatic; for tests
const char* cpu_isa_name(CpuIsa isa);

}  // namespace pyfastpeft
