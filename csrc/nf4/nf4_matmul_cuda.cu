// y = x · Wᵀ for up to 64 rows of x on tensor cores, W in 4 bits, read as it lies: no repacking.
//
// The weights are the mma's first operand, 16 of their rows by 16 inputs, and the rows of x its columns. A register of
// that operand holds two neighbours in K of one row: the two values of a packed byte. Which inputs a k-step of the mma
// covers is free as long as both operands agree, so a lane takes 16 packed bytes of a row at once, its 32 inputs, and
// feeds two of the bytes to each of 8 k-steps:
//
//   lane (g = lane / 4, q = lane % 4), step s:  inputs 128·half + 32 q + 4 s + {0, 1} and {2, 3} of rows g and g + 8
//
// x comes by cp.async, 16 bytes (8 inputs of a row) at a time, straight into the order in which the lanes read it back;
// an XOR of the slot with the k-step pair keeps both the writes and the reads free of bank conflicts.
//
//   block    256 threads, 128 rows of W, a slab of 256 inputs a turn: 4 warps of 32 rows by 2 halves of the slab
//   pipeline the next slab's x (cp.async, two buffers) and packed bytes (64 a lane, registers) arrive during this one's
//            products; one barrier a turn
//   low rank S · Bᵀ is 16 more inputs for each 16 ranks, the first that are summed, in the first part of K; their
//            operands come from memory in fp32, while the first slab is on its way
//   sums     fp32; the halves are added in shared memory, the parts of K (grid.y) by a second kernel, in order: no
//            atomics. How K is cut depends on N and K alone, so a row's bits do not depend on M or on the GPU.
//
// Bytes: the packed weight once, x once per 128 rows of W from the L2. 14336 x 4096 nested: 30.3 MB, 7.0 us at the
// 4.3 TB/s an H200 copies. SASS of sm_90a, 128 values a lane and turn: 532 instructions for 8 rows of x (4.2 a value: 1
// product, and half each of a permutation, an 8-byte look-up and a conversion), 742 for 64: 31 and 22 values a cycle and SM
// issue; look-ups at two wavefronts a warp allow 32, x adds 64/M-tile of them: predicted 9 to 11 us for M up to 16, 12 at
// 32, 17 at 64 (x from shared memory is the limit there; tensor cores: 14), and 2 more where K is cut.
#include <algorithm>

#include "common/check.h"
#include "common/cuda_device.h"
#include "nf4/nf4_matmul_cuda.cuh"

