// The moves of PagedMemory's pages: which are read and written next, by threads of its own.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "paged_memory/paged_memory_impl.h"

namespace pyfastpeft {

std::int64_t monotonic_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void PagedMemory::Impl::enqueue(std::int64_t page, bool write, bool urgent) {
  if (urgent)
    jobs.push_front({page, write});
  else
    jobs.push_back({page, write});
  ++moving;
  work.notify_one();
}

void PagedMemory::Impl::hasten(std::int64_t page) {
  const auto job = std::find_if(jobs.begin(), jobs.end(), [&](const PageJob& j) { return j.page == page; });
  if (job == jobs.end() || job == jobs.begin()) return;
  jobs.erase(job);
  jobs.push_front({page, false});
}

void PagedMemory::Impl::offer(std::int64_t page) {
  const Page& p = at(page);
  if (p.state == Page::kResident && !p.writing && !p.write_failed && p.holders + p.waiters == 0) order.offer(page);
}

void PagedMemory::Impl::set_ahead(Page& p, bool value) {
  ahead += int(value) - int(p.ahead);
  p.ahead = value;
}

void PagedMemory::Impl::arrive(std::int64_t page) {
  Page& p = at(page);
  p.state = Page::kResident;
  offer(page);
  counts.peak_resident_pages = std::max(counts.peak_resident_pages, ++counts.resident_pages);
}

void PagedMemory::Impl::load_into(std::int64_t page, std::int64_t frame, bool fresh, bool urgent) {
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

void PagedMemory::Impl::evict(std::int64_t page) {
  Page& p = at(page);
  order.withdraw(page);
  free_frames.push_back(p.frame);
  p.frame = -1;
  p.state = Page::kAbsent;
  set_ahead(p, false);
  --counts.resident_pages;
  order.set_absent(page, true);
}

PagedMemory::Impl::Room PagedMemory::Impl::make_room(std::int64_t page, bool urgent, std::int64_t& coming) {
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

void PagedMemory::Impl::schedule() {
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

void PagedMemory::Impl::want(std::int64_t page) {
  if (at(page).wanted) return;
  at(page).wanted = true;
  wanted.push_back(page);
}

void PagedMemory::Impl::no_longer_wanted(std::int64_t page) {
  if (!at(page).wanted) return;
  at(page).wanted = false;
  wanted.erase(std::find(wanted.begin(), wanted.end(), page));
}

void PagedMemory::Impl::finish_read(std::int64_t page, const PageFailure& failure) {
  Page& p = at(page);
  if (failure.code == 0) {
    arrive(page);
    return;
  }
  free_frames.push_back(p.frame);
  p.frame = -1;
  p.state = Page::kAbsent;
  if (p.waiters > 0) {
    const auto known =
        std::find_if(read_failures.begin(), read_failures.end(), [&](const auto& f) { return f.first == page; });
    if (known == read_failures.end())
      read_failures.push_back({page, failure});
    else
      known->second = failure;
  }
  no_longer_wanted(page);  // those who wait throw it or want it again
  // One that was only read ahead is not tried again before somebody asks for it: it stays out of the absent ones.
  set_ahead(p, false);
}

void PagedMemory::Impl::finish_write(std::int64_t page, const PageFailure& failure) {
  Page& p = at(page);
  p.writing = false;
  const bool goes = p.goes_after;
  if (goes) --cleaning;
  p.goes_after = false;
  if (failure.code != 0) {
    p.write_failed = true;
    failed.push_back(page);
    if (failure.begun > write_failure.begun) write_failure = failure;
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

void PagedMemory::Impl::retry_failed_writes() {
  for (const std::int64_t page : failed) {
    at(page).write_failed = false;
    offer(page);
  }
  failed.clear();
}

const PageFailure* PagedMemory::Impl::read_failure(std::int64_t page) const {
  for (const auto& [failed_page, failure] : read_failures)
    if (failed_page == page) return &failure;
  return nullptr;
}

void PagedMemory::Impl::forget_read_failure(std::int64_t page) {
  for (std::size_t i = 0; i < read_failures.size(); ++i) {
    if (read_failures[i].first != page) continue;
    read_failures.erase(read_failures.begin() + std::ptrdiff_t(i));
    if (at(page).state == Page::kAbsent) order.set_absent(page, true);  // it may be read ahead again
    return;
  }
}

void PagedMemory::Impl::run(int number) {
  std::unique_lock<std::mutex> lock(mutex);
  for (;;) {
    work.wait(lock, [&] { return stop || !jobs.empty(); });
    if (stop) return;
    const PageJob job = jobs.front();
    jobs.pop_front();
    const Page& p = at(job.page);
    char* data = frames.at(p.frame);
    const bool stored = p.stored;
    const std::int64_t transfer = ++transfers;
    lock.unlock();
    PageFailure failure;
    const std::int64_t begin = monotonic_ns(), offset = job.page * options.page_bytes;
    try {
      if (job.write)
        file->write(data, options.page_bytes, offset);
      else if (stored)
        file->read(data, options.page_bytes, offset);
      else
        std::memset(data, 0, std::size_t(options.page_bytes));
    } catch (const SpillError& error) {
      failure = {error.code, error.what(), transfer};
    }
    const std::int64_t end = monotonic_ns();
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

}  // namespace pyfastpeft
