#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>
#include <thread>

#include "common/check.h"
#include "paged_memory/page_order.h"
#include "paged_memory/paged_memory.h"

namespace pyfastpeft {
namespace {

std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

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

struct Job {
  std::int64_t page;
  bool write;
};

struct Failure {  // of a thread, for the acquire that asked
  int code = 0;
  std::string text;
};

// The frames: address space for the whole budget, of which the system provides what is touched.
class Frames {
 public:
  Frames(std::int64_t count, std::int64_t page_bytes)
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
  ~Frames() { munmap(memory_, bytes_); }
  char* at(std::int64_t frame) const { return static_cast<char*>(memory_) + frame * page_bytes_; }

 private:
  std::int64_t page_bytes_;
  std::size_t bytes_;
  void* memory_;
};

}  // namespace

struct PagedMemory::Impl {
  explicit Impl(const PagedMemoryOptions& o)
      : options(o), frame_count(o.resident_bytes / o.page_bytes), frames(frame_count, o.page_bytes), process(getpid()) {
    free_frames.reserve(std::size_t(frame_count));
  }

  ~Impl() {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      stop = true;
    }
    work.notify_all();
    for (std::thread& thread : threads) thread.join();
  }

  const PagedMemoryOptions options;
  const std::int64_t frame_count;
  Frames frames;
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
  std::deque<Job> jobs;
  std::int64_t moving = 0;    // jobs queued or under way
  std::int64_t cleaning = 0;  // of them writes whose frame will be free
  std::int64_t ahead = 0;     // pages marked so
  std::vector<std::int64_t> wanted;
  std::vector<std::int64_t> failed;  // pages with write_failed
  Failure write_failure;
  std::int64_t write_failures = 0;
  std::vector<std::pair<std::int64_t, Failure>> read_failures;
  PagedMemoryStats counts{};
  bool recording = false;
  std::vector<PagedMemoryEvent> recorded;
  static constexpr std::size_t kMostEvents = 1 << 20;

  Page& at(std::int64_t page) { return pages[std::size_t(page)]; }

  void check_call(const char* what) const {
    if (getpid() != process)
      throw std::runtime_error(message("paged memory: ", what, " in process ", getpid(), ", but the pages belong to ",
                                       process, ", which was forked; make the optimizer after the fork"));
  }
  void check_page(std::int64_t page) const {
    check(page >= 0 && page < std::int64_t(pages.size()), "paged memory: page ", page, " of ", pages.size());
  }

  void record(PagedMemoryEvent::Kind kind, int thread, std::int64_t page, std::int64_t begin, std::int64_t end) {
    if (recording && recorded.size() < kMostEvents) recorded.push_back({kind, thread, page, begin, end});
  }

  // ---- all below with the mutex held -------------------------------------------------------------------------------

  void enqueue(std::int64_t page, bool write, bool urgent) {
    if (urgent)
      jobs.push_front({page, write});
    else
      jobs.push_back({page, write});
    ++moving;
    work.notify_one();
  }

  void offer(std::int64_t page) {  // one that somebody holds, waits for, or could not be written stays
    const Page& p = at(page);
    if (p.state == Page::kResident && !p.writing && !p.write_failed && p.holders + p.waiters == 0) order.offer(page);
  }

  void set_ahead(Page& p, bool value) {
    ahead += int(value) - int(p.ahead);
    p.ahead = value;
  }

  void arrive(std::int64_t page) {
    Page& p = at(page);
    p.state = Page::kResident;
    offer(page);
    counts.peak_resident_pages = std::max(counts.peak_resident_pages, ++counts.resident_pages);
  }

  void load_into(std::int64_t page, std::int64_t frame, bool fresh, bool urgent) {
    Page& p = at(page);
    p.frame = frame;
    order.set_absent(page, false);
    if (p.stored || (!fresh && !threads.empty())) {
      p.state = Page::kLoading;
      enqueue(page, false, urgent);
      return;
    }
    if (!fresh) std::memset(frames.at(frame), 0, std::size_t(options.page_bytes));
    arrive(page);
    changed.notify_all();
  }

