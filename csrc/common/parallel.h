// The one way kernels use threads. The pool is torch's: the OpenMP symbols resolve to the libgomp torch has loaded, so
// torch.set_num_threads governs these loops too.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pyfastpeft {

// Threads a parallel region may use here: OpenMP's limit for the calling thread; 1 inside a parallel region and in a
// forked child (libgomp's pool does not survive a fork).
int max_threads();

// While it lives, parallel regions of the calling thread use `threads` at most; 0: as without it.
class ThreadLimit {
 public:
  explicit ThreadLimit(int threads);
  ~ThreadLimit();
  ThreadLimit(const ThreadLimit&) = delete;
  ThreadLimit& operator=(const ThreadLimit&) = delete;

 private:
  int former_ = 0;  // 0: nothing to put back
};

// Calls f(begin, end) on contiguous ranges that cover [0, n), one per thread, each but the last at least `grain` long.
// Exceptions must not leave f. The split depends on the thread count, so f must give every index the same result
// whatever range it lies in.
using RangeFunction = void (*)(void* context, std::int64_t begin, std::int64_t end);
void parallel_for_raw(std::int64_t n, std::int64_t grain, RangeFunction f, void* context);

template <typename F>
void parallel_for(std::int64_t n, std::int64_t grain, F&& f) {
  using Function = typename std::remove_reference<F>::type;
  parallel_for_raw(
      n, grain,
      [](void* context, std::int64_t begin, std::int64_t end) { (*static_cast<Function*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace pyfastpeft
