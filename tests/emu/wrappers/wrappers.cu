// Each function of csrc/common/kport.cuh's namespace kp in a kernel of its own, one warp: ../test_wrappers.py says in numpy
// what it has to do, and asks the host executor, the PTX interpreter and a GPU.
#include "common/kport.cuh"
#include "wrappers.h"

namespace pyfastpeft {
namespace {

constexpr int kLanes = 32;
constexpr int kGroups = 3;

__global__ void cp_async16_kernel(const unsigned char* in, unsigned char* out) {
  KSHARED(unsigned char, rows, [17][16]);
  const int row = threadIdx.x;
  if (row < 17) kp::cp_async16(rows[row], in + 16 * row, row * 5 % 17);  // every size from 0 to 16; 12 of the last row
  kp::cp_async_commit();
  kp::cp_async_wait<0>();
  __syncthreads();
  if (row < 17)
    for (int i = 0; i < 16; ++i) out[16 * row + i] = rows[16 - row][i];  // what another thread copied
}

template <int kPending>
__global__ void cp_async_wait_kernel(const uint4* in, uint4* out) {
  KSHARED(uint4, rows, [kGroups][kLanes]);
  const int lane = threadIdx.x;
  for (int group = 0; group < kGroups; ++group) {
    kp::cp_async16(&rows[group][lane], in + group * kLanes + lane);
    kp::cp_async_commit();
  }
  kp::cp_async_wait<kPending>();
  for (int group = 0; group < kGroups - kPending; ++group) out[group * kLanes + lane] = rows[group][lane];
  kp::cp_async_wait<0>();
  for (int group = kGroups - kPending; group < kGroups; ++group) out[group * kLanes + lane] = rows[group][lane];
}

template <bool kTranspose>
__global__ void ldmatrix_kernel(const uint4* in, std::uint32_t* out) {
  KSHARED(uint4, rows, [kLanes]);
  const int lane = threadIdx.x;
  rows[lane] = in[lane];
  __syncwarp();
  std::uint32_t r[4];
  kp::ldmatrix_x4<kTranspose>(r, &rows[lane]);
  for (int m = 0; m < 4; ++m) out[4 * lane + m] = r[m];
}

struct Fragments {
  std::uint32_t a[4], b[2];
  float d[4];
};

template <typename T>
__global__ void mma_kernel(const Fragments* in, float* out) {
  const int lane = threadIdx.x;
  std::uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = in[lane].a[i];
  for (int i = 0; i < 2; ++i) b[i] = in[lane].b[i];
  for (int i = 0; i < 4; ++i) d[i] = in[lane].d[i];
  kp::mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = d[i];
}

__global__ void max_magnitude_kernel(const float* in, float* out) {
  out[threadIdx.x] = kp::max_magnitude(in[2 * threadIdx.x], in[2 * threadIdx.x + 1]);
}

template <typename In, typename Out>
int start(void (*kernel)(const In*, Out*), const void* in, void* out, void* stream) {
  return KLAUNCH(kernel, 1, kLanes, 0, static_cast<cudaStream_t>(stream), static_cast<const In*>(in),
                 static_cast<Out*>(out));
}

}  // namespace
}  // namespace pyfastpeft

int run_wrapper(int wrapper, const void* in, void* out, void* stream) {
  using namespace pyfastpeft;
  switch (wrapper) {
    case 0:
      return start(cp_async16_kernel, in, out, stream);
    case 1:
      return start(cp_async_wait_kernel<0>, in, out, stream);
    case 2:
      return start(cp_async_wait_kernel<1>, in, out, stream);
    case 3:
      return start(cp_async_wait_kernel<2>, in, out, stream);
    case 4:
      return start(ldmatrix_kernel<false>, in, out, stream);
    case 5:
      return start(ldmatrix_kernel<true>, in, out, stream);
    case 6:
      return start(mma_kernel<__nv_bfloat16>, in, out, stream);
    case 7:
      return start(mma_kernel<__half>, in, out, stream);
    case 8:
      return start(max_magnitude_kernel, in, out, stream);
    default:
      return -1;
  }
}
