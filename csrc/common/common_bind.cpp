// The binding of csrc/common/: which instruction set runs, how many threads, what this build holds.
#include <dlfcn.h>
#include <omp.h>

#include <algorithm>

#include "build_info.h"
#include "common/bind.h"
#include "common/cpu_isa.h"
#include "common/cuda_device.h"
#include "common/parallel.h"

namespace pyfastpeft {
namespace {

py::list split(const std::string& text) {
  py::list parts;
  for (std::size_t begin = 0, end; begin < text.size(); begin = end + 1) {
    end = std::min(text.find(';', begin), text.size());
    if (end > begin) parts.append(text.substr(begin, end - begin));
  }
  return parts;
}

py::dict build_info_dict() {
  py::dict info;
  info["version"] = build_info::kVersion;
  info["commit"] = build_info::kCommit;
  info["compiler"] = build_info::kCompiler;
  info["processor"] = build_info::kProcessor;
  info["cuda"] = build_info::kCuda;
  info["no_cuda_reason"] = build_info::kNoCudaReason;
  info["cuda_archs"] = split(build_info::kCudaArchs);
  info["kernel_files"] = split(build_info::kKernelFiles);
  return info;
}

// The file whose OpenMP our loops run on: torch's libgomp, unless something went wrong.
std::string openmp_library() {
  Dl_info info;
  return dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) != 0 && info.dli_fname ? info.dli_fname : "";
}

py::dict cuda_status_dict() {
  py::dict result;
#if defined(PYFASTPEFT_WITH_CUDA)
  CudaStatus status;
  {
    py::gil_scoped_release release;
    status = cuda_status();
  }
  py::list devices;
  for (const CudaDevice& device : status.devices)
    devices.append(py::dict(py::arg("name") = device.name,
                            py::arg("capability") = py::make_tuple(device.major, device.minor),
                            py::arg("memory_bytes") = device.memory_bytes));
  result["built"] = true;
  result["runtime_version"] = status.runtime_version;
  result["driver_version"] = status.driver_version;
  result["error"] = status.error;
  result["devices"] = devices;
#else
  result["built"] = false;
#endif
  return result;
}

}  // namespace

void register_common(py::module_& m) {
#if defined(PYFASTPEFT_WITH_CUDA)
  for (const py::handle arch : split(build_info::kCudaArchs))
    cuda_archs_text() += (cuda_archs_text().empty() ? "" : ", ") + arch.cast<std::string>();
  m.def("cuda_error_text", [](int error) { return cuda_error_text(cudaError_t(error)); }, py::arg("error"));
#endif
  m.def("build_info", &build_info_dict);
  m.def("cpu_isa", [] { return cpu_isa_name(cpu_isa()); });
  m.def("cuda_status", &cuda_status_dict);
  m.def("detected_cpu_isa", [] { return cpu_isa_name(detected_cpu_isa()); });
  m.def("force_cpu_isa", &force_cpu_isa, py::arg("name").none(true));
  m.def("max_threads", &max_threads);
  m.def("openmp_library", &openmp_library);
}

}  // namespace pyfastpeft
