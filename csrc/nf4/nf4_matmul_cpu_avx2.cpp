// The 4-bit matrix-vector product on AVX2.
#include "nf4/nf4_matvec_kernel.h"

namespace pyfastpeft {

void nf4_matvec_rows_avx2(const Nf4MatvecArgs& args, std::int64_t begin, std::int64_t end) {
  nf4_matvec_rows<VecAvx2>(args, begin, end);
}

}  // namespace pyfastpeft
