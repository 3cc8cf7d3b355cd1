// Every CPU kernel on small and awkward shapes, once per instruction set the machine has: a program for valgrind and the
// sanitizers (build_support/check_memory.sh). Each array has exactly the bytes its kernel may touch and ends where they
// end; each result is compared with the scalar variant's, and bit for bit with that of another number of threads.
//
// Threads are std::thread's here, not OpenMP's: ThreadSanitizer does not see what libgomp's barriers order.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "adamw/adamw.h"
#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "ia3/ia3.h"
#include "lora/lora.h"
#include "nf4/nf4.h"
#include "nf4/nf4_matmul.h"
#include "segmented_lora/segmented_lora.h"

namespace pyfastpeft {
namespace {
int g_threads = 1;
}

// In place of parallel.cpp's, which the linker then leaves in the library; no grain, so that small work is shared too.
int max_threads() { return g_threads; }

void parallel_for_raw(std::int64_t n, std::int64_t, RangeFunction f, void* context) {
  if (n <= 0) return;
  const std::int64_t chunk = (n + g_threads - 1) / g_threads;
  std::vector<std::thread> threads;
  for (std::int64_t begin = chunk; begin < n; begin += chunk)
    threads.emplace_back([=] { f(context, begin, begin + chunk < n ? begin + chunk : n); });
  f(context, 0, chunk < n ? chunk : n);
  for (std::thread& thread : threads) thread.join();
}

namespace {

int g_failures = 0;

// n values of `size` bytes that end where the allocation ends, filled with a pattern of NaNs.
class Buffer {
 public:
  Buffer(std::int64_t n, std::int64_t size) : bytes_(std::size_t(n * size)), data_(new char[bytes_ + (bytes_ == 0)]) {
    std::memset(data_.get(), 0xff, bytes_);
  }
  template <typename T = float>
  T* as() {
    return reinterpret_cast<T*>(data_.get());
  }
  void* get() { return data_.get(); }
  bool same(const Buffer& other) const { return std::memcmp(data_.get(), other.data_.get(), bytes_) == 0; }

 private:
  std::size_t bytes_;
  std::unique_ptr<char[]> data_;
};

std::uint32_t g_state = 1;
float uniform() {  // in [-1, 1)
  g_state = g_state * 1664525u + 1013904223u;
  return float(g_state >> 8) / 8388608.0f - 1.0f;
}

std::int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

Buffer random(std::int64_t n, DType dtype) {
  Buffer buffer(n, size_of(dtype));
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (std::int64_t i = 0; i < n; ++i) buffer.as<T>()[i] = from_f32<T>(uniform());
  });
  return buffer;
}

// The largest difference, relative to the largest expected magnitude.
double difference(Buffer& got, Buffer& expected, std::int64_t n, DType dtype) {
  double most = 0, scale = 1e-30;
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (std::int64_t i = 0; i < n; ++i) {
      const double e = to_f32(expected.as<T>()[i]), d = std::fabs(to_f32(got.as<T>()[i]) - e);
      most = d > most || d != d ? (d != d ? 1e30 : d) : most;
      scale = std::fabs(e) > scale ? std::fabs(e) : scale;
    }
  });
  return most / scale;
}

void expect(bool good, const char* what, std::int64_t M, std::int64_t N, std::int64_t K) {
  if (good) return;
  ++g_failures;
  std::fprintf(stderr, "%s: differs, %s, %d threads, M %lld N %lld K %lld\n", what, cpu_isa_name(cpu_isa()), g_threads,
               static_cast<long long>(M), static_cast<long long>(N), static_cast<long long>(K));
}

// run(out) writes n values; scalar on one thread is the specification, what follows must agree.
template <typename F>
void compare(const char* what, std::int64_t n, DType dtype, double tolerance, std::int64_t M, std::int64_t N,
             std::int64_t K, F run) {
  force_cpu_isa("scalar");
  g_threads = 1;
  Buffer expected(n, size_of(dtype));
  run(expected.get());
  for (int isa = 0; isa <= int(detected_cpu_isa()); ++isa) {
    force_cpu_isa(cpu_isa_name(CpuIsa(isa)));
    g_threads = 1;
    Buffer one(n, size_of(dtype));
    run(one.get());
    expect(difference(one, expected, n, dtype) <= tolerance, what, M, N, K);
    g_threads = 3;
    Buffer three(n, size_of(dtype));
    run(three.get());
    expect(three.same(one), what, M, N, K);
  }
}

