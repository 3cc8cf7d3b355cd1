// pyfastpeft._C: one register_<folder>(m) per folder of csrc/.
#include "common/bind.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "pyfastpeft's compiled kernels; use pyfastpeft.ops or torch.ops.pyfastpeft";
  pyfastpeft::register_common(m);
  pyfastpeft::register_adamw(m);
  pyfastpeft::register_ia3(m);
  pyfastpeft::register_lora(m);
  pyfastpeft::register_momentum(m);
  pyfastpeft::register_nf4(m);
  pyfastpeft::register_nf4_matmul(m);
  pyfastpeft::register_paged_memory(m);
  pyfastpeft::register_segmented_lora(m);
}
