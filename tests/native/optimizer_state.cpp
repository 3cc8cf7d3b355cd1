// Paged memory's policy, its threads under a failing disk, and the steps of Lion and SGD: a program for valgrind and the sanitizers
// (build_support/check_memory.sh). Its argument is a folder for the spill file.
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "momentum/momentum.h"
#include "paged_memory/page_order.h"
#include "paged_memory/paged_memory.h"

namespace pyfastpeft {

// In place of parallel.cpp's, as in cpu_kernels.cpp: ThreadSanitizer does not see what libgomp's barriers order.
int max_threads() { return 2; }
void parallel_for_raw(std::int64_t n, std::int64_t, RangeFunction f, void* context) {
  std::thread half([=] { f(context, 0, n / 2); });
  f(context, n / 2, n);
  half.join();
}

namespace {

int g_failures = 0;
void expect(bool ok, const char* what) {
  if (ok) return;
  ++g_failures;
  std::printf("FAILED: %s\n", what);
}

// Each of four threads owns pages, and finds in them what it wrote while all push each other's out and transfers fail.
void paged_memory(const char* folder, bool faulty) {
  constexpr std::int64_t kPage = 4096, kPages = 24;
  PagedMemory memory({kPage, 7 * kPage, folder, 2, 3, true});
  memory.add_pages(kPages);
  std::vector<std::int64_t> order;
  for (std::int64_t page = 0; page < kPages; ++page) order.push_back(page);
  memory.set_order(order);
  const auto work = [&](int number) {
    std::mt19937 random(unsigned(number) + 1);
    unsigned char written[kPages] = {};
    for (int step = 0; step < 400; ++step) {
      const std::int64_t page = number + 4 * std::int64_t(random() % (kPages / 4));
      if (faulty && step % 50 == 0) inject_spill_fault(step % 100 == 0 ? "read" : "write", EIO, 0, 2, 0.0001);
      unsigned char* data = nullptr;
      for (int attempt = 0; data == nullptr && attempt < 100; ++attempt) {
        try {
          data = static_cast<unsigned char*>(memory.acquire(page));
        } catch (const SpillError&) {
        }
      }
      expect(data != nullptr, "a page after a hundred attempts");
      if (data == nullptr) return;
      expect(data[0] == written[page] && data[kPage - 1] == written[page], "a page holds what was written");
      const bool write = random() % 2 == 0;
      if (write) std::memset(data, written[page] = static_cast<unsigned char>(random()), std::size_t(kPage));
      memory.release(page, write);
      if (step % 97 == 0) {
        memory.discard(page);
        written[page] = 0;
      }
      if (step % 31 == 0) memory.prefetch();
      expect(memory.stats().peak_resident_pages <= 7, "the budget holds");
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
  clear_spill_faults();
}

// On a known cycle of 40 pages in room for 20, the best there is: 20 misses a cycle; least recently used would miss 40 times.
void page_order() {
  constexpr std::int64_t kPages = 40, kRoom = 20, kCycles = 10;
  PageOrder order;
  order.resize(kPages);
  std::vector<std::int64_t> cycle;
  for (std::int64_t page = 0; page < kPages; ++page) cycle.push_back(page);
  order.set(cycle);
  std::vector<bool> here(kPages);
  std::int64_t resident = 0, misses = 0;
  for (std::int64_t use = 0; use < (kCycles + 2) * kPages; ++use) {
    const std::int64_t page = use % kPages;
    if (!here[std::size_t(page)]) {
      misses += use >= 2 * kPages;
      if (resident == kRoom) {
        const std::int64_t victim = order.victim();
        order.withdraw(victim);
        here[std::size_t(victim)] = false;
        --resident;
      }
      here[std::size_t(page)] = true;
      ++resident;
    }
    order.use(page);
    order.offer(page);
  }
  expect(misses == kCycles * (kPages - kRoom), "a known cycle misses what does not fit, and no more");
}

// n values that end where their allocation ends.
struct Values {
  explicit Values(std::int64_t n, std::int64_t size) : bytes(new char[std::size_t(n * size)]) {
    for (std::int64_t i = 0; i < n * size; ++i) bytes[std::size_t(i)] = char(i * 7 % 61);  // small numbers in any dtype
  }
  std::unique_ptr<char[]> bytes;
};

void momentum(CpuIsa isa) {
  force_cpu_isa(cpu_isa_name(isa));
  for (const MomentumRule rule : {MomentumRule::kLion, MomentumRule::kSgd})
    for (const DType param : {DType::f32, DType::f16, DType::bf16})
      for (const DType grad : {param, DType::f32}) {
        std::vector<Values> kept;
        std::vector<MomentumTensor> tensors;
        for (const std::int64_t n : {0, 1, 15, 17, 255, 256, 257, 1000}) {
          const auto make = [&](std::int64_t count, DType dtype) {
            kept.emplace_back(count, dtype == DType::f32 ? 4 : 2);
            return kept.back().bytes.get();
          };
          tensors.push_back({make(n, param), make(n, grad), reinterpret_cast<float*>(make(n, DType::f32)),
                             reinterpret_cast<float*>(make(1, DType::f32)), n, param, grad});
          *tensors.back().step = 0;
        }
        for (int step = 1; step < 4; ++step)
          momentum_cpu(tensors.data(), std::int64_t(tensors.size()), {rule, 0.1, 0.01, 0.9, 0.5, step == 2, step == 3});
        for (const MomentumTensor& t : tensors) expect(*t.step == 3, "three steps were counted");
      }
}

}  // namespace
}  // namespace pyfastpeft

int main(int count, char** arguments) {
  using namespace pyfastpeft;
  page_order();
  for (const bool faulty : {false, true}) paged_memory(count > 1 ? arguments[1] : "/var/tmp", faulty);
  for (const CpuIsa isa : {CpuIsa::scalar, CpuIsa::avx2, CpuIsa::avx512})
    if (isa <= detected_cpu_isa()) momentum(isa);
  std::printf("paged memory, Lion and SGD: %s\n", g_failures == 0 ? "as expected" : "FAILED");
  return g_failures != 0;
}