struct Shape {
  std::int64_t M, N, K, blocksize, R;
};

void check_4bit(const Shape& shape, DType dtype, QuantType type, bool nested) {
  const auto [M, N, K, blocksize, R] = shape;
  const std::int64_t n = N * K, blocks = block_count(n, blocksize), bytes = packed_bytes(n);
  Buffer weight = random(n, dtype), packed(bytes, 1), absmax(blocks, 4), codes(blocks, 1);
  Buffer nested_absmax(block_count(blocks, kNestedBlocksize), 4), map(kNestedMapSize, 4), offset(1, 4);
  for (int i = 0; i < 256; ++i) map.as()[i] = float(i - 127) / 128.0f;
  *offset.as() = 0.9f;
  for (int isa = int(detected_cpu_isa()); isa >= 0; --isa) {
    force_cpu_isa(cpu_isa_name(CpuIsa(isa)));
    Buffer other(bytes, 1), scales(blocks, 4);
    expect(nf4_quantize_cpu(weight.get(), dtype, n, blocksize, type, other.as<std::uint8_t>(), scales.as()) == -1,
           "quantize", M, N, K);
    if (isa != int(detected_cpu_isa())) expect(other.same(packed) && scales.same(absmax), "quantize", M, N, K);
    packed = std::move(other);
    absmax = std::move(scales);
  }
  Nf4Absmax scales{absmax.as(), nullptr, nullptr, nullptr, nullptr};
  if (nested) {
    nf4_quantize_absmax_cpu(absmax.as(), blocks, *offset.as(), map.as(), codes.as<std::uint8_t>(), nested_absmax.as());
    scales = {nullptr, codes.as<std::uint8_t>(), nested_absmax.as(), map.as(), offset.as()};
  }
  const Nf4Matrix w{packed.as<std::uint8_t>(), scales, N, K, blocksize, type};
  compare("dequantize", n, dtype, 0, M, N, K,
          [&](void* out) { nf4_dequantize_cpu(w.packed, scales, n, blocksize, type, dtype, out); });
  const std::int64_t row = N / 3, rows = N - row, col = K / 3, cols = K - col;
  compare("dequantize_tile", rows * cols, dtype, 0, M, N, K,
          [&](void* out) { nf4_dequantize_tile_cpu(w, row, rows, col, cols, dtype, out); });

  Buffer x = random(M * K, dtype), bias = random(N, DType::f32), s = random(M * R, DType::f32);
  Buffer b = random(N * R, DType::f32);
  const double tolerance = dtype == DType::bf16 ? 2e-2 : dtype == DType::f16 ? 2e-3 : 1e-5;
  compare("matvec", M * N, dtype, tolerance, M, N, K, [&](void* y) {
    nf4_matvec_cpu(w, x.get(), M, N % 2 == 0 ? bias.as() : nullptr, {s.as(), b.as(), R}, dtype, y);
  });
  Buffer dy = random(M * N, dtype), a = random(R * K, DType::f32);
  compare("backward", M * K, dtype, tolerance, M, N, K,
          [&](void* dx) { nf4_backward_cpu(w, dy.get(), M, {s.as(), a.as(), R}, dtype, dx); });
  if (dtype != DType::bf16) return;
  compare("panel", M * N, dtype, tolerance, M, N, K, [&](void* y) {  // where there is none: the other kernel
    const float* const added = N % 2 == 0 ? bias.as() : nullptr;
    if (nf4_panel_available())
      nf4_panel_cpu(w, x.as<bf16>(), M, added, {s.as(), b.as(), R}, static_cast<bf16*>(y));
    else
      nf4_matvec_cpu(w, x.get(), M, added, {s.as(), b.as(), R}, dtype, y);
  });
}

