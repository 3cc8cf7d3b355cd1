// dX of the 4-bit matmul on the CPU: launcher, thread split, and the scalar variant.
#include <algorithm>
#include <cstring>
#include <memory>

#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "nf4/nf4_backward_kernel.h"

namespace pyfastpeft {

const Nf4BackwardVariant nf4_backward_f32_scalar = nf4_backward_variant<BackwardF32Any<VecScalar>>(256);

namespace {

const Nf4BackwardVariant& variant([[maybe_unused]] DType dtype, [[maybe_unused]] std::int64_t M) {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
#if defined(PYFASTPEFT_HAS_AMX)
  // a tile has 16 tokens, filled or not
  if (isa >= CpuIsa::amx && dtype == DType::bf16 && M >= kNf4AmxTokens) return nf4_backward_bf16_amx;
#endif
  if (isa >= CpuIsa::avx512) return dtype == DType::bf16 ? nf4_backward_bf16_avx512 : nf4_backward_f32_avx512;
  if (isa >= CpuIsa::avx2) return nf4_backward_f32_avx2;
#endif
  return nf4_backward_f32_scalar;
}

constexpr std::int64_t kBytes = 4 << 20;        // of packed dY at a time, and little more
constexpr std::int64_t kGrain = 1 << 20;        // products, below which a second thread costs more than it brings
constexpr std::int64_t kGrainPacked = 1 << 16;  // the same for values to pack

}  // namespace

void nf4_backward_cpu(const Nf4Matrix& w, const void* dy, std::int64_t M, const Nf4BackwardLowRank& low, DType dtype,
                      void* dx) {
  const std::int64_t itemsize = dtype == DType::f32 ? 4 : 2;
  if (M == 0 || w.K == 0) return;
  if (w.N == 0) {
    std::memset(dx, 0, std::size_t(M * w.K * itemsize));
    return;
  }
  const Nf4BackwardVariant& way = variant(dtype, M);
  const std::int64_t low_rank = (w.N + way.pad - 1) / way.pad * way.pad;
  const std::int64_t terms = low_rank + (low.R + way.pad - 1) / way.pad * way.pad;
  const std::int64_t token_bytes = (terms + way.chunk - 1) / way.chunk * way.stride * way.size;
  const std::int64_t step =
      std::min(M, std::min(way.tokens, std::max<std::int64_t>(kBytes / token_bytes / 32 * 32, 64)));
  const std::unique_ptr<char[]> space(new char[std::size_t(nf4_backward_tokens(step) * token_bytes + 64)]);
  char* const u = space.get() + (64 - reinterpret_cast<std::uintptr_t>(space.get()) % 64) % 64;
  for (std::int64_t m = 0; m < M; m += step) {
    const Nf4BackwardArgs args{&w,
                               static_cast<const char*>(dy) + m * w.N * itemsize,
                               std::min(step, M - m),
                               dtype,
                               low.R > 0 ? low.ds + m * low.R : nullptr,
                               low.a,
                               low.R,
                               low_rank,
                               terms,
                               u,
                               static_cast<char*>(dx) + m * w.K * itemsize};
    parallel_for(nf4_backward_tokens(args.M), kGrainPacked / terms + 1,
                 [&](std::int64_t begin, std::int64_t end) { way.pack(args, begin, end); });
    parallel_for((w.K + kNf4Group - 1) / kNf4Group, kGrain / (kNf4Group * terms * args.M) + 1,
                 [&](std::int64_t begin, std::int64_t end) { way.columns(args, begin, end); });
  }
}

}  // namespace pyfastpeft
