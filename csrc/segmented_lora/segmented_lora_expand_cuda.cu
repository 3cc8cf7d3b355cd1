// y[row] += Σ_parts S[part][position] · B_iᵀ + scaling_i · bias_i for the rows of every adapter i of a mixed batch, in one
// launch; and the launcher of both products.
//
// Tensor-core kernel (bf16, fp16). A block has up to 32 rows of one adapter (grid x) and 256 columns of y (grid y), a warp
// 32 of them; it walks over the ranks by sixteens. B [N, R] is read in its own order, once for the tile's rows: a lane loads
// ranks 4t to 4t+3 of a row, so four lanes have the 64 bytes of 16 fp32 ranks, and these serve an mma whose "rows t, t+1,
// t+8, t+9" they are called. The columns of an mma are ours to name as well: column c of tile j is column 8·(c/2) + 2j + c%2,
// so that the sums of a lane in four tiles are eight neighbours of a row, one 16-byte load and store.
//
// Bytes: 4·R·N of B per adapter and 32 rows, 4·N a row of y (read and written), S from L2. Flops 2·rows·N·R.
// Decode, 64 samples of 64 adapters, N = 4096, R = 16, bf16, B fp32: 16.8 MB of B and 1.0 MB of y, 4.1 µs at 4.3 TB/s;
// 16 KB a block in flight at once, 1056 blocks; predicted 6.5 µs. With shrink, 13 µs and two launches, where a loop over 64
// adapters has at least 128.
// Prefill, 8 adapters of 512 rows, N = 4096: 67 MB of y, 16 µs; predicted 20 µs.
//
// FMA kernel (fp32; 16-bit dtypes on sm_75, and where rows or factors do not lie at multiples of 16 bytes): a thread one
// column, eight rows.
#include "segmented_lora/segmented_lora_cuda.cuh"

namespace pyfastpeft {
namespace {

constexpr int kWarpColumns = 32, kColumns = kLoraWarps * kWarpColumns;
constexpr char kOp[] = "segmented_lora_";

// Ranks first to first + 3 of a row of B, in fp32; zeros beyond the last. kWhole: whole fours, at multiples of their size.
template <typename F>
__device__ __forceinline__ float4 load_four(const F* __restrict__ row, int first, int R, bool whole, bool there) {
  if (!there || first >= R) return make_float4(0, 0, 0, 0);
  if (whole) {
    if constexpr (sizeof(F) == 4) {
      return *reinterpret_cast<const float4*>(row + first);
    } else {
      struct alignas(8) Four {
        F values[4];
      };
      const Four four = *reinterpret_cast<const Four*>(row + first);
      return make_float4(as_f32(four.values[0]), as_f32(four.values[1]), as_f32(four.values[2]),
                         as_f32(four.values[3]));
    }
  }
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = first + i < R ? as_f32(row[first + i]) : 0.0f;
  return make_float4(values[0], values[1], values[2], values[3]);
}

template <typename T, typename F>
__global__ void __launch_bounds__(kLoraThreads, 2)
    segmented_expand_mma_kernel(const float* __restrict__ s,  // [parts, positions, stride], zeros after the last rank
                                int parts,                    //
                                std::int64_t stride,          // a multiple of 16
                                const SegmentedCall call,     //
                                const SegmentedTable table,   //
                                std::int64_t N,               // a multiple of 8
                                T* __restrict__ y) {          // [positions, N], 16-byte aligned
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const SegmentedTile tile = segmented_tile<kSegmentedTile>(call, blockIdx.x);
  const std::int64_t first_column = std::int64_t(blockIdx.y) * kColumns + warp * kWarpColumns;
  if (tile.adapter < 0 || first_column >= N) return;
  const SegmentedAdapter& adapter = table.adapters[tile.adapter];
  const int R = adapter.rank;
  if (R == 0) return;
  const F* b = static_cast<const F*>(adapter.b);
  const bool whole = R % 4 == 0;

  float sum[2][4][4] = {};
#pragma unroll 1
  for (int first_rank = 0; first_rank < R; first_rank += 16) {
    const int rank = first_rank + 4 * t;
    std::uint32_t right[4][2];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const std::int64_t column = first_column + 8 * (g / 2) + 2 * j + g % 2;
      const float4 four = load_four<F>(b + column * R, rank, R, whole, column < N);
      right[j][0] = lora_pack<T>(four.x, four.y);
      right[j][1] = lora_pack<T>(four.z, four.w);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      std::uint32_t left[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * m + 8 * half + g;
        float4 total = make_float4(0, 0, 0, 0);
        for (int part = 0; part < parts && row < tile.count; ++part) {
          const float4 four = *reinterpret_cast<const float4*>(
              s + (std::int64_t(part) * call.positions + tile.position + row) * stride + rank);
          total = make_float4(total.x + four.x, total.y + four.y, total.z + four.z, total.w + four.w);
        }
        left[half][0] = lora_pack<T>(total.x, total.y);
        left[half][1] = lora_pack<T>(total.z, total.w);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j)
        kp::mma_m16n8k16<T>(sum[m][j], {left[0][0], left[1][0], left[0][1], left[1][1]}, right[j]);
    }
  }

  const std::int64_t mine = first_column + 8 * t;  // the eight columns this lane writes
  float bias[8] = {};
  if (adapter.bias != nullptr && mine < N) {
#pragma unroll
    for (int i = 0; i < 8; ++i) bias[i] = adapter.scaling * adapter.bias[mine + i];
  }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t row = segmented_row(call, tile, 16 * m + 8 * half + g);
      if (row >= 0 && mine < N) {
        Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(y + row * N + mine);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          chunk.values[i] = rounded<T>(as_f32(chunk.values[i]) + (sum[m][i / 2][2 * half + i % 2] + bias[i]));
        *reinterpret_cast<Chunk<T>*>(y + row * N + mine) = chunk;
      }
    }
}

