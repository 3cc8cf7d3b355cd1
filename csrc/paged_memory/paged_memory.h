// Memory in fixed-size pages of which only as many as a budget allows are in RAM; the others are in a spill file.
//
//   acquire(page)  waits until the page is in memory and holds it there; its address stands until release(page, dirty)
//
// A new page reads as zeros. Which pages stay is decided by PageOrder. Threads of its own read pages ahead of their use
// and write changed ones back before their place is needed; unchanged ones are never written. Knows nothing of what the
// pages hold. Any thread may call; a forked child may not (it gets an error), but may destroy.
//
// When writing a page back fails, its content stays in memory, and the next acquire that needs the place tries again;
// when reading fails, the page stays on the disk. An acquire throws what befell the transfers that began after it asked;
// an earlier one that failed is made again for it first, so that no error outlives its cause. None loses any content.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "paged_memory/spill_file.h"

namespace pyfastpeft {

struct PagedMemoryOptions {
  std::int64_t page_bytes;      // a multiple of SpillFile::kAlignment
  std::int64_t resident_bytes;  // the budget: whole pages, PagedMemory::kFewestFrames at least
  std::string spill_folder;     // no file is made there before the budget is exceeded
  std::int64_t look_ahead;      // pages read before they are asked for, at most
  int io_threads;
  bool direct_io;
};

struct PagedMemoryStats {
  std::int64_t pages, frames, page_bytes, resident_pages, dirty_pages, held_pages;
  std::int64_t pages_in, pages_out;  // read from and written to the spill file
  std::int64_t acquires, waits;      // of them waited: not in memory, or being written
  std::int64_t peak_resident_pages;
  double seconds_waited;                    // by callers
  double seconds_reading, seconds_writing;  // by the threads, together
  std::int64_t spill_file_bytes;
  bool direct_io;
};

struct PagedMemoryEvent {
  enum Kind : std::int32_t { kRead, kWrite, kWait } kind;
  std::int32_t thread;  // number of the I/O thread; -1: the caller's
  std::int64_t page;
  std::int64_t begin_ns, end_ns;  // of the monotonic clock
};

class PagedMemory {
 public:
  static constexpr std::int64_t kFewestFrames = 2;

  explicit PagedMemory(const PagedMemoryOptions& options);
  ~PagedMemory();
  PagedMemory(const PagedMemory&) = delete;
  PagedMemory& operator=(const PagedMemory&) = delete;

  // `count` more pages; returns the first one's number. Takes the disk's space for them where they exceed the budget:
  // throws SpillError, and nothing has changed, where there is none.
  std::int64_t add_pages(std::int64_t count);

  // The pages in the order they will be used, over and over; empty: not known.
  void set_order(std::vector<std::int64_t> order);

  // Held pages may be held again, by other threads too. Throws std::runtime_error where all of the budget is held.
  void* acquire(std::int64_t page);
  void* try_acquire(std::int64_t page);  // null where acquire would wait
  void release(std::int64_t page, bool dirty);

  // The page's content is no longer needed: it reads as zeros again, and its place is free without a write.
  void discard(std::int64_t page);

  // Begins to read what the order says comes first, before anybody asks.
  void prefetch();

  // Where the budget's pages lie, one after the other; those that were never used are at the end.
  void* frames() const;

  std::vector<bool> resident() const;  // by page
  PagedMemoryStats stats() const;

  void record_events(bool on);  // on: forgets those recorded so far
  std::vector<PagedMemoryEvent> events() const;

 private:
  struct Impl;
  Impl* impl_;
};

}  // namespace pyfastpeft
