// Runs a launch: blocks one after the other, the threads of a block as fibers that switch at barriers and collectives.
#include <chrono>
#include <map>
#include <mutex>

#include "emu/executor.h"

EMU_HIDDEN uint3 emu_block_index asm("emu_blockIdx");
EMU_HIDDEN dim3 emu_block_dim asm("emu_blockDim");
EMU_HIDDEN dim3 emu_grid_dim asm("emu_gridDim");

namespace emu {

std::function<void(const Launch&)> runs_instead;

Config config;
Block block;
bool checks_off = false;
Code last_access = 0;

namespace {

constexpr unsigned kSpins = 5'000'000;  // turns a block may yield before it counts as a livelock
std::vector<int> ready;                 // [head, end) are the threads that can run
std::size_t head = 0;
int waiting = 0;  // at the barrier
Barrier barrier_kind;
bool gave_up = false, exit_reported = false;
unsigned spins = 0;
std::uint64_t random_state = 0;
std::uint32_t warp_priority[kMaxWarps];
std::chrono::duration<double> spent{};
std::map<const void*, std::uint64_t> launched;  // by the kernel's entry

Fiber* next_ready() {
  if (head >= ready.size()) {
    ready.clear();
    head = 0;
    return nullptr;
  }
  if (config.seed != 0) {  // half of the blocks: any thread; the others: the warp of highest priority runs ahead
    std::size_t chosen = head + random_bits() % (ready.size() - head);
    if ((block.serial + config.seed) % 2 != 0)
      for (std::size_t i = head; i < ready.size(); ++i)
        if (warp_priority[ready[i] / kLanes] > warp_priority[ready[chosen] / kLanes]) chosen = i;
    std::swap(ready[head], ready[chosen]);
  }
  Fiber* next = &fibers[ready[head++]];
  if (head > 4096) {
    ready.erase(ready.begin(), ready.begin() + std::ptrdiff_t(head));
    head = 0;
  }
  return next;
}

bool same_place(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// Opens the barrier when every living thread has come.
void barrier_arrived() {
  if (waiting == 0 || waiting < block.alive) return;
  int count = 0;
  const Fiber* first = nullptr;
  for (int i = 0; i < block.threads; ++i) {
    const Fiber& fiber = fibers[i];
    if (fiber.state != State::at_barrier) continue;
    count += fiber.predicate != 0;
    if (first == nullptr) first = &fiber;
    if (!same_place(first->site, fiber.site)) {
      waiting = 0;
      fail("DIVERGENT __syncthreads: thread %d waits at %s, thread %d at %s", first->index,
           describe(code_of(first->site)).c_str(), fiber.index, describe(code_of(fiber.site)).c_str());
    }
  }
  if (block.alive < block.threads && !exit_reported) {
    exit_reported = true;
    note("EXITED THREADS: __syncthreads at %s is reached by %d of %d threads, the others have returned",
         describe(code_of(first->site)).c_str(), waiting, block.threads);
  }
  const int result = barrier_kind == Barrier::count ? count
                     : barrier_kind == Barrier::all ? count == waiting
                                                    : count > 0;
  waiting = 0;
  ++block.epoch;
  for (int i = 0; i < block.threads; ++i) {
    Fiber& fiber = fibers[i];
    if (fiber.state != State::at_barrier) continue;
    fiber.barrier_result = result;
    fiber.clock = 1;
    std::fill(std::begin(fiber.seen), std::end(fiber.seen), 0);
    make_ready(i);
  }
}

void check_configuration(const Launch& l) {
  const std::uint64_t threads = std::uint64_t(l.block.x) * l.block.y * l.block.z;
  if (threads == 0 || threads > kMaxThreads || l.block.x > 1024 || l.block.y > 1024 || l.block.z > 64)
    note("LAUNCH with blocks of (%u, %u, %u) threads; at most 1024, and 64 in z", l.block.x, l.block.y, l.block.z);
  else if (threads > std::uint64_t(launch_bound(l.entry)))
    note("LAUNCH with %d threads a block, __launch_bounds__ of the kernel are %d", int(threads), launch_bound(l.entry));
  if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0 || l.grid.x > 0x7fffffffu || l.grid.y > 65535 || l.grid.z > 65535)
    note("LAUNCH with a grid of (%u, %u, %u) blocks; each at least 1, at most (2147483647, 65535, 65535)", l.grid.x,
         l.grid.y, l.grid.z);
  if (l.dynamic_smem > shared_limit(config.capability))
    note("LAUNCH with %zu bytes of dynamic shared memory, at most %zu on capability %d.%d", l.dynamic_smem,
         shared_limit(config.capability), config.capability / 10, config.capability % 10);
}

void report_deadlock() {
  std::map<std::string, std::pair<int, int>> places;  // how many threads, the first of them
  for (int i = 0; i < block.threads; ++i) {
    const Fiber& fiber = fibers[i];
    if (fiber.state == State::done) continue;
    const char* what = fiber.state == State::at_barrier ? "__syncthreads at " : "a warp collective at ";
    auto& [count, first] = places[what + describe(code_of(fiber.site))];
    if (count++ == 0) first = i;
  }
  std::string text;
  for (const auto& [place, threads] : places)
    text += "\n    " + std::to_string(threads.first) + " threads (the first is " + std::to_string(threads.second) +
            ") wait for " + place;
  if (block.alive < block.threads)
    text += "\n    " + std::to_string(block.threads - block.alive) + " threads have returned";
  note("DEADLOCK: %d of %d threads of block (%u, %u, %u) never finish%s", block.alive, block.threads, emu_block_index.x,
       emu_block_index.y, emu_block_index.z, text.c_str());
}

void run_block(const Launch& l) {
  ++block.serial;
  block.epoch = 0;
  block.accesses = 0;
  block.alive = block.threads;
  waiting = 0;
  spins = 0;
  head = 0;
  ready.clear();
  reset_collectives();
  begin_block_memory();
  reset_order_of_block();
  if (config.seed != 0)
    for (auto& priority : warp_priority) priority = std::uint32_t(random_bits());
  for (int i = 0; i < block.threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = i;
    fiber.thread = {i % l.block.x, i / l.block.x % l.block.y, i / l.block.x / l.block.y};
    fiber.clock = 1;
    fiber.fenced = false;
    std::fill(std::begin(fiber.seen), std::end(fiber.seen), 0);
    make_ready(i);
  }
  run_next();
  if (!gave_up && block.alive > 0) {
    report_deadlock();
    gave_up = true;
  }
}

}  // namespace

std::vector<std::pair<std::string, std::uint64_t>> launches() {
  std::vector<std::pair<std::string, std::uint64_t>> result;
  for (const auto& [entry, count] : launched) result.emplace_back(kernel_name(entry), count);
  return result;
}

double seconds() { return spent.count(); }

std::uint64_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

void make_ready(int index) {
  fibers[index].state = State::ready;
  ready.push_back(index);
}

void run_next() {
  Fiber* next = next_ready();
  switch_to(next != nullptr ? next : &launcher);
}

void yield() {
  if (++spins > kSpins)
    fail("LIVELOCK: threads wait at %s for something that does not happen", describe(last_access).c_str());
  ready.push_back(current->index);
  run_next();
}

void preempt_maybe() {
  if (config.preempt != 0 && random_bits() % config.preempt == 0) yield();
}

void give_up() {
  gave_up = true;
  if (in_kernel()) {
    switch_to(&launcher);
    __builtin_unreachable();
  }
}

void thread_main() {
  for (;;) {
    block.launch.run(block.launch.arguments);
    finish_copies(*current);
    current->state = State::done;
    --block.alive;
    warp_arrived(current->warp());
    barrier_arrived();
    run_next();
  }
}

int syncthreads(Barrier kind, int predicate, Site site) {
  if (waiting > 0 && barrier_kind != kind)
    fail("DIVERGENT __syncthreads: another form of it at %s", describe(code_of(site)).c_str());
  barrier_kind = kind;
  ++waiting;
  current->state = State::at_barrier;
  current->site = site;
  current->predicate = predicate;
  barrier_arrived();
  run_next();
  return current->barrier_result;
}

void launch(const Launch& l) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  block.launch = l;
  current = &launcher;
  launch_is_here = true;
  const struct End {
    std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
    ~End() {
      current = nullptr;
      launch_is_here = false;
      spent += std::chrono::steady_clock::now() - begin;
    }
  } end;
  gave_up = exit_reported = false;
  check_configuration(l);
  begin_launch_memory();
  if (std::string found = take_reports(); !found.empty()) throw Report(found);

