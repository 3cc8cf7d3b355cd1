// AdamW on the GPU: all tensors of a call in one launch; the bits of adamw_cpu.cpp, which is the specification.
//
//   g = ∓grad / grad_scale;  m ← m + (1 - β1)(g - m);  v ← β2 v + (1 - β2) g²
//   p ← (1 - lr · λ) p - lr / (1 - β1^t) · m / (sqrt(v) / sqrt(1 - β2^t) + eps)
//
// Work. The tensors' blocks of 256 values, which are the blocks of the 8-bit format, stand in one row of units; a warp
// takes every W-th of them, W being the warps that the GPU holds at once. So ten thousand small tensors are spread like
// one large one, all warps together walk over contiguous memory, and there is no last wave. A lane owns values
// 4 lane .. 4 lane + 3 of either half of a unit: accesses of 16 bytes to fp32, 8 to 16-bit types, 4 to codes, contiguous
// over the warp; one by one where an array is not aligned to that, and in a tensor's last, partial unit. A unit's largest
// magnitude is found by shuffles: no barrier in the loop. A warp that is through with a tensor looks for the next by a
// 32-way search of the tensors' first units: three dependent loads among 10,000 tensors.
//
// Steps. The step count lies on the device and rises in the same launch. Every warp that works on a tensor reads it first
// and adds the units it has done to the tensor's counter when it leaves; the one that completes the count writes step + 1
// and sets the counter back to zero. The scalars that follow from the step need pow in fp64: one warp of a block computes
// them, the others take them from shared memory unless their tensor has made another number of steps.
//
// The list. Its addresses are too many for kernel arguments and come as a table in device memory. A table that changed is
// sent as arguments of small launches, 3.8 KiB each, not as a copy from host memory: arguments are taken over when the
// launch is made, so nothing on the host has to stay alive or unchanged, and a captured graph holds them by value. What
// changes from step to step is the gradients: 8 bytes a tensor, at the front of the table.
//
// Bytes per value, with fp32 state and fp32, 16-bit parameters: 28, 22; with 8-bit state 16.03, 10.03. Floor on H200
// (copy: 4.3 TB/s), 32 M values, fp32 parameters: 208 µs and 119 µs. In that time each of the 132 SMs can issue 193 and
// 111 instructions per value; the update takes about 45 (a correctly rounded square root and one such division; the
// other, by a scalar, is five operations), decoding and encoding two 8-bit moments about 60 more, with 4 lookups in
// shared memory at about 3.4 cycles of bank conflicts a warp: 0.43 cycles a value of 0.87. So fp32 state is bound by
// memory, 8-bit state by both. Predicted: 240 µs (87 % of copy) and 160 µs (75 %).
// Two blocks of 8 warps per SM (124 registers a thread on sm_90a, no spills) have 64 KiB of loads under way with fp32 state, 40 with
// 8-bit; 30 hide the latency. All accesses but the parameter's, which the next forward reads, are marked streaming.
//
// The bits are the CPU's but for pow: CUDA's fp64 pow is within 2 ulp, so that a scalar of a step may round to the
// neighbouring fp32, once in about 10^8 steps.
#include <algorithm>
#include <cstring>

#include "adamw/adamw_unit.cuh"
#include "common/check.h"
#include "common/cuda_device.h"