  void evict(std::int64_t page) {
    Page& p = at(page);
    order.withdraw(page);
    free_frames.push_back(p.frame);
    p.frame = -1;
    p.state = Page::kAbsent;
    set_ahead(p, false);
    --counts.resident_pages;
    order.set_absent(page, true);
  }

  enum class Room { kFound, kComing, kNone };

  // A frame for `page`: taken at once, or on its way from the disk.
  Room make_room(std::int64_t page, bool urgent, std::int64_t& coming) {
    for (;;) {
      if (!free_frames.empty()) {
        const std::int64_t frame = free_frames.back();
        free_frames.pop_back();
        load_into(page, frame, false, urgent);
        return Room::kFound;
      }
      if (fresh_frames < frame_count) {
        load_into(page, fresh_frames++, true, urgent);
        return Room::kFound;
      }
      if (coming > 0) {
        --coming;
        return Room::kComing;
      }
      const std::int64_t victim = order.victim();
      if (victim < 0) return Room::kNone;
      if (!urgent && order.distance(victim) <= order.distance(page)) return Room::kNone;
      Page& v = at(victim);
      if (v.dirty) {
        order.withdraw(victim);
        v.writing = v.goes_after = true;
        ++cleaning;
        enqueue(victim, true, urgent);
        return Room::kComing;
      }
      evict(victim);
    }
  }

  void schedule() {
    std::int64_t coming = cleaning;
    for (const std::int64_t page : wanted)
      if (at(page).state == Page::kAbsent) make_room(page, true, coming);
    std::int64_t expected = 0;
    order.each_absent([&](std::int64_t page) {
      if (ahead + expected >= options.look_ahead) return false;
      Page& p = at(page);
      if (p.wanted) return true;
      const Room room = make_room(page, false, coming);
      if (room == Room::kFound) set_ahead(p, true);
      if (room == Room::kComing) ++expected;
      return room != Room::kNone;
    });
  }

  void no_longer_wanted(std::int64_t page) {
    if (!at(page).wanted) return;
    at(page).wanted = false;
    wanted.erase(std::find(wanted.begin(), wanted.end(), page));
  }

  void finish_read(std::int64_t page, const Failure& failure) {
    Page& p = at(page);
    if (failure.code == 0) {
      arrive(page);
      return;
    }
    free_frames.push_back(p.frame);
    p.frame = -1;
    p.state = Page::kAbsent;
    if (p.waiters > 0) read_failures.push_back({page, failure});
    no_longer_wanted(page);  // those who wait throw it, and it is not read again at once
    // One that was only read ahead is not tried again before somebody asks for it: it stays out of the absent ones.
    set_ahead(p, false);
  }

  void finish_write(std::int64_t page, const Failure& failure) {
    Page& p = at(page);
    p.writing = false;
    const bool goes = p.goes_after;
    if (goes) --cleaning;
    p.goes_after = false;
    if (failure.code != 0) {
      p.write_failed = true;
      failed.push_back(page);
      write_failure = failure;
      ++write_failures;
      return;  // the page keeps its place and is no candidate to go until a caller tries again
    }
    p.stored = true;
    p.dirty = false;
    --counts.dirty_pages;
    if (goes && p.waiters == 0)
      evict(page);
    else
      offer(page);
  }

