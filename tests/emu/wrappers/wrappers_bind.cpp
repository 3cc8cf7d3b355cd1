#include "common/bind.h"
#include "wrappers.h"

namespace {

int run(int wrapper, pyfastpeft::Address in, int in_bytes, pyfastpeft::Address out, int out_bytes) {
  using pyfastpeft::pointer;
  return run_wrapper(wrapper, pointer<const unsigned char>(in, in_bytes, "run", "in"),
                     pointer<unsigned char>(out, out_bytes, "run", "out"), nullptr);
}

}  // namespace

PYBIND11_MODULE(_C_wrappers, m) {
  pyfastpeft::register_common(m);
  m.def("run", &run);
}
