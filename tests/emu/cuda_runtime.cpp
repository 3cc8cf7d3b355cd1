// The functions of the CUDA runtime that launchers and bindings call, for a machine with one GPU: this executor.
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>

#include "emu/executor.h"

namespace {

cudaError_t attribute(int* value, cudaDeviceAttr what) {
  switch (what) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = emu::config.capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emu::config.capability % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;  // few, so that grids that follow it stay small
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(emu::shared_limit(emu::config.capability));
      return cudaSuccess;
    case cudaDevAttrConcurrentManagedAccess:
      *value = 1;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

constexpr std::size_t kDeviceBytes = std::size_t(1) << 30;
std::map<const char*, std::size_t> managed;  // unified memory: where it begins and how long it is

bool in_managed(const void* begin, std::size_t bytes) {
  const char* first = static_cast<const char*>(begin);
  auto block = managed.upper_bound(first);
  return block != managed.begin() && (--block, first + bytes <= block->first + block->second);
}

}  // namespace

cudaError_t emu::take_launch_error() { return cudaError_t(std::exchange(config.launch_error, 0)); }

extern "C" {

cudaError_t CUDARTAPI cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t CUDARTAPI cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaGetLastError() { return cudaSuccess; }
cudaError_t CUDARTAPI cudaPeekAtLastError() { return cudaSuccess; }
const char* CUDARTAPI cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "an error of the host executor";
}
const char* CUDARTAPI cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "the host executor does not know this call's arguments";
}
cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) { return attribute(value, what); }
cudaError_t CUDARTAPI cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t CUDARTAPI cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *total = *free = kDeviceBytes;
  for (const auto& [begin, bytes] : managed) *free -= bytes;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaMallocManaged(void** memory, std::size_t bytes, unsigned) {
  *memory = std::malloc(bytes);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  managed[static_cast<const char*>(*memory)] = bytes;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaFree(void* memory) {
  if (memory != nullptr && managed.erase(static_cast<const char*>(memory)) == 0) return cudaErrorInvalidValue;
  std::free(memory);
  return cudaSuccess;
}
#if CUDART_VERSION >= 13000
cudaError_t CUDARTAPI cudaMemAdvise(const void* begin, std::size_t bytes, cudaMemoryAdvise, cudaMemLocation) {
  return in_managed(begin, bytes) ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t CUDARTAPI cudaMemPrefetchAsync(const void* begin, std::size_t bytes, cudaMemLocation to, unsigned flags,
                                           cudaStream_t) {
  return in_managed(begin, bytes) && to.id == 0 && flags == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
#else
cudaError_t CUDARTAPI cudaMemAdvise(const void* begin, std::size_t bytes, cudaMemoryAdvise, int) {
  return in_managed(begin, bytes) ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t CUDARTAPI cudaMemPrefetchAsync(const void* begin, std::size_t bytes, int to, cudaStream_t) {
  return in_managed(begin, bytes) && to == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
#endif

}  // extern "C"