  void run(int number) {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      work.wait(lock, [&] { return stop || !jobs.empty(); });
      if (stop) return;
      const Job job = jobs.front();
      jobs.pop_front();
      const Page& p = at(job.page);
      char* data = frames.at(p.frame);
      const bool stored = p.stored;
      lock.unlock();
      Failure failure;
      const std::int64_t begin = now_ns(), offset = job.page * options.page_bytes;
      try {
        if (job.write)
          file->write(data, options.page_bytes, offset);
        else if (stored)
          file->read(data, options.page_bytes, offset);
        else
          std::memset(data, 0, std::size_t(options.page_bytes));
      } catch (const SpillError& error) {
        failure = {error.code, error.what()};
      }
      const std::int64_t end = now_ns();
      lock.lock();
      --moving;
      if (job.write) {
        counts.seconds_writing += double(end - begin) * 1e-9;
        counts.pages_out += failure.code == 0;
        record(PagedMemoryEvent::kWrite, number, job.page, begin, end);
        finish_write(job.page, failure);
      } else {
        if (stored) {
          counts.seconds_reading += double(end - begin) * 1e-9;
          counts.pages_in += failure.code == 0;
          record(PagedMemoryEvent::kRead, number, job.page, begin, end);
        }
        finish_read(job.page, failure);
      }
      schedule();
      changed.notify_all();
    }
  }

  bool ready(std::int64_t page) { return at(page).state == Page::kResident && !at(page).writing; }

  void* hold(std::int64_t page) {
    Page& p = at(page);
    ++counts.acquires;
    if (p.holders++ == 0) ++counts.held_pages;
    set_ahead(p, false);
    order.use(page);
    schedule();
    return frames.at(p.frame);
  }

  // Throws what a thread met when it read `page` for this caller.
  void throw_read_failure(std::int64_t page) {
    for (std::size_t i = 0; i < read_failures.size(); ++i) {
      if (read_failures[i].first != page) continue;
      const Failure failure = read_failures[i].second;
      if (at(page).waiters == 1) {  // the last who waits takes it away
        read_failures.erase(read_failures.begin() + std::ptrdiff_t(i));
        order.set_absent(page, true);
      }
      throw SpillError(failure.code, failure.text);
    }
  }

  void retry_failed_writes() {
    for (const std::int64_t page : failed) {
      at(page).write_failed = false;
      offer(page);
    }
    failed.clear();
  }

  void wait_for(std::unique_lock<std::mutex>& lock, std::int64_t page) {
    const std::int64_t begin = now_ns(), failures = write_failures;
    ++counts.waits;
    ++at(page).waiters;
    const auto leave = [&] {
      Page& p = at(page);
      --p.waiters;
      if (p.waiters == 0) no_longer_wanted(page);
      offer(page);  // no matter where the caller goes on to hold it
      const std::int64_t end = now_ns();
      counts.seconds_waited += double(end - begin) * 1e-9;
      record(PagedMemoryEvent::kWait, -1, page, begin, end);
    };
    try {
      retry_failed_writes();
      for (;;) {
        Page& p = at(page);
        throw_read_failure(page);
        if (ready(page)) break;
        if (p.state == Page::kAbsent) {
          if (!p.wanted) {
            p.wanted = true;
            wanted.push_back(page);
          }
          schedule();
          if (p.state == Page::kResident) break;
          if (p.state == Page::kAbsent && write_failures != failures)
            throw SpillError(write_failure.code, write_failure.text);
          if (p.state == Page::kAbsent && moving == 0)
            throw std::runtime_error(message("paged memory: page ", page, " is asked for while all ", frame_count,
                                             " pages of the budget are held; release one, or raise resident_bytes="));
        } else if (p.state == Page::kLoading) {  // read ahead: now somebody waits
          const auto job = std::find_if(jobs.begin(), jobs.end(), [&](const Job& j) { return j.page == page; });
          if (job != jobs.end() && job != jobs.begin()) {
            jobs.erase(job);
            jobs.push_front({page, false});
          }
        }
        changed.wait(lock);
      }
    } catch (...) {
      leave();
      throw;
    }
    leave();
  }
};

PagedMemory::PagedMemory(const PagedMemoryOptions& o) {
  check(o.page_bytes > 0 && o.page_bytes % SpillFile::kAlignment == 0, "paged memory: page_bytes is ", o.page_bytes,
        ", expected a multiple of ", SpillFile::kAlignment);
  check(o.resident_bytes / o.page_bytes >= kFewestFrames, "paged memory: resident_bytes is ", o.resident_bytes,
        ", expected ", kFewestFrames, " pages of ", o.page_bytes, " bytes at least");
  check(o.look_ahead >= 0 && o.io_threads > 0, "paged memory: look_ahead is ", o.look_ahead, " and io_threads ",
        o.io_threads, ", expected 0 and 1 at least");
  impl_ = new Impl(o);
}

PagedMemory::~PagedMemory() {
  // In a forked child there are no threads to join, and what they held at the fork stays held: all of it is left alone.
  // The frames are not in its address space, the file is closed when it ends.
  if (getpid() == impl_->process) delete impl_;
}