namespace pyfastpeft {
namespace {

constexpr const char* kOp = "adamw_";
constexpr int kThreads = 256, kWarps = kThreads / kWarp, kBlocksPerMultiprocessor = 2;
static_assert(kThreads == kLevels, "load_map wants a thread per level");

// ---- the table ------------------------------------------------------------------------------------------------------
// Its parts, in words: the gradients first, they are what changes from step to step.
struct Table {
  std::uint64_t* words;
  std::int64_t count;
  PYFASTPEFT_HOST_DEVICE const std::uint64_t* grads() const { return words; }
  PYFASTPEFT_HOST_DEVICE std::uint64_t* entries() const { return words + count; }
  // the first unit of each tensor, and the end of the last one's
  PYFASTPEFT_HOST_DEVICE std::uint64_t* starts() const { return words + count * (1 + kEntryWords); }
  // units done in this launch; zero between launches
  PYFASTPEFT_HOST_DEVICE std::uint64_t* done() const { return starts() + count + 1; }
};

constexpr int kPageWords = 480;
struct Page {
  std::uint64_t words[kPageWords];
};

__global__ void __launch_bounds__(kThreads) adamw_table_kernel(std::uint64_t* __restrict__ table,  // [count]
                                                               int count,                          // words
                                                               const Page page) {
  for (int i = int(threadIdx.x); i < count; i += kThreads) table[i] = page.words[i];
}

// ---- the kernel ----------------------------------------------------------------------------------------------------
// The tensor whose units include `unit`, which is not before tensor `from`.
__device__ __forceinline__ std::int64_t find_tensor(const Table& table, std::int64_t unit, std::int64_t from) {
  const std::uint64_t* starts = table.starts();
  std::int64_t low = from, high = table.count;  // starts[low] <= unit < starts[high]
  while (high - low > 1) {
    const std::int64_t stride = (high - low + kWarp - 1) / kWarp;
    const std::int64_t probe = low + stride * (threadIdx.x % kWarp);
    const bool before = probe < high && std::int64_t(starts[probe]) <= unit;
    low += stride * (__popc(__ballot_sync(kAllLanes, before)) - 1);
    high = low + stride < high ? low + stride : high;
  }
  return low;
}

// The step as it was before this launch, in every lane. Others may be about to write it: only atomics touch it, unless
// the tensor has a single unit.
__device__ __forceinline__ float read_step(float* step, bool shared) {
  float value = 0;
  if (threadIdx.x % kWarp == 0) value = shared ? atomicAdd(step, 0.0f) : *step;
  return __shfl_sync(kAllLanes, value, 0);
}

__device__ __forceinline__ Scalars make_scalars(const AdamwOptions& options, const AdamwDeviceScalars& device,
                                                float step) {
  AdamwOptions o = options;
  if (device.lr != nullptr)
    o.lr = device.lr_is_f64 ? *static_cast<const double*>(device.lr) : double(*static_cast<const float*>(device.lr));
  if (device.grad_scale != nullptr) o.grad_scale = double(*device.grad_scale);
  Scalars s;
  s.c = adamw_coefficients(o, double(step), [](double a, double b) { return __dmul_rn(a, b); });
  s.step = step;
  return s;
}

// Four values of each array lie where one access takes them.
__device__ __forceinline__ bool aligned(const Tensor& t) {
  const unsigned kind = unsigned(t.entry.kind_and_n >> 56), dtypes = kind & ~unsigned(kBits8);
  const std::uintptr_t state = kind & kBits8 ? 3 : 15, param = dtypes == kF32 ? 15 : 7;
  const std::uintptr_t grad = dtypes == kF16 || dtypes == kBf16 ? 7 : 15;
  const auto off = [](const void* p, std::uintptr_t mask) { return reinterpret_cast<std::uintptr_t>(p) & mask; };
  return (off(t.entry.param, param) | off(t.grad, grad) | off(t.entry.exp_avg, state) | off(t.entry.exp_avg_sq, state) |
          off(t.entry.master, 15)) == 0;
}

// Makes tensor `index` the one this warp works on; returns its step.
__device__ __forceinline__ float enter(const Table& table, std::int64_t index, Tensor& t) {
  const Entry* entry = reinterpret_cast<const Entry*>(table.entries()) + index;
  const std::int64_t begin = std::int64_t(table.starts()[index]),
                     units = std::int64_t(table.starts()[index + 1]) - begin;
  const float step = read_step(entry->step, units > 1);
  __syncwarp();  // no lane still reads the tensor before
  if (threadIdx.x % kWarp == 0) {
    t.entry = *entry;
    t.grad = reinterpret_cast<const void*>(table.grads()[index]);
    t.n = std::int64_t(entry->kind_and_n << 8 >> 8);
    t.index = index;
    t.begin = begin;
    t.units = units;
    t.aligned = aligned(t);
  }
  __syncwarp();
  return step;
}

// Counts `done` of the tensor's units; the warp that completes them writes the step after `step`.
__device__ __forceinline__ void leave(const Table& table, const Tensor& t, std::int64_t done, float step) {
  if (threadIdx.x % kWarp != 0) return;
  if (t.units == 1) {
    *t.entry.step = step + 1.0f;
    return;
  }
  __threadfence();  // the step is read before this warp's units count as done
  auto* counter = reinterpret_cast<unsigned long long*>(table.done() + t.index);
  const auto units = static_cast<unsigned long long>(done);
  if (atomicAdd(counter, units) + units != static_cast<unsigned long long>(t.units)) return;
  atomicExch(counter, 0ull);
  atomicExch(t.entry.step, step + 1.0f);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    adamw_kernel(const Table table,           //
                 std::int64_t units,          //
                 const AdamwOptions options,  // map1, map2 and seed on the device
                 const AdamwDeviceScalars device) {
  KSHARED(DeviceMap, maps, [2]);
  KSHARED(Tensor, tensors, [kWarps]);  // each warp's own, and its scalars
  KSHARED(Scalars, scalars, [kWarps]);
  if (device.found_inf != nullptr && *device.found_inf != 0.0f) return;  // all threads of all blocks
  if (options.map1 != nullptr) {
    load_map<true>(maps[0], options.map1);
    load_map<false>(maps[1], options.map2);
  }
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const std::int64_t warps = std::int64_t(gridDim.x) * kWarps;
  std::int64_t unit = std::int64_t(blockIdx.x) * kWarps + warp;
  Tensor& t = tensors[warp];
  Scalars& s = scalars[warp];

  // Warp 0 makes the scalars of its tensor's step. It always has a unit; the last warps of the last block may have none.
  float step = 0;
  if (unit < units) step = enter(table, find_tensor(table, unit, 0), t);
  if (warp == 0 && lane == 0) s = make_scalars(options, device, step + 1.0f);
  __syncthreads();
  if (warp != 0 && lane == 0) s = scalars[0];
  __syncthreads();  // before warp 0 makes others

  while (unit < units) {
    if (s.step != step + 1.0f) {
      __syncwarp();
      if (lane == 0) s = make_scalars(options, device, step + 1.0f);
      __syncwarp();
    }
    const std::int64_t end = min(t.begin + t.units, units);
    std::int64_t done = 0;
    for (; unit < end; unit += warps, ++done) {
      const std::int64_t values = t.n - (unit - t.begin) * kAdamwBlock;
      if (t.aligned && values >= kAdamwBlock)
        process<true>(t, unit - t.begin, s, maps, options.seed);
      else if (values > 0)
        process<false>(t, unit - t.begin, s, maps, options.seed);
    }
    leave(table, t, done, step);
    if (unit < units) step = enter(table, find_tensor(table, unit, t.index + 1), t);
  }
}

unsigned kind_of(const AdamwTensor& t) {
  const bool same = t.grad_dtype == t.param_dtype;
  unsigned kind = kF32;
  if (t.param_dtype == DType::f16) kind = same ? kF16 : kF16GradF32;
  if (t.param_dtype == DType::bf16) kind = same ? kBf16 : kBf16GradF32;
  return kind | (t.bits8 ? kBits8 : 0u);
}

std::uint64_t word(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

}  // namespace

std::int64_t adamw_table_words(std::int64_t count) { return count * (1 + kEntryWords + 1 + 1) + 1; }

void adamw_cuda(const AdamwTensor* tensors, std::int64_t count, const AdamwOptions& options,
                const AdamwDeviceScalars& scalars, std::uint64_t* table, AdamwTableContent& content,
                int multiprocessors, void* stream) {
  if (count == 0) return;
  const std::size_t words = std::size_t(adamw_table_words(count));
  std::vector<std::uint64_t> wanted(words, 0);
  const Table host{wanted.data(), count}, device{table, count};
  std::int64_t units = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const AdamwTensor& t = tensors[i];
    wanted[std::size_t(i)] = word(t.grad);
    const std::uint64_t entry[] = {
        word(t.param),   word(t.exp_avg), word(t.exp_avg_sq), word(t.absmax1),
        word(t.absmax2), word(t.master),  word(t.step),       std::uint64_t(kind_of(t)) << 56 | std::uint64_t(t.n)};
    std::memcpy(host.entries() + i * kEntryWords, entry, sizeof entry);
    host.starts()[i] = std::uint64_t(units);
    units += std::max<std::int64_t>(1, (t.n + kAdamwBlock - 1) / kAdamwBlock);  // an empty tensor's step rises too
  }
  host.starts()[count] = std::uint64_t(units);

  const std::vector<std::uint64_t> known = std::move(content.words);
  content.words.clear();  // until all of it has been sent
  for (std::size_t first = 0; first < words; first += kPageWords) {
    const std::size_t size = std::min<std::size_t>(kPageWords, words - first);
    const std::size_t bytes = size * sizeof(std::uint64_t);
    if (known.size() == words && std::memcmp(&wanted[first], &known[first], bytes) == 0) continue;
    Page page{};
    std::memcpy(page.words, &wanted[first], bytes);
    check_cuda(
        KLAUNCH(adamw_table_kernel, 1, kThreads, 0, static_cast<cudaStream_t>(stream), table + first, int(size), page),
        kOp, "launching adamw_table_kernel");
  }
  const std::int64_t resident = std::int64_t(multiprocessors) * kBlocksPerMultiprocessor;
  const std::int64_t grid = std::min<std::int64_t>(resident, (units + kWarps - 1) / kWarps);
  check_cuda(KLAUNCH(adamw_kernel, unsigned(grid), kThreads, 0, static_cast<cudaStream_t>(stream), device, units,
                     options, scalars),
             kOp, "launching adamw_kernel");
  content.words = std::move(wanted);
}

}  // namespace pyfastpeft
