// Takes the place of csrc/common/'s bindings in the emulated module: Python's way to the executor itself.
#include <pybind11/stl.h>

#include "common/bind.h"
#include "emu/executor.h"

namespace pyfastpeft {

void register_common(py::module_& m) {
  py::register_exception<emu::Report>(m, "Report", PyExc_AssertionError);
  m.def(
      "emu_configure",
      [](std::uint64_t seed, unsigned preempt, int capability) { emu::config = {seed, preempt, capability, 0}; },
      py::arg("seed") = 0, py::arg("preempt") = 0, py::arg("capability") = 90);
  m.def("emu_fail_launch", [](int error) { emu::config.launch_error = error; }, py::arg("error"));
  m.def("emu_forget_ranges", &emu::forget_ranges);
  m.def("emu_mark_fresh", &emu::mark_fresh, py::arg("begin"), py::arg("bytes"));
  m.def("emu_mark_filled", &emu::mark_filled, py::arg("begin"), py::arg("bytes"));
  m.def("emu_first_unwritten", &emu::first_unwritten, py::arg("begin"), py::arg("bytes"));
  m.def("emu_forget_fresh", &emu::forget_fresh);
  m.def("emu_launches", &emu::launches);
  m.def("emu_seconds", &emu::seconds);
  m.def(
      "emu_run_instead",
      [](py::object run) {
        if (run.is_none()) {
          emu::runs_instead = nullptr;
          return;
        }
        // never destroyed: the module may outlive the interpreter
        const auto* function = new py::object(std::move(run));
        emu::runs_instead = [function](const emu::Launch& launch) {
          py::gil_scoped_acquire gil;
          py::list arguments, buffers;
          for (const auto& [address, bytes] : launch.parameters)
            arguments.append(py::bytes(static_cast<const char*>(address), bytes));
          for (const emu::Buffer& b : emu::launch_buffers())
            buffers.append(py::make_tuple(b.begin, b.end, b.read_only, b.name));
          const auto sizes = [](const dim3& d) { return py::make_tuple(d.x, d.y, d.z); };
          (*function)(emu::kernel_name(launch.entry), sizes(launch.grid), sizes(launch.block), launch.dynamic_smem,
                      arguments, buffers);
        };
      },
      py::arg("run"),
      "Hands every launch to run(kernel, grid, block, dynamic_smem, arguments as bytes, buffers (begin, end, "
      "read_only, "
      "name)); None: back to the executor.");
  m.def("emu_raise_reports", [] {
    if (const std::string found = emu::take_reports(); !found.empty()) throw emu::Report(found);
  });
}

}  // namespace pyfastpeft

// What a binding of the emulated module must not call: there is no CPU kernel in it.
extern "C" [[gnu::visibility("hidden")]] void emu_not_in_this_module() {
  throw std::logic_error("the emulated module holds the CUDA kernels only; CPU functions are pyfastpeft._C's");
}
