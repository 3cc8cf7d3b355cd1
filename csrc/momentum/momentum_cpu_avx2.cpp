#include "momentum/momentum_kernel.h"

namespace pyfastpeft {

const MomentumKernels momentum_kernels_avx2 = momentum_kernels<VecAvx2>();

}  // namespace pyfastpeft
