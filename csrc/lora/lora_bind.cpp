// Python's way to the low-rank products. Sizes are checked here, once.
#include "common/bind.h"
#include "common/cuda_device.h"
#include "lora/lora.h"

namespace pyfastpeft {
namespace {

void check_numel(std::int64_t got, std::int64_t rows, std::int64_t cols, const char* op, const char* name) {
  check(got == rows * cols, op, ": ", name, " has ", got, " values, expected ", rows, " x ", cols);
}

void check_probability(double p, const char* op) {
  check(p >= 0.0 && p <= 1.0, op, ": dropout_p is ", p, ", expected a probability from 0 to 1");
}

// No bits where there is no dropout.
LoraMaskBits mask_of(Address bits, std::int64_t numel, double p, std::int64_t M, std::int64_t D, const char* op) {
  check_probability(p, op);
  if (p == 0.0) return {};
  const std::int64_t words = lora_mask_words(D);
  check_numel(numel, M, words, op, "mask");
  return {pointer<const std::uint32_t>(bits, numel, op, "mask"), words, p < 1.0 ? float(1.0 / (1.0 - p)) : 0.0f};
}

DType dtype_of(int code, const char* op) {
  check(code >= int(DType::f32) && code <= int(DType::bf16), op, ": dtype code is ", code,
        ", expected 0 (float32), 1 (float16) or 2 (bfloat16)");
  return DType(code);
}

void mask(std::uint64_t begin, std::int64_t M, std::int64_t D, double p, std::uint64_t seed, Address bits,
          std::int64_t numel) {
  const char* op = "lora_mask";
  check_probability(p, op);
  check_numel(numel, M, lora_mask_words(D), op, "mask");
  auto* to = pointer<std::uint32_t>(bits, numel, op, "mask");
  const py::gil_scoped_release release;
  lora_mask_cpu(begin, M, D, p, seed, to);
}

void shrink(Address x, std::int64_t x_numel, int dtype, std::int64_t M, std::int64_t D, Address a, std::int64_t a_numel,
            std::int64_t a_rank_stride, std::int64_t a_column_stride, std::int64_t R, float alpha, Address bits,
            std::int64_t bits_numel, double p, Address s, std::int64_t s_numel) {
  const char* op = "lora_shrink";
  check_numel(x_numel, M, D, op, "x");
  check_numel(a_numel, R, D, op, "a");
  check_numel(s_numel, M, R, op, "s");
  const LoraMaskBits kept = mask_of(bits, bits_numel, p, M, D, op);
  const DType x_dtype = dtype_of(dtype, op);
  const void* from = pointer<void>(x, x_numel, op, "x");
  const LoraFactor factor{pointer<const float>(a, a_numel, op, "a"), a_rank_stride, a_column_stride};
  auto* to = pointer<float>(s, s_numel, op, "s");
  const py::gil_scoped_release release;
  lora_shrink_cpu(from, x_dtype, M, D, factor, R, alpha, kept, to);
}

void expand(Address s, std::int64_t s_numel, std::int64_t M, std::int64_t R, Address c, std::int64_t c_numel,
            std::int64_t c_rank_stride, std::int64_t c_column_stride, std::int64_t D, Address bits,
            std::int64_t bits_numel, double p, int dtype, Address y, std::int64_t y_numel) {
  const char* op = "lora_expand";
  check_numel(s_numel, M, R, op, "s");
  check_numel(c_numel, R, D, op, "c");
  check_numel(y_numel, M, D, op, "y");
  const LoraMaskBits kept = mask_of(bits, bits_numel, p, M, D, op);
  const DType y_dtype = dtype_of(dtype, op);
  const auto* left = pointer<float>(s, s_numel, op, "s");
  const LoraFactor factor{pointer<const float>(c, c_numel, op, "c"), c_rank_stride, c_column_stride};
  void* to = pointer<void>(y, y_numel, op, "y");
  const py::gil_scoped_release release;
  lora_expand_cpu(left, M, R, factor, D, kept, y_dtype, to);
}

void accumulate(Address p, std::int64_t p_numel, std::int64_t M, std::int64_t R, Address x, std::int64_t x_numel,
                int dtype, std::int64_t D, Address bits, std::int64_t bits_numel, double drop_p, Address g,
                std::int64_t g_numel, std::int64_t g_rank_stride, std::int64_t g_column_stride) {
  const char* op = "lora_accumulate";
  check_numel(p_numel, M, R, op, "p");
  check_numel(x_numel, M, D, op, "x");
  check_numel(g_numel, R, D, op, "g");
  const LoraMaskBits kept = mask_of(bits, bits_numel, drop_p, M, D, op);
  const DType x_dtype = dtype_of(dtype, op);
  const auto* left = pointer<float>(p, p_numel, op, "p");
  const void* right = pointer<void>(x, x_numel, op, "x");
  auto* to = pointer<float>(g, g_numel, op, "g");
  const py::gil_scoped_release release;
  lora_accumulate_cpu(left, M, R, right, x_dtype, D, kept, to, g_rank_stride, g_column_stride);
}

#if defined(PYFASTPEFT_WITH_CUDA)
void check_workspace(std::int64_t got, std::int64_t expected, const char* op) {
  check(got == expected, op, ": workspace has ", got, " values, expected ", expected, " as ", op, "_workspace says");
}

LoraDropoutCuda device_dropout(double p, Address seed, const char* op) {
  check_probability(p, op);
  return {p, p > 0 ? pointer<const std::int64_t>(seed, 1, op, "seed") : nullptr};
}

void shrink_cuda(Address x, std::int64_t x_numel, int dtype, std::int64_t M, std::int64_t D, Address a,
                 std::int64_t a_numel, std::int64_t a_rank_stride, std::int64_t a_column_stride, std::int64_t R,
                 float alpha, double p, Address seed, bool tensor_cores, Address workspace,
                 std::int64_t workspace_numel, Address s, std::int64_t s_numel, int device, Address stream) {
  const char* op = "lora_shrink";
  check_numel(x_numel, M, D, op, "x");
  check_numel(a_numel, R, D, op, "a");
  check_numel(s_numel, M, R, op, "s");
  check_workspace(workspace_numel, lora_shrink_workspace(M, D, R), op);
  const DType x_dtype = dtype_of(dtype, op);
  const LoraDropoutCuda drop = device_dropout(p, seed, op);
  const LoraFactor factor{pointer<const float>(a, a_numel, op, "a"), a_rank_stride, a_column_stride};
  const void* from = pointer<const void>(x, x_numel, x_dtype, op, "x");
  auto* space = pointer<float>(workspace, workspace_numel, op, "workspace");
  auto* to = pointer<float>(s, s_numel, op, "s");
  const py::gil_scoped_release release;
  const DeviceGuard guard(device, op);
  lora_shrink_cuda(from, x_dtype, M, D, factor, R, alpha, drop, tensor_cores, space, to,
                   reinterpret_cast<void*>(stream));
}

void expand_cuda(Address s, std::int64_t s_numel, std::int64_t M, std::int64_t R, Address c, std::int64_t c_numel,
                 std::int64_t c_rank_stride, std::int64_t c_column_stride, std::int64_t D, double p, Address seed,
                 bool tensor_cores, bool add, Address bias, std::int64_t bias_numel, int dtype, Address y,
                 std::int64_t y_numel, int device, Address stream) {
  const char* op = "lora_expand";
  check_numel(s_numel, M, R, op, "s");
  check_numel(c_numel, R, D, op, "c");
  check_numel(y_numel, M, D, op, "y");
  check(bias_numel == 0 || (!add && bias_numel == D), op, ": bias has ", bias_numel, " values, expected ", D,
        ", or none where y is added to");
  const DType y_dtype = dtype_of(dtype, op);
  const LoraDropoutCuda drop = device_dropout(p, seed, op);
  const auto* left = pointer<const float>(s, s_numel, op, "s");
  const LoraFactor factor{pointer<const float>(c, c_numel, op, "c"), c_rank_stride, c_column_stride};
  const auto* offset = bias_numel > 0 ? pointer<const float>(bias, bias_numel, op, "bias") : nullptr;
  void* to = pointer<void>(y, y_numel, y_dtype, op, "y");
  const py::gil_scoped_release release;
  const DeviceGuard guard(device, op);
  lora_expand_cuda(left, M, R, factor, D, drop, tensor_cores, add, offset, y_dtype, to,
                   reinterpret_cast<void*>(stream));
}

void accumulate_cuda(Address p, std::int64_t p_numel, std::int64_t M, std::int64_t R, Address x, std::int64_t x_numel,
                     int dtype, std::int64_t D, double drop_p, Address seed, bool tensor_cores, Address workspace,
                     std::int64_t workspace_numel, Address g, std::int64_t g_numel, std::int64_t g_rank_stride,
                     std::int64_t g_column_stride, int device, Address stream) {
  const char* op = "lora_accumulate";
  check_numel(p_numel, M, R, op, "p");
  check_numel(x_numel, M, D, op, "x");
  check_numel(g_numel, R, D, op, "g");
  check_workspace(workspace_numel, lora_accumulate_workspace(M, D, R), op);
  const DType x_dtype = dtype_of(dtype, op);
  const LoraDropoutCuda drop = device_dropout(drop_p, seed, op);
  const auto* left = pointer<const float>(p, p_numel, op, "p");
  const void* right = pointer<const void>(x, x_numel, x_dtype, op, "x");
  auto* space = pointer<float>(workspace, workspace_numel, op, "workspace");
  auto* to = pointer<float>(g, g_numel, op, "g");
  const py::gil_scoped_release release;
  const DeviceGuard guard(device, op);
  lora_accumulate_cuda(left, M, R, right, x_dtype, D, drop, tensor_cores, space, to, g_rank_stride, g_column_stride,
                       reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

void register_lora(py::module_& m) {
  m.def("lora_mask_cpu", &mask, py::arg("begin"), py::arg("M"), py::arg("D"), py::arg("p"), py::arg("seed"),
        py::arg("bits"), py::arg("bits_numel"));
  m.def("lora_shrink_cpu", &shrink, py::arg("x"), py::arg("x_numel"), py::arg("dtype"), py::arg("M"), py::arg("D"),
        py::arg("a"), py::arg("a_numel"), py::arg("a_rank_stride"), py::arg("a_column_stride"), py::arg("R"),
        py::arg("alpha"), py::arg("bits"), py::arg("bits_numel"), py::arg("p"), py::arg("s"), py::arg("s_numel"));
  m.def("lora_expand_cpu", &expand, py::arg("s"), py::arg("s_numel"), py::arg("M"), py::arg("R"), py::arg("c"),
        py::arg("c_numel"), py::arg("c_rank_stride"), py::arg("c_column_stride"), py::arg("D"), py::arg("bits"),
        py::arg("bits_numel"), py::arg("p"), py::arg("dtype"), py::arg("y"), py::arg("y_numel"));
  m.def("lora_accumulate_cpu", &accumulate, py::arg("p"), py::arg("p_numel"), py::arg("M"), py::arg("R"), py::arg("x"),
        py::arg("x_numel"), py::arg("dtype"), py::arg("D"), py::arg("bits"), py::arg("bits_numel"), py::arg("drop_p"),
        py::arg("g"), py::arg("g_numel"), py::arg("g_rank_stride"), py::arg("g_column_stride"));
#if defined(PYFASTPEFT_WITH_CUDA)
  m.def("lora_shrink_workspace", &lora_shrink_workspace);
  m.def("lora_accumulate_workspace", &lora_accumulate_workspace);
  m.def("lora_shrink_cuda", &shrink_cuda);
  m.def("lora_expand_cuda", &expand_cuda);
  m.def("lora_accumulate_cuda", &accumulate_cuda);
#endif
}

}  // namespace pyfastpeft
