// Python's way to LoRA over a mixed batch. Sizes are checked here, once; what `order` and `starts` say on the CPU too.
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "common/bind.h"
#include "common/cuda_device.h"
#include "segmented_lora/segmented_lora.h"

namespace pyfastpeft {
namespace {

constexpr const char* kOp = "segmented_lora_";

DType dtype_of(int code) {
  check(code >= int(DType::f32) && code <= int(DType::bf16), kOp, ": dtype code is ", code,
        ", expected 0 (float32), 1 (float16) or 2 (bfloat16)");
  return DType(code);
}

std::vector<SegmentedAdapter> read_adapters(const std::vector<Address>& a, const std::vector<Address>& b,
                                            const std::vector<Address>& bias, const std::vector<std::int64_t>& ranks,
                                            const std::vector<float>& scalings, std::int64_t K, std::int64_t N,
                                            DType factors) {
  const std::size_t count = a.size();
  check(b.size() == count && bias.size() == count && ranks.size() == count && scalings.size() == count, kOp, ": ",
        count, " addresses of A, ", b.size(), " of B, ", bias.size(), " of biases, ", ranks.size(), " ranks and ",
        scalings.size(), " scalings, expected as many of each");
  std::vector<SegmentedAdapter> adapters(count);
  for (std::size_t i = 0; i < count; ++i) {
    check(ranks[i] >= 0 && ranks[i] <= INT32_MAX, kOp, ": rank ", ranks[i], " of adapter ", i);
    adapters[i] = {pointer<const void>(a[i], ranks[i] * K, factors, kOp, "lora_a"),
                   pointer<const void>(b[i], ranks[i] * N, factors, kOp, "lora_b"),
                   bias[i] == 0 ? nullptr : pointer<const float>(bias[i], N, kOp, "lora_bias"), scalings[i],
                   std::int32_t(ranks[i])};
  }
  return adapters;
}

SegmentedBatch read_batch(Address order, std::int64_t samples, Address starts, std::int64_t rows,
                          std::size_t adapters) {
  check(samples >= 0 && rows >= 0 && (rows == 0 || samples <= INT32_MAX / rows), kOp, ": ", samples, " samples of ",
        rows, " rows, expected less than 2^31 rows");
  return {pointer<const std::int32_t>(order, samples, kOp, "order"),
          pointer<const std::int32_t>(starts, std::int64_t(adapters) + 1, kOp, "starts"), samples, rows};
}

void check_batch(const SegmentedBatch& batch, std::size_t adapters) {
  for (std::size_t i = 0; i <= adapters; ++i) {
    const std::int64_t least = i == 0 ? 0 : batch.starts[i - 1];
    check(batch.starts[i] >= least && batch.starts[i] <= batch.samples, kOp, ": starts[", i, "] is ", batch.starts[i],
          ", expected rising numbers from 0 to ", batch.samples);
  }
  std::vector<bool> seen(static_cast<std::size_t>(batch.samples));
  for (std::int64_t i = batch.starts[0]; i < batch.starts[adapters]; ++i) {
    const std::int64_t sample = batch.order[i];
    check(sample >= 0 && sample < batch.samples, kOp, ": order[", i, "] is ", sample, ", expected 0 to ",
          batch.samples - 1);
    check(!seen[std::size_t(sample)], kOp, ": sample ", sample, " is twice in order, expected one adapter for each");
    seen[std::size_t(sample)] = true;
  }
}

// Addresses of gradients, 0 where one is not wanted.
std::vector<SegmentedGradients> read_gradients(const std::vector<Address>& a, const std::vector<Address>& b,
                                               const std::vector<Address>& bias,
                                               const std::vector<SegmentedAdapter>& adapters, std::int64_t K,
                                               std::int64_t N, DType factors) {
  const std::size_t count = adapters.size();
  check(a.size() == count && b.size() == count && bias.size() == count, kOp, ": ", count, " adapters and ", a.size(),
        " gradients of A, ", b.size(), " of B and ", bias.size(), " of biases, expected as many of each");
  std::vector<SegmentedGradients> gradients(count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t R = adapters[i].rank;
    gradients[i] = {a[i] == 0 ? nullptr : pointer<void>(a[i], R * K, factors, kOp, "grad_a"),
                    b[i] == 0 ? nullptr : pointer<void>(b[i], R * N, factors, kOp, "grad_b"),
                    bias[i] == 0 ? nullptr : pointer<float>(bias[i], N, kOp, "grad_bias")};
  }
  return gradients;
}

void segmented_cpu(Address x, Address y, int dtype, std::int64_t K, std::int64_t N, Address order, std::int64_t samples,
                   Address starts, std::int64_t rows, const std::vector<Address>& a, const std::vector<Address>& b,
                   const std::vector<Address>& bias, const std::vector<std::int64_t>& ranks,
                   const std::vector<float>& scalings, int factors) {
  const DType type = dtype_of(dtype), factor_type = dtype_of(factors);
  const auto adapters = read_adapters(a, b, bias, ranks, scalings, K, N, factor_type);
  const SegmentedBatch batch = read_batch(order, samples, starts, rows, adapters.size());
  check_batch(batch, adapters.size());
  const void* from = pointer<void>(x, samples * rows * K, kOp, "x");
  void* to = pointer<void>(y, samples * rows * N, kOp, "y");
  const py::gil_scoped_release release;
  segmented_lora_cpu(from, to, type, K, N, batch, adapters, factor_type);
}

void segmented_backward_cpu(Address dy, Address x, Address dx, int dtype, std::int64_t K, std::int64_t N, Address order,
                            std::int64_t samples, Address starts, std::int64_t rows, const std::vector<Address>& a,
                            const std::vector<Address>& b, const std::vector<std::int64_t>& ranks,
                            const std::vector<float>& scalings, int factors, const std::vector<Address>& grad_a,
                            const std::vector<Address>& grad_b, const std::vector<Address>& grad_bias) {
  const DType type = dtype_of(dtype), factor_type = dtype_of(factors);
  const auto adapters = read_adapters(a, b, std::vector<Address>(a.size()), ranks, scalings, K, N, factor_type);
  const auto gradients = read_gradients(grad_a, grad_b, grad_bias, adapters, K, N, factor_type);
  const SegmentedBatch batch = read_batch(order, samples, starts, rows, adapters.size());
  check_batch(batch, adapters.size());
  const void* from = pointer<const void>(dy, samples * rows * N, type, kOp, "grad_y");
  const void* input = pointer<const void>(x, samples * rows * K, type, kOp, "x");
  void* to = dx == 0 ? nullptr : pointer<void>(dx, samples * rows * K, type, kOp, "grad_x");
  const py::gil_scoped_release release;
  segmented_lora_backward_cpu(from, input, to, type, K, N, batch, adapters, factor_type, gradients);
}

#if defined(PYFASTPEFT_WITH_CUDA)
std::int64_t workspace(std::int64_t positions, std::int64_t K, std::int64_t max_rank, std::int64_t adapters) {
  const SegmentedPlan plan = segmented_lora_plan(positions, K, max_rank, adapters);
  return plan.parts * positions * plan.stride;
}

void segmented_cuda(Address x, Address y, int dtype, std::int64_t K, std::int64_t N, Address order,
                    std::int64_t samples, Address starts, std::int64_t rows, const std::vector<Address>& a,
                    const std::vector<Address>& b, const std::vector<Address>& bias,
                    const std::vector<std::int64_t>& ranks, const std::vector<float>& scalings, int factors,
                    bool tensor_cores, Address space, std::int64_t space_numel, int device, Address stream) {
  const DType type = dtype_of(dtype), factor_type = dtype_of(factors);
  check(factor_type == DType::f32 || factor_type == type, kOp, ": factors of dtype code ", factors,
        ", expected 0 (float32) or x's, ", dtype);
  const auto adapters = read_adapters(a, b, bias, ranks, scalings, K, N, factor_type);
  const SegmentedBatch batch = read_batch(order, samples, starts, rows, adapters.size());
  const std::int64_t max_rank = ranks.empty() ? 0 : *std::max_element(ranks.begin(), ranks.end());
  const std::int64_t expected = workspace(samples * rows, K, max_rank, std::int64_t(adapters.size()));
  check(space_numel == expected, kOp, ": workspace has ", space_numel, " values, expected ", expected,
        " as segmented_lora_workspace says");
  const void* from = pointer<const void>(x, samples * rows * K, type, kOp, "x");
  void* to = pointer<void>(y, samples * rows * N, type, kOp, "y");
  auto* s = pointer<float>(space, space_numel, kOp, "workspace");
  const py::gil_scoped_release release;
  const DeviceGuard guard(device, kOp);
  segmented_lora_cuda(from, to, type, K, N, batch, adapters, factor_type, tensor_cores, s,
                      reinterpret_cast<void*>(stream));
}

void segmented_backward_cuda(Address dy, Address x, Address dx, int dtype, std::int64_t K, std::int64_t N,
                             Address order, std::int64_t samples, Address starts, std::int64_t rows,
                             const std::vector<Address>& a, const std::vector<Address>& b,
                             const std::vector<std::int64_t>& ranks, const std::vector<float>& scalings, int factors,
                             const std::vector<Address>& grad_a, const std::vector<Address>& grad_b,
                             const std::vector<Address>& grad_bias, bool tensor_cores, Address space,
                             std::int64_t space_numel, int device, Address stream) {
  const DType type = dtype_of(dtype), factor_type = dtype_of(factors);
  check(factor_type == DType::f32 || factor_type == type, kOp, ": factors of dtype code ", factors,
        ", expected 0 (float32) or x's, ", dtype);
  const auto adapters = read_adapters(a, b, std::vector<Address>(a.size()), ranks, scalings, K, N, factor_type);
  const auto gradients = read_gradients(grad_a, grad_b, grad_bias, adapters, K, N, factor_type);
  const SegmentedBatch batch = read_batch(order, samples, starts, rows, adapters.size());
  const std::int64_t max_rank = ranks.empty() ? 0 : *std::max_element(ranks.begin(), ranks.end());
  const std::int64_t expected =
      segmented_lora_backward_workspace(samples * rows, K, N, max_rank, std::int64_t(adapters.size()));
  check(space_numel == expected, kOp, ": workspace has ", space_numel, " values, expected ", expected,
        " as segmented_lora_backward_workspace says");
  const void* from = pointer<const void>(dy, samples * rows * N, type, kOp, "grad_y");
  const void* input = pointer<const void>(x, samples * rows * K, type, kOp, "x");
  void* to = dx == 0 ? nullptr : pointer<void>(dx, samples * rows * K, type, kOp, "grad_x");
  auto* low = pointer<float>(space, space_numel, kOp, "workspace");
  const py::gil_scoped_release release;
  const DeviceGuard guard(device, kOp);
  segmented_lora_backward_cuda(from, input, to, type, K, N, batch, adapters, factor_type, gradients, tensor_cores, low,
                               reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

void register_segmented_lora(py::module_& m) {
  m.def("segmented_lora_cpu", &segmented_cpu);
  m.def("segmented_lora_backward_cpu", &segmented_backward_cpu);
#if defined(PYFASTPEFT_WITH_CUDA)
  m.def("segmented_lora_workspace", &workspace);
  m.def("segmented_lora_cuda", &segmented_cuda);
  m.def("segmented_lora_backward_workspace", &segmented_lora_backward_workspace);
  m.def("segmented_lora_backward_cuda", &segmented_backward_cuda);
#endif
}

}  // namespace pyfastpeft