template <typename T, typename F>
__global__ void __launch_bounds__(kLoraThreads) segmented_expand_fma_kernel(const float* __restrict__ s,  // as above
                                                                            int parts,                    //
                                                                            std::int64_t stride,          //
                                                                            const SegmentedCall call,     //
                                                                            const SegmentedTable table,   //
                                                                            std::int64_t N,               // any
                                                                            T* __restrict__ y) {          //
  const SegmentedTile tile = segmented_tile<kSegmentedFew>(call, blockIdx.x);
  const std::int64_t column = std::int64_t(blockIdx.y) * kLoraThreads + threadIdx.x;
  if (tile.adapter < 0 || column >= N) return;
  const SegmentedAdapter& adapter = table.adapters[tile.adapter];
  const int R = adapter.rank;
  if (R == 0) return;
  const F* b = static_cast<const F*>(adapter.b) + column * R;
  float sum[kSegmentedFew] = {};
#pragma unroll 1
  for (int rank = 0; rank < R; ++rank) {
    const float right = as_f32(b[rank]);
#pragma unroll
    for (int i = 0; i < kSegmentedFew; ++i) {
      float left = 0;
      for (int part = 0; part < parts && i < tile.count; ++part)
        left += s[(std::int64_t(part) * call.positions + tile.position + i) * stride + rank];
      sum[i] = __fmaf_rn(left, right, sum[i]);
    }
  }
  const float bias = adapter.bias == nullptr ? 0.0f : adapter.scaling * adapter.bias[column];
#pragma unroll
  for (int i = 0; i < kSegmentedFew; ++i) {
    const std::int64_t row = segmented_row(call, tile, i);
    if (row >= 0) y[row * N + column] = rounded<T>(as_f32(y[row * N + column]) + (sum[i] + bias));
  }
}

template <typename T, typename F>
void launch(const SegmentedLaunch& l, bool mma) {
  check_cuda((segmented_shrink_launch<T, F>(l, mma)), kOp, "launching the first kernel");
  check_cuda((segmented_expand_launch<T, F>(l, mma)), kOp, "launching the second kernel");
}

}  // namespace

template <typename T, typename F>
cudaError_t segmented_expand_launch(const SegmentedLaunch& l, bool mma) {
  const std::int64_t tiles = segmented_tiles(l.call.positions, l.call.adapters, mma ? kSegmentedTile : kSegmentedFew);
  if constexpr (sizeof(T) == 2) {
    if (mma)
      return KLAUNCH((segmented_expand_mma_kernel<T, F>), dim3(unsigned(tiles), unsigned(lora_ceil_div(l.N, kColumns))),
                     kLoraThreads, 0, l.stream, static_cast<const float*>(l.s), int(l.plan.parts), l.plan.stride,
                     l.call, l.table, l.N, static_cast<T*>(l.y));
  }
  return KLAUNCH((segmented_expand_fma_kernel<T, F>), dim3(unsigned(tiles), unsigned(lora_ceil_div(l.N, kLoraThreads))),
                 kLoraThreads, 0, l.stream, static_cast<const float*>(l.s), int(l.plan.parts), l.plan.stride, l.call,
                 l.table, l.N, static_cast<T*>(l.y));
}

void segmented_lora_cuda(const void* x, void* y, DType dtype, std::int64_t K, std::int64_t N,
                         const SegmentedBatch& batch, const std::vector<SegmentedAdapter>& adapters, DType factors,
                         bool tensor_cores, float* workspace, void* stream) {
  const std::int64_t positions = batch.samples * batch.rows, count = std::int64_t(adapters.size());
  std::int64_t max_rank = 0;
  const std::size_t size = dtype == DType::f32 ? 4 : 2;
  bool mma = tensor_cores && size == 2 && lora_vectors(x, K, size) && lora_vectors(y, N, size);
  for (const SegmentedAdapter& adapter : adapters) {
    max_rank = std::max<std::int64_t>(max_rank, adapter.rank);
    mma = mma && is_aligned(adapter.a, 16) && is_aligned(adapter.b, 16);
  }
  if (positions == 0 || N == 0 || max_rank == 0) return;
  check(lora_ceil_div(N, kColumns) <= kMaxGridY && max_rank <= 8 * kMaxGridY, kOp, ": N = ", N, " or rank ", max_rank,
        " is too large for the grid");
  SegmentedLaunch l{x,
                    y,
                    K,
                    N,
                    {},
                    {},
                    segmented_lora_plan(positions, K, max_rank, count),
                    max_rank,
                    workspace,
                    static_cast<cudaStream_t>(stream)};
  for (std::int64_t first = 0; first < count; first += kSegmentedAdapters) {
    const std::int64_t some = std::min<std::int64_t>(kSegmentedAdapters, count - first);
    std::copy_n(adapters.begin() + first, some, l.table.adapters);
    l.call = {batch.order,
              batch.starts + first,
              std::int32_t(some),
              std::int32_t(batch.samples),
              std::int32_t(batch.rows),
              std::int32_t(positions)};
    const bool wide = factors == DType::f32;
    switch (dtype) {
      case DType::f32:
        launch<float, float>(l, mma);
        break;
      case DType::f16:
        wide ? launch<__half, float>(l, mma) : launch<__half, __half>(l, mma);
        break;
      case DType::bf16:
        wide ? launch<__nv_bfloat16, float>(l, mma) : launch<__nv_bfloat16, __nv_bfloat16>(l, mma);
        break;
    }
  }
}

}  // namespace pyfastpeft
