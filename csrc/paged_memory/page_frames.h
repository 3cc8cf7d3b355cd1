// Where the pages of a budget lie in memory.
#pragma once

#include <sys/mman.h>

#include <cstdint>

#include "common/check.h"

namespace pyfastpeft {

// Address space for the whole budget, of which the system provides what is touched.
class PageFrames {
 public:
  PageFrames(std::int64_t count, std::int64_t page_bytes)
      : page_bytes_(page_bytes), bytes_(std::size_t(count * page_bytes)) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#if defined(MAP_NORESERVE)
    flags |= MAP_NORESERVE;
#endif
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory_ == MAP_FAILED)
      throw std::runtime_error(message("paged memory: the system has no ", bytes_,
                                       " bytes of address space for "
                                       "resident pages; choose a smaller resident_bytes="));
#if defined(MADV_HUGEPAGE)
    madvise(memory_, bytes_, MADV_HUGEPAGE);
#endif
#if defined(MADV_DONTFORK)
    madvise(memory_, bytes_, MADV_DONTFORK);  // a fork during a transfer would leave its data in the child's copy
#endif
  }
  ~PageFrames() { munmap(memory_, bytes_); }
  char* at(std::int64_t frame) const { return static_cast<char*>(memory_) + frame * page_bytes_; }

 private:
  std::int64_t page_bytes_;
  std::size_t bytes_;
  void* memory_;
};

}  // namespace pyfastpeft
