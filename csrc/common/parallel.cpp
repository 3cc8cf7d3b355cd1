#include "common/parallel.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>

namespace pyfastpeft {
namespace {

bool g_forked_child = false;
const int g_fork_hook = pthread_atfork(nullptr, nullptr, [] { g_forked_child = true; });

}  // namespace

int max_threads() {
  (void)g_fork_hook;
  return g_forked_child || omp_in_parallel() ? 1 : omp_get_max_threads();
}

ThreadLimit::ThreadLimit(int threads) {
  if (threads <= 0 || threads >= omp_get_max_threads()) return;
  former_ = omp_get_max_threads();
  omp_set_num_threads(threads);  // of this thread alone
}

ThreadLimit::~ThreadLimit() {
  if (former_ > 0) omp_set_num_threads(former_);
}

void parallel_for_raw(std::int64_t n, std::int64_t grain, RangeFunction f, void* context) {
  if (n <= 0) return;
  grain = std::max<std::int64_t>(grain, 1);
  const std::int64_t threads = std::min<std::int64_t>(max_threads(), std::max<std::int64_t>(n / grain, 1));
  if (threads == 1) return f(context, 0, n);
  const std::int64_t chunk = (n + threads - 1) / threads;
#pragma omp parallel num_threads(int(threads))
  {
    const std::int64_t begin = std::min(n, chunk * omp_get_thread_num());
    const std::int64_t end = std::min(n, begin + chunk);
    if (begin < end) f(context, begin, end);
  }
}

}  // namespace pyfastpeft