std::int64_t PagedMemory::add_pages(std::int64_t count) {
  impl_->check_call("add_pages");
  check(count >= 0, "paged memory: add_pages of ", count);
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  const std::int64_t first = std::int64_t(impl_->pages.size()), total = first + count;
  if (total > impl_->frame_count) {
    if (!impl_->file) impl_->file = std::make_unique<SpillFile>(impl_->options.spill_folder, impl_->options.direct_io);
    impl_->file->grow(total * impl_->options.page_bytes);
    while (int(impl_->threads.size()) < impl_->options.io_threads)
      impl_->threads.emplace_back([impl = impl_, number = int(impl_->threads.size())] { impl->run(number); });
  }
  impl_->pages.resize(std::size_t(total));
  impl_->order.resize(total);
  return first;
}

void PagedMemory::set_order(std::vector<std::int64_t> order) {
  impl_->check_call("set_order");
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->order.set(std::move(order));
  for (Page& p : impl_->pages) p.ahead = false;
  impl_->ahead = 0;
}

void PagedMemory::prefetch() {
  impl_->check_call("prefetch");
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->schedule();
}

void* PagedMemory::acquire(std::int64_t page) {
  impl_->check_call("acquire");
  std::unique_lock<std::mutex> lock(impl_->mutex);
  impl_->check_page(page);
  if (!impl_->ready(page)) impl_->wait_for(lock, page);
  return impl_->hold(page);
}

void* PagedMemory::try_acquire(std::int64_t page) {
  impl_->check_call("try_acquire");
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->check_page(page);
  return impl_->ready(page) ? impl_->hold(page) : nullptr;
}

void PagedMemory::release(std::int64_t page, bool dirty) {
  impl_->check_call("release");
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->check_page(page);
  Page& p = impl_->at(page);
  check(p.holders > 0, "paged memory: page ", page, " is released and nobody holds it");
  if (dirty && !p.dirty) ++impl_->counts.dirty_pages;
  p.dirty |= dirty;
  if (--p.holders > 0) return;
  --impl_->counts.held_pages;
  impl_->offer(page);
  impl_->schedule();
  impl_->changed.notify_all();
}

void PagedMemory::discard(std::int64_t page) {
  impl_->check_call("discard");
  std::unique_lock<std::mutex> lock(impl_->mutex);
  impl_->check_page(page);
  impl_->changed.wait(lock, [&] { return impl_->at(page).state != Page::kLoading && !impl_->at(page).writing; });
  Page& p = impl_->at(page);
  check(p.holders == 0, "paged memory: page ", page, " is discarded while it is held");
  if (p.state == Page::kResident) {
    if (p.dirty) --impl_->counts.dirty_pages;
    p.dirty = false;
    impl_->evict(page);
  }
  if (p.write_failed) {
    p.write_failed = false;
    impl_->failed.erase(std::find(impl_->failed.begin(), impl_->failed.end(), page));
  }
  p.stored = false;
  impl_->changed.notify_all();
}

void* PagedMemory::frames() const { return impl_->frames.at(0); }

std::vector<bool> PagedMemory::resident() const {
  impl_->check_call("resident");
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  std::vector<bool> result;
  result.reserve(impl_->pages.size());
  for (const Page& p : impl_->pages) result.push_back(p.state == Page::kResident);
  return result;
}

PagedMemoryStats PagedMemory::stats() const {
  impl_->check_call("stats");
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  PagedMemoryStats s = impl_->counts;
  s.pages = std::int64_t(impl_->pages.size());
  s.frames = impl_->frame_count;
  s.page_bytes = impl_->options.page_bytes;
  s.spill_file_bytes = impl_->file ? impl_->file->size() : 0;
  s.direct_io = impl_->file && impl_->file->direct();
  return s;
}

void PagedMemory::record_events(bool on) {
  impl_->check_call("record_events");
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  if (on) impl_->recorded.clear();
  impl_->recording = on;
}

std::vector<PagedMemoryEvent> PagedMemory::events() const {
  impl_->check_call("events");
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  return impl_->recorded;
}

}  // namespace pyfastpeft
