#include "common/bind.h"
#include "costs.h"

PYBIND11_MODULE(_C_costs, m) {
  using namespace pyfastpeft;
  register_common(m);
  m.def("run", [](int operation, Address x, Address y, int rounds) {
    return run_cost(operation, pointer<const float>(x, 256, "run", "x"), pointer<float>(y, 256, "run", "y"), rounds);
  });
}
