// What PagedMemory knows of its pages. page_moves_cpu.cpp decides and makes their moves, paged_memory_cpu.cpp serves callers.
#pragma once

#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/check.h"
#include "paged_memory/page_frames.h"
#include "paged_memory/page_order.h"
#include "paged_memory/paged_memory.h"

namespace pyfastpeft {

std::int64_t monotonic_ns();

struct Page {
  enum State : std::uint8_t { kAbsent, kLoading, kResident } state = kAbsent;
  bool stored = false;      // the spill file has content for it; otherwise an absent page is zeros
  bool dirty = false;       // differs from what the spill file has
  bool writing = false;     // resident, and a thread is writing it back
  bool goes_after = false;  // when written, to make room
  bool write_failed = false;
  bool ahead = false;   // read ahead, and not asked for yet
  bool wanted = false;  // an acquire waits for it
  std::int32_t holders = 0, waiters = 0;
  std::int64_t frame = -1;
};

struct PageJob {
  std::int64_t page;
  bool write;
};

// Of a thread, for the acquire that asked. A transfer that began before a caller asked is not that caller's: what made it
// fail may be over, and it is tried again on the caller's behalf. So each failure says when its transfer began.
struct PageFailure {
  int code = 0;
  std::string text;
  std::int64_t begun = 0;  // number of the transfer
};

struct PagedMemory::Impl {
  explicit Impl(const PagedMemoryOptions& options);
  ~Impl();

  const PagedMemoryOptions options;
  const std::int64_t frame_count;
  PageFrames frames;
  const pid_t process;

  mutable std::mutex mutex;
  std::condition_variable work;     // for the threads: a job, or stop
  std::condition_variable changed;  // for callers: a page arrived, was written, or failed
  std::vector<std::thread> threads;
  bool stop = false;

  std::vector<Page> pages;
  PageOrder order;
  std::unique_ptr<SpillFile> file;
  std::vector<std::int64_t> free_frames;
  std::int64_t fresh_frames = 0;  // frames from this one on were never used: zeros
  std::deque<PageJob> jobs;
  std::int64_t transfers = 0;  // begun so far
  std::int64_t moving = 0;     // jobs queued or under way
  std::int64_t cleaning = 0;   // of them writes whose frame will be free
  std::int64_t ahead = 0;      // pages marked so
  std::vector<std::int64_t> wanted;
  std::vector<std::int64_t> failed;  // pages with write_failed
  PageFailure write_failure;         // of the failed writes, the one that began last
  std::vector<std::pair<std::int64_t, PageFailure>> read_failures;
  PagedMemoryStats counts{};
  bool recording = false;
  std::vector<PagedMemoryEvent> recorded;
  static constexpr std::size_t kMostEvents = 1 << 20;

  Page& at(std::int64_t page) { return pages[std::size_t(page)]; }
  bool ready(std::int64_t page) { return at(page).state == Page::kResident && !at(page).writing; }
  void record(PagedMemoryEvent::Kind kind, int thread, std::int64_t page, std::int64_t begin, std::int64_t end) {
    if (recording && recorded.size() < kMostEvents) recorded.push_back({kind, thread, page, begin, end});
  }

  // ---- for callers: paged_memory_cpu.cpp ---------------------------------------------------------------------------

  void check_call(const char* what) const;
  void check_page(std::int64_t page) const;
  void* hold(std::int64_t page);
  void wait_for(std::unique_lock<std::mutex>& lock, std::int64_t page);

  // ---- moves: page_moves_cpu.cpp; all but run() with the mutex held ------------------------------------------------

  enum class Room { kFound, kComing, kNone };

  void run(int number);  // what I/O thread `number` does
  void enqueue(std::int64_t page, bool write, bool urgent);
  void hasten(std::int64_t page);  // a queued read that somebody waits for now
  void offer(std::int64_t page);   // one that somebody holds, waits for, or could not be written stays
  void set_ahead(Page& p, bool value);
  void arrive(std::int64_t page);
  void load_into(std::int64_t page, std::int64_t frame, bool fresh, bool urgent);
  void evict(std::int64_t page);
  // A frame for `page`: taken at once, or on its way from the disk.
  Room make_room(std::int64_t page, bool urgent, std::int64_t& coming);
  void schedule();
  void want(std::int64_t page);
  void no_longer_wanted(std::int64_t page);
  void finish_read(std::int64_t page, const PageFailure& failure);
  void finish_write(std::int64_t page, const PageFailure& failure);
  void retry_failed_writes();
  const PageFailure* read_failure(std::int64_t page) const;  // null: none
  void forget_read_failure(std::int64_t page);
};

}  // namespace pyfastpeft
