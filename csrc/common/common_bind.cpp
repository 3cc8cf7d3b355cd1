#include "common/bind.h"
#include "common/cpu_isa.h"
#include "common/parallel.h"

namespace pyfastpeft {

void register_common(py::module_& m) {
  m.def("detected_cpu_isa", [] { return cpu_isa_name(detected_cpu_isa()); });
  m.def("cpu_isa", [] { return cpu_isa_name(cpu_isa()); });
  m.def("force_cpu_isa", &force_cpu_isa, py::arg("name").none(true));
  m.def("max_threads", &max_threads);
}

}  // namespace pyfastpeft
