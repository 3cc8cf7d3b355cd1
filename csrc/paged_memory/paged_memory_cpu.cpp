#include <algorithm>
#include <cstring>

#include "paged_memory/paged_memory_impl.h"

namespace pyfastpeft {

PagedMemory::Impl::Impl(const PagedMemoryOptions& o)
    : options(o), frame_count(o.resident_bytes / o.page_bytes), frames(frame_count, o.page_bytes), process(getpid()) {
  free_frames.reserve(std::size_t(frame_count));
}

PagedMemory::Impl::~Impl() {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    stop = true;
  }
  work.notify_all();
  for (std::thread& thread : threads) thread.join();
}

void PagedMemory::Impl::check_call(const char* what) const {
  if (getpid() != process)
    throw std::runtime_error(message("paged memory: ", what, " in process ", getpid(), ", but the pages belong to ",
                                     process, ", which was forked; make the optimizer after the fork"));
}

void PagedMemory::Impl::check_page(std::int64_t page) const {
  check(page >= 0 && page < std::int64_t(pages.size()), "paged memory: page ", page, " of ", pages.size());
}

void* PagedMemory::Impl::hold(std::int64_t page) {
  Page& p = at(page);
  ++counts.acquires;
  if (p.holders++ == 0) ++counts.held_pages;
  set_ahead(p, false);
  order.use(page);
  schedule();
  return frames.at(p.frame);
}

void PagedMemory::Impl::wait_for(std::unique_lock<std::mutex>& lock, std::int64_t page) {
  const std::int64_t begin = monotonic_ns();
  const std::int64_t since = transfers;  // those up to here began before this caller asked
  ++counts.waits;
  ++at(page).waiters;
  const auto leave = [&] {
    if (--at(page).waiters == 0) {
      no_longer_wanted(page);
      forget_read_failure(page);
    }
    offer(page);  // no matter where the caller goes on to hold it
    const std::int64_t end = monotonic_ns();
    counts.seconds_waited += double(end - begin) * 1e-9;
    record(PagedMemoryEvent::kWait, -1, page, begin, end);
  };
  try {
    for (;;) {
      const PageFailure* failure = read_failure(page);
      if (failure != nullptr && failure->begun > since) throw SpillError(failure->code, failure->text);
      const Page& p = at(page);
      if (ready(page)) break;
      if (p.state == Page::kAbsent) {
        want(page);
        if (write_failure.begun <= since) retry_failed_writes();
        schedule();
        if (p.state == Page::kResident) break;
        if (p.state == Page::kAbsent && write_failure.begun > since)
          throw SpillError(write_failure.code, write_failure.text);
        if (p.state == Page::kAbsent && moving == 0)
          throw std::runtime_error(message("paged memory: page ", page, " is asked for while all ", frame_count,
                                           " pages of the budget are held; release one, or raise resident_bytes="));
      } else if (p.state == Page::kLoading) {  // read ahead: now somebody waits
        hasten(page);
      }
      changed.wait(lock);
    }
  } catch (...) {
    leave();
    throw;
  }
  leave();
}

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