namespace pyfastpeft {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRowGroups = 4, kHalves = kWarps / kRowGroups;
constexpr int kWarpRows = 32;                                // of W: two mma tiles
constexpr int kTileN = kRowGroups * kWarpRows;               // rows of W a block covers
constexpr int kHalfSlab = 128, kSlab = kHalves * kHalfSlab;  // inputs
constexpr int kSlotValues = 8;                               // of x in 16 bytes
constexpr int kSlabSlots = kSlab / kSlotValues;              // of one row of x
static_assert(kSlabSlots == kWarp && kWarps == 8, "a warp stages one row of x of each tile");
constexpr int kBuffers = 2;
constexpr int kPitch = kTileN + 4;     // floats between two rows of x in the sums: 8 banks apart by pairs
constexpr std::int64_t kBlocks = 264;  // wanted: two on each SM of an H200; a constant, see above
constexpr std::int64_t kMinSlabs = 4;  // of a part, so that filling the table and the pipeline pays

constexpr int slab_bytes(int tiles) { return tiles * 8 * kSlabSlots * 16; }
constexpr int smem_bytes(int tiles) {
  return kPairTableBytes + std::max(kBuffers * slab_bytes(tiles), tiles * 8 * kPitch * 4);
}

struct Split {
  std::int64_t slabs, parts;  // slabs of each part
};
Split split(std::int64_t N, std::int64_t K) {
  const std::int64_t slabs = (K + kSlab - 1) / kSlab, tiles = (N + kTileN - 1) / kTileN;
  const std::int64_t parts = std::clamp<std::int64_t>(kBlocks / tiles, 1, std::max<std::int64_t>(1, slabs / kMinSlabs));
  const std::int64_t each = (slabs + parts - 1) / parts;
  return {each, (slabs + each - 1) / each};
}

// Where the 16 bytes of row m, inputs 8·slot to 8·slot + 7 of the slab, lie: in units of 16 bytes.
template <int kTiles>
__device__ __forceinline__ int x_place(int m, int slot) {
  const int half = slot / (kHalfSlab / kSlotValues), q = slot / 4 % 4, pair = slot % 4;
  return ((half * kTiles + m / 8) * 4 + pair) * kWarp + ((m % 8 * 4 + q) ^ (pair * 2));
}

template <typename T>
__device__ __forceinline__ std::uint32_t round_pair(float low, float high);
template <>
__device__ __forceinline__ std::uint32_t round_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ std::uint32_t round_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

// four[i] = from[i · stride], zero from `count` on.
__device__ __forceinline__ void load_four(const float* from, std::int64_t stride, std::int64_t count,
                                          float (&four)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = i < count ? from[i * stride] : 0.0f;
}

// d += S [M, R] · B [N, R]ᵀ, as the products below: lane (g, q) holds ranks 4 q to 4 q + 3 of 16 for its four rows of W,
// and for rows 8 t + g of x.
template <typename T, int kTiles>
__device__ __forceinline__ void add_low_rank(const Nf4Epilogue& e, int M, std::int64_t N, std::int64_t row0, int half,
                                             float (&d)[2][kTiles][4]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  for (std::int64_t r0 = half * 16; r0 < e.R; r0 += kHalves * 16) {
    const std::int64_t rank = r0 + 4 * q, ranks = e.R - rank;
    std::uint32_t a[2][4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const std::int64_t n = row0 + r * 8 + g;
      float v[4];
      load_four(e.b + n * e.b_row_stride + rank * e.b_rank_stride, e.b_rank_stride, n < N ? ranks : 0, v);
      a[r / 2][r % 2] = round_pair<T>(v[0], v[1]);
      a[r / 2][r % 2 + 2] = round_pair<T>(v[2], v[3]);
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int m = t * 8 + g;
      float v[4];
      load_four(e.s + m * e.R + rank, 1, m < M ? ranks : 0, v);
      const std::uint32_t column[2] = {round_pair<T>(v[0], v[1]), round_pair<T>(v[2], v[3])};
      kp::mma_m16n8k16<T>(d[0][t], a[0], column);
      kp::mma_m16n8k16<T>(d[1][t], a[1], column);
    }
  }
}

// As many as its shared memory has room for, and two at most: then there is work while one waits.
constexpr int blocks_of_a_multiprocessor(int tiles) {
  return 2 * smem_bytes(tiles) <= kMultiprocessorSharedKiB * 1024 && tiles <= 2 ? 2 : 1;
}

template <typename T, int kTiles, bool kNested>
__global__ void __launch_bounds__(kThreads, blocks_of_a_multiprocessor(kTiles))
    nf4_matmul_kernel(const Nf4Matrix w,              //
                      int log2_blocksize,             //
                      const T* __restrict__ x,        // [M, K], M up to 8·kTiles
                      int M,                          //
                      std::int64_t slabs,             // of a part of K
                      const Nf4Epilogue epilogue,     // bias and scale are applied where K is not cut
                      float* __restrict__ workspace,  // [parts, M, N] where it is, or null
                      T* __restrict__ y) {            // [M, N]
  unsigned char* table = kdyn_smem();
  uint4* staged = reinterpret_cast<uint4*>(table + kPairTableBytes);
  float* sums = reinterpret_cast<float*>(staged);  // [8·kTiles][kPitch], when the products are done
  constexpr int kSlots = 8 * kTiles * kSlabSlots;  // of a buffer

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int half = warp / kRowGroups, g = lane / 4, q = lane % 4;
  const std::uint32_t lane8 = lane * 8;
  const int K = int(w.K);
  const int n0 = int(blockIdx.x) * kTileN;
  const int row0 = n0 + warp % kRowGroups * kWarpRows;
  const int first = int(blockIdx.y * slabs * kSlab);
  const int end = int(min(w.K, first + slabs * kSlab));
  const float offset = kNested ? *w.absmax.offset : 0.0f;

  // A warp copies row 8·t + warp of every tile, a lane the slot of its number.
  const T* my_x = x + std::int64_t(warp) * K + lane * kSlotValues;
  uint4* my_place = staged + x_place<kTiles>(warp, lane);
  const auto stage_x = [&](int k0, int buffer) {
    const bool inside = k0 + lane * kSlotValues < end;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const bool there = inside && t * 8 + warp < M;
      kp::cp_async16(my_place + buffer * kSlots + t * 4 * kWarp, there ? my_x + (std::int64_t(t) * 8 * K + k0) : x,
                     there ? 16 : 0);
    }
    kp::cp_async_commit();
  };
  const int N = int(w.N), my_row = row0 + g;
  const auto load_w = [&](int k0, Piece(&pieces)[4]) {
    const int k = min(k0 + half * kHalfSlab + q * 32, end - 32);
#pragma unroll
    for (int r = 0; r < 4; ++r) pieces[r] = load_piece<kNested>(w, log2_blocksize, min(my_row + r * 8, N - 1), k);
  };

