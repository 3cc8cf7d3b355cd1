#include "momentum/momentum_kernel.h"

namespace pyfastpeft {

const MomentumKernels momentum_kernels_avx512 = momentum_kernels<VecAvx512>();

}  // namespace pyfastpeft