  if (runs_instead) {
    runs_instead(l);
    return;
  }
  ++launched[l.entry];
  fibers.resize(kMaxThreads);
  block.threads = int(l.block.x * l.block.y * l.block.z);
  block.first_of_launch = block.serial + 1;
  emu_block_dim = l.block;
  emu_grid_dim = l.grid;
  random_state = config.seed * 0x9E3779B97F4A7C15ull;
  reset_order_of_launch();

  const std::uint64_t blocks = std::uint64_t(l.grid.x) * l.grid.y * l.grid.z;
  std::vector<std::uint32_t> order;
  if (config.seed != 0) {
    order.resize(blocks);
    for (std::uint64_t i = 0; i < blocks; ++i) {
      order[i] = std::uint32_t(i);
      std::swap(order[i], order[random_bits() % (i + 1)]);
    }
  }
  for (std::uint64_t i = 0; i < blocks && !gave_up; ++i) {
    const std::uint64_t b = order.empty() ? i : order[i];
    emu_block_index = {unsigned(b % l.grid.x), unsigned(b / l.grid.x % l.grid.y), unsigned(b / l.grid.x / l.grid.y)};
    run_block(l);
  }
  checks_off = false;
  if (gave_up) {  // the threads stand anywhere; their stacks are started afresh
    for (Fiber& fiber : fibers) {
      fiber.fresh = true;
      fiber.open_copies.clear();
      fiber.pending_copies.clear();
    }
  }
  if (std::string found = take_reports(); !found.empty()) throw Report(found);
}

}  // namespace emu