  float d[2][kTiles][4] = {};
  Piece pieces[4], coming[4];
  stage_x(first, 0);
  load_w(first, pieces);
  fill_pair_table(table, w.type);
  if (epilogue.s != nullptr && blockIdx.y == 0) add_low_rank<T>(epilogue, M, w.N, row0, half, d);
  int buffer = 0;
  for (int k0 = first; k0 < end; k0 += kSlab, buffer ^= 1) {
    kp::cp_async_wait<0>();
    __syncthreads();  // this slab's x is there for all, and all are done with the other buffer
    if (k0 + kSlab < end) {
      stage_x(k0 + kSlab, buffer ^ 1);
      load_w(k0 + kSlab, coming);
    }
    float scale[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) scale[r] = piece_scale<kNested>(w, offset, pieces[r]);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {  // two k-steps: one word of each row, 16 bytes of each row of x
      uint4 b[kTiles];
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        b[t] = staged[buffer * kSlots + ((half * kTiles + t) * 4 + pair) * kWarp + (lane ^ (pair * 2))];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        std::uint32_t a[2][4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const std::uint32_t words[4] = {pieces[r].bytes.x, pieces[r].bytes.y, pieces[r].bytes.z, pieces[r].bytes.w};
#pragma unroll
          for (int later = 0; later < 2; ++later) {
            const float2 level = pair_levels(table, words[pair], lane8, 2 * step + later);
            a[r / 2][r % 2 + 2 * later] = round_pair<T>(__fmul_rn(level.x, scale[r]), __fmul_rn(level.y, scale[r]));
          }
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const std::uint32_t column[2] = {step == 0 ? b[t].x : b[t].z, step == 0 ? b[t].y : b[t].w};
          kp::mma_m16n8k16<T>(d[0][t], a[0], column);
          kp::mma_m16n8k16<T>(d[1][t], a[1], column);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) pieces[r] = coming[r];
  }

  // d[tile][t]: rows of W 16·tile + g (and + 8), rows of x 8·t + 2q (and + 1)
  const auto each_sum = [&](auto&& f) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = warp % kRowGroups * kWarpRows + tile * 16 + g + i / 2 * 8, m = t * 8 + 2 * q + i % 2;
          f(sums[m * kPitch + n], d[tile][t][i]);
        }
  };
  __syncthreads();  // the sums take the place of x
  if (half == 1) each_sum([](float& at, float value) { at = value; });
  __syncthreads();
  if (half == 0) each_sum([](float& at, float value) { at += value; });
  __syncthreads();
  for (int i = threadIdx.x; i < M * kTileN; i += kThreads) {
    const int m = i / kTileN;
    const std::int64_t n = n0 + i % kTileN;
    if (n >= w.N) continue;
    const float sum = sums[m * kPitch + i % kTileN];
    if (workspace != nullptr)
      workspace[(std::int64_t(blockIdx.y) * M + m) * w.N + n] = sum;
    else
      y[m * w.N + n] = rounded<T>(finish(epilogue, sum, n));
  }
}

