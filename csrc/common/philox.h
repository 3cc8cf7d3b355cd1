// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four 32-bit random numbers as a
// pure function of a 128-bit counter and a 64-bit key. Host and device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYFASTPEFT_HOST_DEVICE __host__ __device__
#else
#define PYFASTPEFT_HOST_DEVICE
#endif

namespace pyfastpeft {

struct Philox4 {
  std::uint32_t v[4];
};

PYFASTPEFT_HOST_DEVICE inline Philox4 philox4x32_10(std::uint64_t counter_low, std::uint64_t counter_high,
                                                    std::uint64_t key) {
  std::uint32_t c0 = std::uint32_t(counter_low), c1 = std::uint32_t(counter_low >> 32);
  std::uint32_t c2 = std::uint32_t(counter_high), c3 = std::uint32_t(counter_high >> 32);
  std::uint32_t k0 = std::uint32_t(key), k1 = std::uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t(0xD2511F53u) * c0, p1 = std::uint64_t(0xCD9E8D57u) * c2;
    c0 = std::uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = std::uint32_t(p1);
    c2 = std::uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = std::uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace pyfastpeft
