#include "ia3/ia3_kernel.h"

namespace pyfastpeft {

const Ia3Kernels ia3_kernels_avx512 = ia3_kernels<VecAvx512>();

}  // namespace pyfastpeft