// y = the parts' sum, in their order, finished.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    nf4_matmul_parts_kernel(const float* __restrict__ workspace,  // [parts, M, N]
                            std::int64_t parts, std::int64_t M, std::int64_t N, const Nf4Epilogue epilogue,
                            T* __restrict__ y) {  // [M, N]
  const std::int64_t n = std::int64_t(blockIdx.x) * kThreads + threadIdx.x, m = blockIdx.y;
  if (n >= N) return;
  float sum = 0;
  for (std::int64_t part = 0; part < parts; ++part) sum += workspace[(part * M + m) * N + n];
  y[m * N + n] = rounded<T>(finish(epilogue, sum, n));
}

template <typename T, int kTiles>
void launch(const Nf4Matrix& w, const T* x, int M, const Nf4Epilogue& epilogue, float* workspace, T* y, void* stream) {
  const Split cut = split(w.N, w.K);
  const auto s = static_cast<cudaStream_t>(stream);
  const auto kernel =
      w.absmax.plain == nullptr ? nf4_matmul_kernel<T, kTiles, true> : nf4_matmul_kernel<T, kTiles, false>;
  const dim3 grid(unsigned((w.N + kTileN - 1) / kTileN), unsigned(cut.parts));
  check_cuda(KLAUNCH(kernel, grid, kThreads, smem_bytes(kTiles), s, w, log2_of(w.blocksize), x, M, cut.slabs, epilogue,
                     cut.parts > 1 ? workspace : nullptr, y),
             "linear_4bit", "launching nf4_matmul_kernel");
  if (cut.parts == 1) return;
  const dim3 all(unsigned((w.N + kThreads - 1) / kThreads), unsigned(M));
  check_cuda(
      KLAUNCH(nf4_matmul_parts_kernel<T>, all, kThreads, 0, s, workspace, cut.parts, std::int64_t(M), w.N, epilogue, y),
      "linear_4bit", "launching nf4_matmul_parts_kernel");
}

template <typename T>
void launch_rows(const Nf4Matrix& w, const void* x, std::int64_t M, const Nf4Epilogue& epilogue, float* workspace,
                 void* y, void* stream) {
  // 64 rows want 128 KiB of shared memory; where a block has less (99 KiB on 8.6, 8.9, 12.0) they go in two halves
  const int room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "linear_4bit");
  const std::int64_t step = room >= smem_bytes(8) ? 64 : 32;
  const auto* from = static_cast<const T*>(x);
  auto* to = static_cast<T*>(y);
  for (std::int64_t m = 0; m < M; m += step) {
    const int rows = int(std::min(step, M - m));
    Nf4Epilogue part = epilogue;
    if (part.s != nullptr) part.s += m * part.R;
    const auto f = rows <= 8 ? launch<T, 1> : rows <= 16 ? launch<T, 2> : rows <= 32 ? launch<T, 4> : launch<T, 8>;
    f(w, from + m * w.K, rows, part, workspace, to + m * w.N, stream);
  }
}

}  // namespace

std::int64_t nf4_matmul_workspace(std::int64_t M, std::int64_t N, std::int64_t K) {
  const std::int64_t parts = split(N, K).parts;
  return parts > 1 ? parts * M * N : 0;
}

void nf4_matmul_cuda(const Nf4Matrix& w, const void* x, std::int64_t M, DType dtype, const Nf4Epilogue& epilogue,
                     float* workspace, void* y, void* stream) {
  if (M == 0 || w.N == 0) return;
  if (dtype == DType::f16) return launch_rows<__half>(w, x, M, epilogue, workspace, y, stream);
  if (dtype == DType::bf16) return launch_rows<__nv_bfloat16>(w, x, M, epilogue, workspace, y, stream);
  throw std::invalid_argument(
      message("linear_4bit: the tensor-core kernel takes float16 (1) and bfloat16 (2), got dtype "
              "code ",
              int(dtype)));
}

}  // namespace pyfastpeft
