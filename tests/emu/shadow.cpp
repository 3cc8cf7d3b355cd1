// Who touched each byte last, and whether that was ordered before the access that comes now.
//
// Within a block __syncthreads orders everything (the epoch), __syncwarp what its lanes did before (the clocks). Between
// blocks of a launch only a __threadfence followed by an atomic orders, for a thread that performs an atomic on the same
// address later: the pattern of "the last block adds up the parts".
#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "emu/executor.h"

namespace emu {

namespace {

struct Release {  // an atomic after a fence, and what it lets others rely on
  std::uint32_t block;
  int thread;
  Moment fence, at;
  bool fenced;
  std::vector<std::uint16_t> seen;                    // the warp's clocks at the fence
  std::shared_ptr<const std::vector<Moment>> fences;  // each thread's last fence at the time of the atomic
};
using Releases = std::shared_ptr<const std::vector<Release>>;

struct Acquire {  // an atomic of this block that came after others' releases
  int thread;
  Moment at;
  Releases releases;
};

std::unordered_map<const void*, Releases> released;  // by address, in this launch
std::vector<Acquire> acquired;                       // by this block
bool block_fenced = false;

Moment moment(const Access& a) { return {a.epoch, a.clock}; }

bool covers(const Release& r, const Access& a) {
  if (a.block != r.block) return false;
  if (r.fenced) {
    if (a.epoch < r.fence.epoch) return true;  // a barrier, then the fence
    if (a.thread == r.thread && moment(a) <= r.fence) return true;
    if (a.thread / kLanes == r.thread / kLanes && a.epoch == r.fence.epoch && a.clock < r.seen[a.thread % kLanes])
      return true;
  }
  return a.epoch < r.at.epoch && moment(a) <= (*r.fences)[a.thread];  // its own fence, then a barrier
}

// Whether what another block did at `a` is ordered before this thread.
bool handed_over(const Access& a, const Fiber& by) {
  for (const Acquire& acquire : acquired) {
    const bool ours = acquire.thread == by.index || acquire.at.epoch < block.epoch ||
                      (acquire.thread / kLanes == by.warp() && acquire.at.clock < by.seen[acquire.thread % kLanes]);
    if (!ours) continue;
    for (const Release& release : *acquire.releases)
      if (covers(release, a)) return true;
  }
  return false;
}

EMU_INLINE bool concurrent(const Access& a, const Fiber& by, bool global) {
  if (a.block < block.first_of_launch) return false;  // an earlier launch, or nobody yet
  if (a.block != block.serial) return global && !handed_over(a, by);
  if (a.thread == by.index || a.epoch != block.epoch) return false;
  return a.thread / kLanes != by.warp() || a.clock >= by.seen[a.thread % kLanes];
}

void report_race(const char* what, const Access& earlier, Code code, const Target& target, std::size_t byte) {
  if (!first_time(earlier.code, code)) return;
  note("RACE, %s on %s at %s; before it thread %d%s at %s", what, describe(target, byte).c_str(),
       describe(code).c_str(), earlier.thread, earlier.block != block.serial ? " of another block" : "",
       describe(earlier.code).c_str());
}

}  // namespace

static void check_cell(Shadow& cell, const Access& access, const Target& target, std::size_t byte, bool write,
                       const Fiber& by) {
  const auto races_with = [&](const Access& a) {
    return !(access.atomic && a.atomic) && concurrent(a, by, target.global);
  };
  if (races_with(cell.write))
    report_race(write ? "write after write" : "read after write", cell.write, access.code, target, byte);
  if (write) {
    for (const Access* read : {&cell.read, &cell.other_lane, &cell.other_warp, &cell.other_block})
      if (races_with(*read)) report_race("write after read", *read, access.code, target, byte);
    cell.write = access;
    return;
  }
  if (cell.write.block != block.serial) {
    if (!target.global && first_time(access.code, 0))
      note("UNINITIALISED read of %s at %s", describe(target, byte).c_str(), describe(access.code).c_str());
  } else if (cell.write.in_flight) {
    report_race("read before the wait for cp.async", cell.write, access.code, target, byte);
  }
  if (cell.read.block != block.serial)
    cell.other_block = cell.read;
  else if (cell.read.thread / kLanes != by.warp())
    cell.other_warp = cell.read;
  else if (cell.read.thread != by.index)
    cell.other_lane = cell.read;
  cell.read = access;
}

void check_races(const Target& target, std::size_t bytes, bool write, Kind kind, Code code, const Fiber& by) {
  const Access access{block.serial,      code, std::uint16_t(by.index), by.clock, block.epoch, kind == Kind::atomic,
                      kind == Kind::copy};
  Shadow* cells = target.shadow;
  const Shadow before = cells[0];
  check_cell(cells[0], access, target, 0, write, by);
  for (std::size_t i = 1; i < bytes; ++i) {
    if (std::memcmp(&cells[i], &before, sizeof before) == 0)
      cells[i] = cells[0];  // the bytes of a value are touched together, nearly always
    else
      check_cell(cells[i], access, target, i, write, by);
  }
}

void threadfence() {
  Fiber& by = *current;
  by.fenced = block_fenced = true;
  by.fence = now(by);
  std::copy(std::begin(by.seen), std::end(by.seen), by.seen_at_fence);
  if (++by.clock == 0) fail("LIMIT: more than 65535 __threadfence between two __syncthreads");
}

void note_atomic(const void* address, Fiber& by) {
  const auto earlier = released.find(address);
  if (earlier != released.end()) acquired.push_back({by.index, now(by), earlier->second});
  if (!block_fenced) return;
  auto fences = std::make_shared<std::vector<Moment>>(block.threads);
  for (int i = 0; i < block.threads; ++i)
    if (fibers[i].fenced) (*fences)[i] = fibers[i].fence;
  auto all = std::make_shared<std::vector<Release>>();
  for (const Acquire& acquire : acquired)
    for (const Release& r : *acquire.releases)
      if (std::none_of(all->begin(), all->end(), [&](const Release& known) {
            return known.block == r.block && known.thread == r.thread && known.at.epoch == r.at.epoch &&
                   known.at.clock == r.at.clock;
          }))
        all->push_back(r);
  all->push_back({block.serial, by.index, by.fence, now(by), by.fenced,
                  std::vector<std::uint16_t>(std::begin(by.seen_at_fence), std::end(by.seen_at_fence)), fences});
  released[address] = all;
}

void reset_order_of_launch() { released.clear(); }
void reset_order_of_block() {
  acquired.clear();
  block_fenced = false;
}

}  // namespace emu
