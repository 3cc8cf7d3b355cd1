// CUDA unified memory that prefers to be on one device: the driver moves it to the host when others need the room there,
// and prefetch() brings it back ahead of its use. Only where host and device may touch it at the same time.
#pragma once

#if defined(PYFASTPEFT_WITH_CUDA)
#include <cstdint>
#include <cstring>

#include "common/cuda_device.h"

namespace pyfastpeft {

class ManagedMemory {
 public:
  static bool available(int device) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, cudaDevAttrConcurrentManagedAccess, device);
    if (error != cudaSuccess) cudaGetLastError();  // no driver, no such device: not available
    return error == cudaSuccess && value != 0;
  }

  // Zeros. Throws std::runtime_error where the driver has no such memory, or the device no room for it now: beyond the
  // free memory every pass over it would move all of it.
  ManagedMemory(std::int64_t bytes, int device) : bytes_(bytes), device_(device) {
    check(bytes > 0, kOp, ": ", bytes, " bytes, expected more than 0");
    check(available(device), kOp, ": device ", device, " has no concurrentManagedAccess");
    const DeviceGuard guard(device, kOp);
    std::size_t free = 0, total = 0;
    check_cuda(cudaMemGetInfo(&free, &total), kOp, "asking for the free memory");
    if (std::size_t(bytes) > free)
      throw std::runtime_error(message(kOp, ": ", bytes, " bytes, and device ", device, " has ", free, " free"));
    check_cuda(cudaMallocManaged(&memory_, std::size_t(bytes), cudaMemAttachGlobal), kOp, "allocating");
    try {
      advise(cudaMemAdviseSetPreferredLocation);
      prefetch(0, bytes, nullptr);
      check_cuda(cudaMemsetAsync(memory_, 0, std::size_t(bytes), nullptr), kOp, "filling with zeros");
      check_cuda(cudaStreamSynchronize(nullptr), kOp, "filling with zeros");
    } catch (...) {
      cudaFree(memory_);
      throw;
    }
  }
  ~ManagedMemory() { cudaFree(memory_); }
  ManagedMemory(const ManagedMemory&) = delete;
  ManagedMemory& operator=(const ManagedMemory&) = delete;

  void* get() const { return memory_; }

  // Begins to bring [offset, offset + bytes) to the device, in the order of `stream`.
  void prefetch(std::int64_t offset, std::int64_t bytes, void* stream) const {
    check(offset >= 0 && bytes >= 0 && offset <= bytes_ - bytes, kOp, ": bytes ", offset, " to ", offset + bytes,
          " of ", bytes_);
    const DeviceGuard guard(device_, kOp);
    const char* begin = static_cast<char*>(memory_) + offset;
    const auto on = static_cast<cudaStream_t>(stream);
#if CUDART_VERSION >= 13000
    check_cuda(cudaMemPrefetchAsync(begin, std::size_t(bytes), here(), 0, on), kOp, "prefetching");
#else
    check_cuda(cudaMemPrefetchAsync(begin, std::size_t(bytes), device_, on), kOp, "prefetching");
#endif
  }

 private:
  static constexpr const char* kOp = "unified memory";

  void advise(cudaMemoryAdvise advice) const {
#if CUDART_VERSION >= 13000
    check_cuda(cudaMemAdvise(memory_, std::size_t(bytes_), advice, here()), kOp, "advising");
#else
    check_cuda(cudaMemAdvise(memory_, std::size_t(bytes_), advice, device_), kOp, "advising");
#endif
  }
#if CUDART_VERSION >= 13000
  cudaMemLocation here() const {
    cudaMemLocation location{};
    location.type = cudaMemLocationTypeDevice;
    location.id = device_;
    return location;
  }
#endif

  std::int64_t bytes_;
  int device_;
  void* memory_ = nullptr;
};

}  // namespace pyfastpeft
#endif