void check_lora(std::int64_t M, std::int64_t D, std::int64_t R, DType dtype, double p) {
  std::vector<std::uint32_t> bits(std::size_t(M * lora_mask_words(D)));
  LoraMaskBits mask;
  if (p > 0) {
    lora_mask_cpu(7, M, D, p, 12345, bits.data());
    mask = {bits.data(), lora_mask_words(D), float(1.0 / (1.0 - p))};
  }
  Buffer x = random(M * D, dtype), a = random(R * D, DType::f32), s = random(M * R, DType::f32);
  const double tolerance = dtype == DType::f32 ? 1e-5 : dtype == DType::f16 ? 2e-3 : 2e-2;
  compare("shrink", M * R, DType::f32, 1e-5, M, R, D, [&](void* out) {
    lora_shrink_cpu(x.get(), dtype, M, D, {a.as(), D, 1}, R, 0.5f, mask, static_cast<float*>(out));
  });
  compare("expand", M * D, dtype, tolerance, M, R, D, [&](void* out) {
    std::memcpy(out, x.get(), std::size_t(M * D * size_of(dtype)));
    lora_expand_cpu(s.as(), M, R, {a.as(), 1, R}, D, mask, dtype, out);
  });
  compare("accumulate", R * D, DType::f32, 1e-5, M, R, D, [&](void* out) {
    lora_accumulate_cpu(s.as(), M, R, x.get(), dtype, D, mask, static_cast<float*>(out), D, 1);
  });
}

// Samples of `rows` rows with three adapters, of ranks R, 0 and R + 3, and one sample without.
void check_segmented_lora(std::int64_t rows, std::int64_t K, std::int64_t N, std::int32_t R, DType dtype,
                          DType factors) {
  const std::int64_t samples = 6;
  const std::int32_t order[] = {5, 3, 0, 1, 4, 2}, starts[] = {1, 3, 3, 6};
  Buffer x = random(samples * rows * K, dtype), y = random(samples * rows * N, dtype), bias = random(N, DType::f32);
  Buffer a = random((R + 3) * K, factors), b = random((R + 3) * N, factors);
  const std::vector<SegmentedAdapter> adapters = {{a.get(), b.get(), bias.as(), 0.5f, R},
                                                  {nullptr, nullptr, nullptr, 1.0f, 0},
                                                  {a.get(), b.get(), nullptr, 2.0f, R + 3}};
  compare("segmented_lora", samples * rows * N, dtype,
          dtype == DType::bf16  ? 2e-2
          : dtype == DType::f16 ? 2e-3
                                : 1e-5,
          rows, N, K, [&](void* out) {
            std::memcpy(out, y.get(), std::size_t(samples * rows * N * size_of(dtype)));
            segmented_lora_cpu(x.get(), out, dtype, K, N, {order, starts, samples, rows}, adapters, factors);
          });
  const std::int64_t sizes[] = {samples * rows * K, R * K, R * N, N, (R + 3) * K, (R + 3) * N};
  for (int which = 0; which < 6; ++which) {
    const DType type = which == 0 ? dtype : which == 3 ? DType::f32 : factors;
    compare("segmented_lora's gradients", sizes[which], type, 2e-2, rows, N, K, [&](void* out) {
      const auto is = [&](int number) { return which == number ? out : nullptr; };
      if (which == 0) std::memset(out, 0, std::size_t(sizes[0] * size_of(dtype)));
      segmented_lora_backward_cpu(y.get(), x.get(), is(0), dtype, K, N, {order, starts, samples, rows}, adapters,
                                  factors, {{is(1), is(2), static_cast<float*>(is(3))}, {}, {is(4), is(5), nullptr}});
    });
  }
}

void check_ia3(std::int64_t M, std::int64_t D, DType dtype) {
  Buffer x = random(M * D, dtype), scale = random(D, DType::f32), grad = random(M * D, dtype);
  compare("ia3_scale", M * D, dtype, 0, M, 0, D,
          [&](void* y) { ia3_scale_cpu(x.get(), scale.as(), y, M, D, D, dtype); });
  compare("ia3 grad_scale", D, DType::f32, 1e-6, M, 0, D, [&](void* out) {
    Buffer grad_x(M * D, size_of(dtype));
    ia3_scale_backward_cpu(grad.get(), x.get(), scale.as(), grad_x.get(), static_cast<float*>(out), M, D, D, D, dtype);
  });
}

