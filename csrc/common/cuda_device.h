// What host code needs from the CUDA runtime. The first part compiles everywhere; with PYFASTPEFT_WITH_CUDA a launcher
// also gets the error check and the device guard.
#pragma once

#include <string>
#include <vector>

namespace pyfastpeft {

struct CudaDevice {
  std::string name;
  int major, minor;  // compute capability
  std::size_t memory_bytes;
};
struct CudaStatus {
  int runtime_version = 0;  // 13000 for 13.0; the runtime is linked statically
  int driver_version = 0;   // the newest CUDA the driver runs; 0: no driver
  std::string error;        // empty: the devices below can be used
  std::vector<CudaDevice> devices;
};
// Never throws: a machine without a driver is an answer, not an error.
CudaStatus cuda_status();

}  // namespace pyfastpeft

#if defined(PYFASTPEFT_WITH_CUDA)
#include <cuda_runtime_api.h>

#include "common/check.h"

namespace pyfastpeft {

// The architectures in this build, as the module's initialisation has set them: "75, 80, 90a, 90+PTX".
inline std::string& cuda_archs_text() {
  static std::string archs;
  return archs;
}

// CUDA's name for an error, and for those of the installation what is wrong with it and the way out.
inline std::string cuda_error_text(cudaError_t error) {
  constexpr int kRelease = CUDART_VERSION / 1000;
  const auto release = [](int version) { return message(version / 1000, ".", version % 1000 / 10); };
  const std::string name = message(cudaGetErrorName(error), ": ", cudaGetErrorString(error));
  const std::string doctor = "; `pyfastpeft doctor` shows driver, GPU and build";
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction: {
      int device = 0, major = 0, minor = 0;
      cudaGetDevice(&device);
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
      return message(name, "; the GPU has compute capability ", major, ".", minor,
                     ", this build of pyfastpeft has kernels for ", cuda_archs_text(),
                     "; rebuild it with PYFASTPEFT_CUDA_ARCHS=", major, minor,
                     " (75 is the oldest), or move the tensors to the CPU", doctor);
    }
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion: {
      int driver = 0;
      cudaDriverGetVersion(&driver);
      return message(name,
                     driver == 0 ? std::string("; there is no NVIDIA driver")
                                 : message("; the NVIDIA driver runs CUDA up to ", release(driver)),
                     ", pyfastpeft was built with CUDA ", release(CUDART_VERSION), "; install driver ",
                     kRelease == 12 ? 525 : 580, " or newer, or rebuild with an older CUDA toolkit on PATH", doctor);
    }
    case cudaErrorNoDevice:
      return message(name, "; the driver finds no GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES", doctor);
    default:
      return name;
  }
}

inline void check_cuda(cudaError_t error, const char* op, const char* step) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a launch error stays set until it is read, and would be reported again by the next launch
  throw std::runtime_error(message(op, ": ", step, " failed: ", cuda_error_text(error)));
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute, const char* op) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), op, "asking for the current device");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), op, "asking for an attribute of the device");
  return value;
}
inline int multiprocessors(const char* op) { return device_attribute(cudaDevAttrMultiProcessorCount, op); }

// Makes `device` the current one and puts the former one back.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check_cuda(cudaGetDevice(&former_), op, "asking for the current device");
    if (device != former_) check_cuda(cudaSetDevice(device), op, "setting the device");
    changed_ = device != former_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = 0;
  bool changed_ = false;
};

}  // namespace pyfastpeft
#endif
