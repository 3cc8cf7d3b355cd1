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

inline void check_cuda(cudaError_t error, const char* op, const char* step) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a launch error stays set until it is read, and would be reported again by the next launch
  throw std::runtime_error(
      message(op, ": ", step, " failed: ", cudaGetErrorName(error), ": ", cudaGetErrorString(error)));
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