void check_adamw(std::int64_t n, DType dtype, bool bits8) {
  Buffer first = random(n, dtype), grad = random(n, DType::f32), map(256, 4);
  for (int i = 0; i < 256; ++i) map.as()[i] = float(i - 127) / 128.0f;
  const std::int64_t blocks = (n + kAdamwBlock - 1) / kAdamwBlock, width = bits8 ? 1 : 4;
  compare(bits8 ? "adamw 8-bit" : "adamw", n, dtype, 1e-2, n, 0, 0, [&](void* param) {
    std::memcpy(param, first.get(), std::size_t(n * size_of(dtype)));
    Buffer m(n, width), v(n, width), scale1(blocks, 4), scale2(blocks, 4), step(1, 4);
    std::memset(m.get(), bits8 ? 127 : 0, std::size_t(n * width));
    std::memset(v.get(), bits8 ? 127 : 0, std::size_t(n * width));
    for (std::int64_t i = 0; i < blocks; ++i) scale1.as()[i] = scale2.as()[i] = 0.0f;
    *step.as() = 0.0f;
    const AdamwTensor tensor{param,
                             grad.get(),
                             m.get(),
                             v.get(),
                             bits8 ? scale1.as() : nullptr,
                             bits8 ? scale2.as() : nullptr,
                             nullptr,
                             step.as(),
                             n,
                             dtype,
                             DType::f32,
                             bits8};
    const AdamwOptions options{1e-2, 0.9, 0.999, 1e-8, 0.01, true, false, 1.0, map.as(), map.as(), nullptr};
    for (int i = 0; i < 2; ++i) adamw_cpu(&tensor, 1, options);
  });
}

}  // namespace
}  // namespace pyfastpeft

int main() {
  using namespace pyfastpeft;
  const DType dtypes[] = {DType::f32, DType::f16, DType::bf16};
  // odd everything; whole groups with half a vector left; more parts than one; blocks over rows; many nested blocks
  const Shape shapes[] = {
      {1, 1, 1, 32, 1},      {3, 7, 33, 64, 0},      {2, 5, 64, 64, 17},   {9, 38, 192, 64, 3},
      {17, 35, 320, 128, 5}, {1, 70, 1088, 64, 16},  {5, 9, 128, 4096, 2}, {0, 3, 64, 64, 1},
      {4, 12, 130, 32, 4},   {50, 150, 448, 64, 35}, {131, 261, 65, 64, 3}};  // panels and chunks of columns, tails of both
  for (const DType dtype : dtypes) {
    for (const Shape& shape : shapes)
      for (const QuantType type : {QuantType::nf4, QuantType::fp4})
        check_4bit(shape, dtype, type, (type == QuantType::nf4) == (shape.N % 2 == 1));
    for (const double p : {0.0, 0.25}) {
      check_lora(1, 1, 1, dtype, p);
      check_lora(7, 67, 5, dtype, p);
      check_lora(130, 35, 17, dtype, p);
      check_lora(3, 1030, 4, dtype, p);
      check_lora(67, 549, 20, dtype, p);
    }
    check_segmented_lora(1, 67, 21, 5, dtype, DType::f32);
    check_segmented_lora(7, 1041, 270, 17, dtype, dtype);
    check_ia3(5, 35, dtype);
    check_ia3(67, 8, dtype);
    for (const std::int64_t n : {std::int64_t{1}, std::int64_t{255}, std::int64_t{1031}})
      for (const bool bits8 : {false, true}) check_adamw(n, dtype, bits8);
  }
  std::printf("%s: %d differences up to %s\n", g_failures == 0 ? "good" : "BAD", g_failures,
              cpu_isa_name(detected_cpu_isa()));
  return g_failures == 0 ? 0 : 1;
}
