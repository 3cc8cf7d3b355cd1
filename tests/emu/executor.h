// What the parts of the host executor share. One launch runs at a time, all its threads are fibers of one OS thread.
//
//   fibers.cpp       stacks and the switch between them
//   scheduler.cpp    launch, choice of the next thread, __syncthreads, deadlock
//   collectives.cpp  what a warp does together; cp.async
//   memory.cpp       which memory a kernel may touch: registered buffers, shared memory
//   shadow.cpp       who touched a byte last: races, uninitialised reads
//   hooks.cpp        what the compiler calls for each load and store
//   report.cpp       what was found
//   module.cpp       names and lines of code, constants, launch bounds
//   cuda_runtime.cpp the CUDA runtime's functions that launchers call
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "emu/cuda_emu.h"
#include "emu/registry.h"

namespace emu {

constexpr int kLanes = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes;

struct Report : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// How threads are scheduled. seed 0: in order, each as far as it can go. Otherwise at random, blocks too; and after one
// in `preempt` memory accesses (0: never) the thread is interrupted.
struct Config {
  std::uint64_t seed = 0;
  unsigned preempt = 0;
  int capability = 90;   // of the GPU that is played
  int launch_error = 0;  // what the next launch answers instead of running, a cudaError_t
};
extern Config config;

// ---- code locations: an offset into this module, or the index of a Site ----------------------------------------------
using Code = std::uint32_t;
Code code_of(Site site);
Code code_of_return(const void* return_address);
bool in_module(std::uintptr_t address);
bool in_constants(std::uintptr_t address);                     // __constant__ memory
bool beyond_constant(const void* address, std::size_t bytes);  // there, but not inside of one table
int launch_bound(const void* entry);                           // what the kernel's __launch_bounds__ say, or 1024
std::vector<std::string> source_lines(Code code);              // "csrc/x/x.cu:12", innermost first
std::string describe(Code code);
std::string kernel_name(const void* entry);
std::string short_path(const std::string& path);

// Takes a launch in the executor's place, where it is set: the PTX interpreter (tests/emu/ptx).
extern std::function<void(const Launch&)> runs_instead;

std::vector<std::pair<std::string, std::uint64_t>> launches();  // how often each kernel was launched
double seconds();                                               // spent in them

// ---- reports ---------------------------------------------------------------------------------------------------------
[[gnu::format(printf, 1, 2)]] void note(const char* format, ...);  // reports, and goes on
bool first_time(Code a, Code b);                                   // of this pair of places in this launch
std::string take_reports();                                        // empties them; "" when there are none

// ---- threads ---------------------------------------------------------------------------------------------------------
struct Context {  // where a fiber goes on
  void* stack_pointer = nullptr;
};

// A moment of a thread: barriers of its block before it, then its own count of __syncwarp and __threadfence.
struct Moment {
  std::uint32_t epoch = 0;
  std::uint16_t clock = 0;
  bool operator<=(const Moment& other) const {
    return epoch < other.epoch || (epoch == other.epoch && clock <= other.clock);
  }
};

struct Copy {  // a cp.async
  void* to;
  const void* from;
  int source_bytes;
  Code code;
  bool landed;
};

enum class State { ready, at_barrier, at_collective, done };

struct Fiber {
  Context context;
  char* stack = nullptr;
  bool fresh = true;  // starts at the beginning when it is switched to
  int index = 0;      // in the block
  uint3 thread{};
  State state = State::done;
  Site site{"", 0};  // where it waits
  int predicate = 0, barrier_result = 0;

  std::uint16_t clock = 1;
  std::uint16_t seen[kLanes] = {};  // clocks of the warp's lanes as of the last __syncwarp
  bool fenced = false;
  Moment fence{};  // the last __threadfence
  std::uint16_t seen_at_fence[kLanes] = {};

  std::vector<Copy> open_copies;                  // since the last commit
  std::vector<std::vector<Copy>> pending_copies;  // committed, oldest first

  int warp() const { return index / kLanes; }
  int lane() const { return index % kLanes; }
};

constexpr std::size_t kStackBytes = 256 << 10;
extern Fiber* current;  // null outside of a launch, &launcher while the launch itself runs
extern Fiber launcher;
// Another OS thread may be in a launcher of its own meanwhile; what it touches is none of the kernel's business.
extern thread_local bool launch_is_here __attribute__((tls_model("initial-exec")));
extern std::vector<Fiber> fibers;
void switch_to(Fiber* to);
inline bool in_kernel() { return launch_is_here && current != &launcher; }
inline bool on_own_stack(std::uintptr_t address) {
  return address - reinterpret_cast<std::uintptr_t>(current->stack) < kStackBytes;
}

// ---- the block that runs ---------------------------------------------------------------------------------------------
struct Block {
  std::uint32_t serial = 0;  // unique over all launches
  std::uint32_t first_of_launch = 0;
  std::uint32_t epoch = 0;
  int threads = 0, alive = 0;
  std::uint64_t accesses = 0;  // to memory
  Launch launch{};
};
extern Block block;
extern bool checks_off;   // inside an atomic or a collective
extern Code last_access;  // where memory was touched last

void make_ready(int index);
void run_next();              // gives up the processor; returns when the thread is chosen again
void warp_arrived(int warp);  // completes the collectives whose lanes have all come
std::uint32_t alive_lanes(int warp);
void reset_collectives();
void preempt_maybe();
std::uint64_t random_bits();
inline Moment now(const Fiber& fiber) { return {block.epoch, fiber.clock}; }
void finish_copies(Fiber& fiber);

// ---- memory ----------------------------------------------------------------------------------------------------------
struct Access {         // who touched a byte; 16 bytes
  std::uint32_t block;  // serial number; 0: nobody
  Code code;
  std::uint16_t thread, clock;
  std::uint32_t epoch : 30, atomic : 1, in_flight : 1;
};
// The last write, the last read, and before that the last by another lane of its warp, another warp, another block.
struct Shadow {
  Access write, read, other_lane, other_warp, other_block;
};

struct Buffer {  // a registered range
  std::uintptr_t begin, end;
  bool read_only;
  std::string name;
  std::shared_ptr<std::vector<std::uint8_t>> written;  // per byte, for memory that was allocated and never filled
  std::size_t written_offset = 0;
  Shadow* shadow = nullptr;
};

enum class Kind { plain, atomic, copy };  // copy: a cp.async still under way

constexpr std::size_t kArenaBytes = 4 << 20;  // of shared memory: every variable of every kernel has its own place

void begin_launch_memory();
const std::vector<Buffer>& launch_buffers();  // of the launch that runs, by address
void begin_block_memory();
void check_access(const void* address, std::size_t bytes, bool write, Kind kind, Code code, Fiber& by);
std::size_t shared_limit(int capability);
char* shared_arena();

// The bytes of one buffer or variable as shadow.cpp sees them.
struct Target {
  Shadow* shadow;
  bool global;
  const Buffer* buffer;  // null: shared memory
  std::size_t offset;    // in the buffer, or in the arena
};
void check_races(const Target& target, std::size_t bytes, bool write, Kind kind, Code code, const Fiber& by);
std::string describe(const Target& target, std::size_t byte);
void note_atomic(const void* address, Fiber& by);  // an atomic on global memory orders blocks
void reset_order_of_launch();
void reset_order_of_block();

}  // namespace emu
