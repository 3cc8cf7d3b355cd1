// What the 32 threads of a warp do together, and the copies of cp.async. Compiled without instrumentation: the bodies
// check the accesses they make for each lane themselves.
#include <cstring>

#include "emu/executor.h"

namespace emu {

namespace {

struct Slot {  // a collective that not all its lanes have reached yet
  const char* name;
  CollectiveBody body;
  std::uint32_t mask, arrived;
  bool aligned;
  Site site;
  void *in[kLanes], *out[kLanes];
};
std::vector<Slot> slots[kMaxWarps];

// The collective that is being carried out, for its body.
int body_warp = 0;
Site body_site{"", 0};

void no_body(void* const*, void* const*, std::uint32_t) {}

// Every participant has seen what the others did before.
void join_clocks(int warp, std::uint32_t lanes) {
  std::uint16_t joined[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    Fiber& fiber = fibers[warp * kLanes + lane];
    if (++fiber.clock == 0) fail("LIMIT: more than 65535 __syncwarp between two __syncthreads");
    fiber.seen[lane] = fiber.clock;
    for (int i = 0; i < kLanes; ++i) joined[i] = std::max(joined[i], fiber.seen[i]);
  }
  for (int lane = 0; lane < kLanes; ++lane)
    if (lanes >> lane & 1) std::memcpy(fibers[warp * kLanes + lane].seen, joined, sizeof joined);
}

}  // namespace

void reset_collectives() {
  for (auto& warp : slots) warp.clear();
}

std::uint32_t alive_lanes(int warp) {
  std::uint32_t lanes = 0;
  for (int i = warp * kLanes; i < std::min(block.threads, (warp + 1) * kLanes); ++i)
    if (fibers[i].state != State::done) lanes |= 1u << (i % kLanes);
  return lanes;
}

void warp_arrived(int warp) {
  for (std::size_t k = 0; k < slots[warp].size(); ++k) {
    if (slots[warp][k].arrived != (slots[warp][k].mask & alive_lanes(warp))) continue;
    const Slot slot = slots[warp][k];
    slots[warp].erase(slots[warp].begin() + std::ptrdiff_t(k--));
    if (slot.arrived == 0) continue;
    checks_off = true;
    body_warp = warp;
    body_site = slot.site;
    slot.body(slot.in, slot.out, slot.arrived);
    checks_off = false;
    if (slot.body == no_body) join_clocks(warp, slot.arrived);
    for (int lane = 0; lane < kLanes; ++lane)
      if (slot.arrived >> lane & 1) make_ready(warp * kLanes + lane);
  }
}

void collective(const char* name, std::uint32_t mask, void* in, void* out, CollectiveBody body, bool aligned,
                Site site) {
  const int warp = current->warp(), lane = current->lane();
  if (!(mask >> lane & 1))
    fail("MASK of %s is %08x: it leaves out lane %d, which calls it, at %s", name, mask, lane,
         describe(code_of(site)).c_str());
  Slot* slot = nullptr;
  for (Slot& open : slots[warp])
    if (open.body == body && open.mask == mask && !(open.arrived >> lane & 1) &&
        (!aligned || (open.site.line == site.line && std::strcmp(open.site.file, site.file) == 0)))
      slot = &open;
  if (slot == nullptr) {
    slots[warp].push_back(Slot{name, body, mask, 0, aligned, site, {}, {}});
    slot = &slots[warp].back();
  }
  slot->arrived |= 1u << lane;
  slot->in[lane] = in;
  slot->out[lane] = out;
  current->state = State::at_collective;
  current->site = site;
  warp_arrived(warp);
  run_next();
}

void syncwarp(std::uint32_t mask, Site site) { collective("__syncwarp", mask, nullptr, nullptr, no_body, false, site); }

unsigned ballot(const char* name, std::uint32_t mask, bool predicate, Site site) {
  unsigned result = 0;
  collective(
      name, mask, &predicate, &result,
      [](void* const* in, void* const* out, std::uint32_t lanes) {
        unsigned votes = 0;
        for (int lane = 0; lane < kLanes; ++lane)
          if (lanes >> lane & 1) votes |= unsigned(*static_cast<const bool*>(in[lane])) << lane;
        for (int lane = 0; lane < kLanes; ++lane)
          if (lanes >> lane & 1) *static_cast<unsigned*>(out[lane]) = votes;
      },
      false, site);
  return result;
}

// ---- tensor cores: the fragment layouts are those of the PTX ISA, as kport.cuh states them ---------------------------
namespace {

template <bool kTranspose>
void ldmatrix_body(void* const* in, void* const* out, std::uint32_t) {
  std::uint16_t tile[4][8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const void* row = *static_cast<const void* const*>(in[lane]);
    if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0)
      fail("MISALIGNED ldmatrix at %s: lane %d's row is not 16-byte aligned", describe(code_of(body_site)).c_str(),
           lane);
    check_access(row, 16, false, Kind::plain, code_of(body_site), fibers[body_warp * kLanes + lane]);
    std::memcpy(tile[lane / 8][lane % 8], row, 16);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    for (int m = 0; m < 4; ++m) {
      const std::uint32_t low = kTranspose ? tile[m][column][row] : tile[m][row][column];
      const std::uint32_t high = kTranspose ? tile[m][column + 1][row] : tile[m][row][column + 1];
      static_cast<std::uint32_t*>(out[lane])[m] = low | high << 16;
    }
  }
}

struct Operands {
  const std::uint32_t *a, *b;
};

template <typename T>
float low_half(std::uint32_t v) {
  T half;
  std::memcpy(&half, &v, sizeof half);
  return float(half);
}

template <typename T>
void mma_body(void* const* in, void* const* out, std::uint32_t) {
  float a[16][16], b[8][16];  // b by columns
  for (int lane = 0; lane < kLanes; ++lane) {
    const Operands& o = *static_cast<const Operands*>(in[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8, column = t + i / 2 * 8;
      a[row][column] = low_half<T>(o.a[i]);
      a[row][column + 1] = low_half<T>(o.a[i] >> 16);
    }
    for (int i = 0; i < 2; ++i) {
      b[g][t + i * 8] = low_half<T>(o.b[i]);
      b[g][t + i * 8 + 1] = low_half<T>(o.b[i] >> 16);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* d = static_cast<float*>(out[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const float *row = a[g + i / 2 * 8], *column = b[t + i % 2];
      double sum = d[i];  // products of 16-bit values are exact; one rounding at the end
      for (int k = 0; k < 16; ++k) sum += double(row[k]) * column[k];
      d[i] = float(sum);
    }
  }
}

}  // namespace

void ldmatrix_x4(std::uint32_t* r, const void* row, bool transpose, Site site) {
  collective("ldmatrix", 0xffffffffu, &row, r, transpose ? ldmatrix_body<true> : ldmatrix_body<false>, true, site);
}

void mma_m16n8k16(float* d, const std::uint32_t* a, const std::uint32_t* b, bool bf16, Site site) {
  Operands operands{a, b};
  collective("mma", 0xffffffffu, &operands, d, bf16 ? mma_body<__nv_bfloat16> : mma_body<__half>, true, site);
}

// ---- cp.async ------------------------------------------------------------------------------------------------------
namespace {

void land(Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  std::memcpy(copy.to, copy.from, std::size_t(copy.source_bytes));
  std::memset(static_cast<char*>(copy.to) + copy.source_bytes, 0, std::size_t(16 - copy.source_bytes));
}

}  // namespace

void cp_async16(void* to, const void* from, int source_bytes) {
  const Code code = code_of_return(__builtin_return_address(0));
  if (source_bytes < 0 || source_bytes > 16)
    fail("CP.ASYNC of %d source bytes at %s; 0 to 16", source_bytes, describe(code).c_str());
  if (reinterpret_cast<std::uintptr_t>(to) % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0)
    fail("MISALIGNED cp.async at %s: both addresses are multiples of 16", describe(code).c_str());
  if (std::size_t(static_cast<char*>(to) - shared_arena()) >= kArenaBytes)
    fail("CP.ASYNC at %s does not write to shared memory", describe(code).c_str());
  if (source_bytes > 0) check_access(from, std::size_t(source_bytes), false, Kind::plain, code, *current);
  check_access(to, 16, true, Kind::copy, code, *current);
  current->open_copies.push_back({to, from, source_bytes, code, false});
  if (config.seed != 0 && random_bits() % 2 != 0)  // a copy may land at once, or as late as its wait
    land(current->open_copies.back());
  else
    std::memset(to, 0xff, 16);
}

void cp_async_commit() {
  current->pending_copies.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void cp_async_wait(int pending) {
  auto& groups = current->pending_copies;
  while (int(groups.size()) > pending) {
    for (Copy& copy : groups.front()) {
      land(copy);
      check_access(copy.to, 16, true, Kind::plain, copy.code, *current);  // from here on it is this thread's own write
    }
    groups.erase(groups.begin());
  }
}

void finish_copies(Fiber& fiber) {
  for (auto& group : fiber.pending_copies)
    for (Copy& copy : group) land(copy);
  for (Copy& copy : fiber.open_copies) land(copy);
  fiber.pending_copies.clear();
  fiber.open_copies.clear();
}

}  // namespace emu
