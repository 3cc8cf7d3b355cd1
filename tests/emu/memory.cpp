// What a kernel may touch: the buffers its binding registered, the block's shared memory, constants, its arguments and
// its own stack. Everything else is out of bounds.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "emu/executor.h"

namespace emu {

namespace {

void* reserve(std::size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("host executor: mmap");
    std::abort();
  }
  return memory;
}

// ---- buffers ---------------------------------------------------------------------------------------------------------
struct Fresh {  // memory that an allocation returned and nobody has filled yet
  std::uintptr_t end;
  std::shared_ptr<std::vector<std::uint8_t>> written;
};
thread_local std::vector<Buffer> registered;
thread_local std::map<std::uintptr_t, Fresh> fresh;  // by its beginning

std::vector<Buffer> buffers;  // of the launch that runs, by address
std::size_t last_buffer = 0;
Shadow* global_shadow = nullptr;
std::size_t global_shadow_bytes = 0;

// Memory whose cells of earlier launches count as untouched: their blocks' serial numbers are older.
Shadow* shadow_of(std::size_t bytes) {
  if (bytes > global_shadow_bytes) {
    if (global_shadow != nullptr) munmap(global_shadow, global_shadow_bytes * sizeof(Shadow));
    global_shadow_bytes = std::max(bytes, 2 * global_shadow_bytes);
    global_shadow = static_cast<Shadow*>(reserve(global_shadow_bytes * sizeof(Shadow)));
  }
  return global_shadow;
}

Buffer* buffer_at(std::uintptr_t address) {
  if (last_buffer < buffers.size() && address >= buffers[last_buffer].begin && address < buffers[last_buffer].end)
    return &buffers[last_buffer];
  auto after = std::upper_bound(buffers.begin(), buffers.end(), address,
                                [](std::uintptr_t a, const Buffer& buffer) { return a < buffer.begin; });
  if (after == buffers.begin() || address >= (after - 1)->end) return nullptr;
  last_buffer = std::size_t(after - 1 - buffers.begin());
  return &buffers[last_buffer];
}

std::string nearest_buffer(std::uintptr_t address) {
  const Buffer* nearest = nullptr;
  std::uintptr_t best = 1 << 16;  // farther away it is not a neighbour
  for (const Buffer& buffer : buffers) {
    const std::uintptr_t distance = address < buffer.begin  ? buffer.begin - address
                                    : address >= buffer.end ? address - buffer.end
                                                            : 0;
    if (distance < best) {
      best = distance;
      nearest = &buffer;
    }
  }
  if (nearest == nullptr) return "no registered buffer is near";
  return "byte " + std::to_string(std::ptrdiff_t(address - nearest->begin)) + " of " + nearest->name + " (" +
         std::to_string(nearest->end - nearest->begin) + " bytes)";
}

// ---- shared memory: the dynamic part first, then a place with free space around it for every variable ------------------
constexpr std::size_t kDynamicBytes = 228 << 10, kGap = 256, kStaticLimit = 48 << 10;
char* arena = nullptr;
Shadow* arena_shadow = nullptr;
std::size_t arena_top = kDynamicBytes + kGap, static_bytes = 0;
std::vector<const SharedVariable*> variables;  // by offset

const SharedVariable* variable_at(std::size_t offset, std::size_t gap) {
  for (const SharedVariable* v : variables)
    if (offset + gap >= v->offset && offset < v->offset + v->bytes + gap) return v;
  return nullptr;
}

void check_shared(std::size_t offset, std::size_t bytes, bool write, Code code) {
  const char* access = write ? "write" : "read";
  if (offset < kDynamicBytes + kGap) {
    const std::size_t size = block.launch.dynamic_smem;
    if (offset + bytes <= size) return;
    fail("OUT OF BOUNDS %s of %zu bytes at byte %zu of dynamic shared memory (%zu bytes) at %s", access, bytes, offset,
         size, describe(code).c_str());
  }
  static const SharedVariable* last = nullptr;
  if (last == nullptr || offset < last->offset || offset >= last->offset + last->bytes) last = variable_at(offset, 0);
  if (last != nullptr && last->block == block.serial && offset + bytes <= last->offset + last->bytes) return;
  const SharedVariable* v = variable_at(offset, kGap / 2);
  fail("OUT OF BOUNDS %s of %zu bytes at byte %td of __shared__ %s (%zu bytes) at %s", access, bytes,
       v == nullptr ? 0 : std::ptrdiff_t(offset) - std::ptrdiff_t(v->offset), v == nullptr ? "memory" : v->name,
       v == nullptr ? 0 : v->bytes, describe(code).c_str());
}

void check_written(Buffer& buffer, std::size_t offset, std::size_t bytes, bool write, Code code) {
  std::uint8_t* written = buffer.written->data() + buffer.written_offset + offset;
  if (write) {
    std::memset(written, 1, bytes);
  } else if (std::memchr(written, 0, bytes) != nullptr && first_time(code, 0)) {
    note("UNINITIALISED read of byte %zu of %s (allocated, never written) at %s", offset, buffer.name.c_str(),
         describe(code).c_str());
  }
}

}  // namespace

