#include "adamw/adamw_kernel.h"

namespace pyfastpeft {

const AdamwKernels adamw_kernels_avx2 = adamw_kernels<VecAvx2>();

}  // namespace pyfastpeft
