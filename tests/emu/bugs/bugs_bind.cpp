#include "bugs.h"
#include "common/bind.h"

namespace bugs {

std::map<std::string, Launcher>& launchers() {
  static std::map<std::string, Launcher> all;
  return all;
}

void run(const std::string& name, bool bug, Address x, Address y, Address count, int n) {
  launchers().at(name)({pointer<const float>(x, n, "run", "x"), pointer<float>(y, n, "run", "y"),
                        pointer<unsigned>(count, 1, "run", "count"), n},
                       bug);
}

}  // namespace bugs

PYBIND11_MODULE(_C_bugs, m) {
  pyfastpeft::register_common(m);
  m.def("run", &bugs::run);
  m.def("names", [] {
    pybind11::list names;
    for (const auto& [name, launcher] : bugs::launchers()) names.append(name);
    return names;
  });
}