std::size_t shared_limit(int capability) {
  switch (capability) {
    case 75:
      return 64 << 10;
    case 80:
      return 163 << 10;
    case 86:
    case 89:
    case 120:
      return 99 << 10;
    default:
      return 227 << 10;
  }
}

char* shared_arena() { return arena; }

void* shared_variable(SharedVariable* v) {
  if (v->offset == 0) {
    arena_top = (arena_top + v->alignment - 1) / v->alignment * v->alignment;
    v->offset = arena_top;
    arena_top += (v->bytes + kGap + 63) / 64 * 64;
    if (arena_top > kArenaBytes)
      fail("LIMIT: the shared variables of all kernels together pass %zu bytes", kArenaBytes);
    variables.push_back(v);
  }
  if (v->block != block.serial) {
    v->block = block.serial;
    std::memset(arena + v->offset, 0xff, v->bytes);  // a NaN in every floating-point format
    static_bytes += v->bytes;
    if (static_bytes > kStaticLimit)
      fail("LAUNCH: %zu bytes of static shared memory, at most %zu; %s is one too many", static_bytes, kStaticLimit,
           v->name);
    if (static_bytes + block.launch.dynamic_smem > shared_limit(config.capability))
      fail("LAUNCH: %zu bytes of static and %zu of dynamic shared memory, at most %zu together", static_bytes,
           block.launch.dynamic_smem, shared_limit(config.capability));
  }
  return arena + v->offset;
}

void* dynamic_shared() { return arena; }

// ---- the registry ------------------------------------------------------------------------------------------------------
void register_range(std::uintptr_t begin, std::int64_t bytes, const char* name, bool read_only) {
  if (begin != 0 && bytes > 0)
    registered.push_back({begin, begin + std::uintptr_t(bytes), read_only, name, nullptr, 0, nullptr});
}
void forget_ranges() { registered.clear(); }

void mark_fresh(std::uintptr_t begin, std::int64_t bytes) {
  mark_filled(begin, bytes);  // what an earlier allocation left there
  if (bytes > 0)
    fresh[begin] = {begin + std::uintptr_t(bytes), std::make_shared<std::vector<std::uint8_t>>(std::size_t(bytes))};
}
void mark_filled(std::uintptr_t begin, std::int64_t bytes) {
  const std::uintptr_t end = begin + std::uintptr_t(bytes);
  auto f = fresh.lower_bound(begin);
  if (f != fresh.begin() && std::prev(f)->second.end > begin) --f;
  while (f != fresh.end() && f->first < end) {
    const std::uintptr_t from = std::max(begin, f->first), to = std::min(end, f->second.end);
    if (from == f->first && to == f->second.end) {
      f = fresh.erase(f);
    } else {
      std::memset(f->second.written->data() + (from - f->first), 1, to - from);
      ++f;
    }
  }
}
std::int64_t first_unwritten(std::uintptr_t begin, std::int64_t bytes) {
  auto f = fresh.upper_bound(begin);
  if (f == fresh.begin() || (--f)->second.end < begin + std::uintptr_t(bytes)) return -1;
  const std::uint8_t* written = f->second.written->data() + (begin - f->first);
  const void* hole = std::memchr(written, 0, std::size_t(bytes));
  return hole == nullptr ? -1 : static_cast<const std::uint8_t*>(hole) - written;
}
void forget_fresh() { fresh.clear(); }

