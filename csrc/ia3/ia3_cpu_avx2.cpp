#include "ia3/ia3_kernel.h"

namespace pyfastpeft {

const Ia3Kernels ia3_kernels_avx2 = ia3_kernels<VecAvx2>();

}  // namespace pyfastpeft
