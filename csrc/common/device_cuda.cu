#include "common/cuda_device.h"

namespace pyfastpeft {

CudaStatus cuda_status() {
  CudaStatus status;
  cudaRuntimeGetVersion(&status.runtime_version);
  cudaDriverGetVersion(&status.driver_version);
  int count = 0;
  cudaError_t error = status.driver_version == 0 ? cudaErrorInsufficientDriver : cudaGetDeviceCount(&count);
  for (int i = 0; i < count && error == cudaSuccess; ++i) {
    cudaDeviceProp properties;
    error = cudaGetDeviceProperties(&properties, i);
    if (error == cudaSuccess)
      status.devices.push_back({properties.name, properties.major, properties.minor, properties.totalGlobalMem});
  }
  if (status.driver_version == 0)
    status.error = "no driver";
  else if (error != cudaSuccess)
    status.error = message(cudaGetErrorName(error), ": ", cudaGetErrorString(error));
  cudaGetLastError();
  return status;
}

}  // namespace pyfastpeft