void begin_launch_memory() {
  if (arena == nullptr) {
    arena = static_cast<char*>(reserve(kArenaBytes));
    arena_shadow = static_cast<Shadow*>(reserve(kArenaBytes * sizeof(Shadow)));
  }
  buffers = registered;
  std::sort(buffers.begin(), buffers.end(), [](const Buffer& a, const Buffer& b) { return a.begin < b.begin; });
  std::vector<Buffer> merged;  // where ranges overlap (an in-place op), one buffer: writable if one of them is
  for (const Buffer& buffer : buffers) {
    if (merged.empty() || buffer.begin >= merged.back().end) {
      merged.push_back(buffer);
      continue;
    }
    merged.back().end = std::max(merged.back().end, buffer.end);
    merged.back().read_only &= buffer.read_only;
    if (merged.back().name != buffer.name) merged.back().name += "=" + buffer.name;
  }
  buffers = std::move(merged);
  last_buffer = 0;
  std::size_t bytes = 0;
  for (const Buffer& buffer : buffers) bytes += buffer.end - buffer.begin;
  Shadow* shadow = shadow_of(bytes);
  for (Buffer& buffer : buffers) {
    buffer.shadow = shadow;
    shadow += buffer.end - buffer.begin;
    auto f = fresh.upper_bound(buffer.begin);
    if (f != fresh.begin() && std::prev(f)->second.end >= buffer.end) {
      buffer.written = std::prev(f)->second.written;
      buffer.written_offset = buffer.begin - std::prev(f)->first;
    }
  }
}

const std::vector<Buffer>& launch_buffers() { return buffers; }

void begin_block_memory() {
  static_bytes = 0;
  std::memset(arena, 0xff, block.launch.dynamic_smem);
}

void check_access(const void* address, std::size_t bytes, bool write, Kind kind, Code code, Fiber& by) {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  const std::size_t in_arena = at - reinterpret_cast<std::uintptr_t>(arena);
  if (in_arena < kArenaBytes) {
    check_shared(in_arena, bytes, write, code);
    check_races({arena_shadow + in_arena, false, nullptr, in_arena}, bytes, write, kind, code, by);
    return;
  }
  if (in_constants(at)) {
    if (beyond_constant(address, bytes))
      fail("OUT OF BOUNDS %s of %zu bytes beyond a __constant__ table at %s", write ? "write" : "read", bytes,
           describe(code).c_str());
    if (write) fail("WRITE to __constant__ memory at %s", describe(code).c_str());
    return;
  }
  if (Buffer* buffer = buffer_at(at); buffer != nullptr && at + bytes <= buffer->end) {
    const std::size_t offset = at - buffer->begin;
    if (write && buffer->read_only)
      fail("WRITE to byte %zu of %s, which is read-only, at %s", offset, buffer->name.c_str(), describe(code).c_str());
    if (buffer->written != nullptr) check_written(*buffer, offset, bytes, write, code);
    check_races({buffer->shadow + offset, true, buffer, offset}, bytes, write, kind, code, by);
    return;
  }
  const auto arguments = reinterpret_cast<std::uintptr_t>(block.launch.arguments);
  if (!write && at >= arguments && at + bytes <= arguments + block.launch.arguments_bytes) return;
  if (!write && in_module(at)) return;  // a literal
  fail("OUT OF BOUNDS %s of %zu bytes at %s: %s", write ? "write" : "read", bytes, describe(code).c_str(),
       nearest_buffer(at).c_str());
}

std::string describe(const Target& target, std::size_t byte) {
  const std::size_t offset = target.offset + byte;
  if (target.buffer != nullptr) return "byte " + std::to_string(offset) + " of " + target.buffer->name;
  const SharedVariable* v = variable_at(offset, 0);
  if (v == nullptr) return "byte " + std::to_string(offset) + " of dynamic shared memory";
  return "__shared__ " + std::string(v->name) + ", element " + std::to_string((offset - v->offset) / v->element_bytes);
}

}  // namespace emu
