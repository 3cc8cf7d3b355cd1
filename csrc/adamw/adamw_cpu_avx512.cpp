#include "adamw/adamw_kernel.h"

namespace pyfastpeft {

const AdamwKernels adamw_kernels_avx512 = adamw_kernels<VecAvx512>();

}  // namespace pyfastpeft
