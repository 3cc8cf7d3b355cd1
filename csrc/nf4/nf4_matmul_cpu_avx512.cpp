// The 4-bit matrix-vector product on AVX-512.
#include "nf4/nf4_matvec_kernel.h"

namespace pyfastpeft {

void nf4_matvec_rows_avx512(const Nf4MatvecArgs& args, std::int64_t begin, std::int64_t end) {
  nf4_matvec_rows<VecAvx512>(args, begin, end);
}

}  // namespace pyfastpeft
