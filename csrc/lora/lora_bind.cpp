// Python's way to the low-rank products. Sizes are checked here, once.
#include "common/bind.h"
#include "lora/lora.h"

namespace pyfastpeft {
namespace {

void check_numel(std::int64_t got, std::int64_t rows, std::int64_t cols, const char* op, const char* name) {
  check(got == rows * cols, op, ": ", name, " has ", got, " values, expected ", rows, " x ", cols);
}

LoraDropout dropout(double p, std::uint64_t seed, const char* op) {
  check(p >= 0.0 && p <= 1.0, op, ": dropout_p is ", p, ", expected a probability from 0 to 1");
  return {p, seed};
}

DType dtype_of(int code, const char* op) {
  check(code >= int(DType::f32) && code <= int(DType::bf16), op, ": dtype code is ", code,
        ", expected 0 (float32), 1 (float16) or 2 (bfloat16)");
  return DType(code);
}

void shrink(Address x, std::int64_t x_numel, int dtype, std::int64_t M, std::int64_t D, Address a, std::int64_t a_numel,
            std::int64_t R, float alpha, double p, std::uint64_t seed, Address s, std::int64_t s_numel) {
  const char* op = "lora_shrink";
  check_numel(x_numel, M, D, op, "x");
  check_numel(a_numel, R, D, op, "a");
  check_numel(s_numel, M, R, op, "s");
  const LoraDropout drop = dropout(p, seed, op);
  const DType x_dtype = dtype_of(dtype, op);
  const void* from = pointer<void>(x, x_numel, op, "x");
  const auto* right = pointer<float>(a, a_numel, op, "a");
  auto* to = pointer<float>(s, s_numel, op, "s");
  const py::gil_scoped_release release;
  lora_shrink_cpu(from, x_dtype, M, D, right, R, alpha, drop, to);
}

void expand(Address s, std::int64_t s_numel, std::int64_t M, std::int64_t R, Address c, std::int64_t c_numel,
            std::int64_t D, double p, std::uint64_t seed, int dtype, Address y, std::int64_t y_numel) {
  const char* op = "lora_expand";
  check_numel(s_numel, M, R, op, "s");
  check_numel(c_numel, R, D, op, "c");
  check_numel(y_numel, M, D, op, "y");
  const LoraDropout drop = dropout(p, seed, op);
  const DType y_dtype = dtype_of(dtype, op);
  const auto* left = pointer<float>(s, s_numel, op, "s");
  const auto* right = pointer<float>(c, c_numel, op, "c");
  void* to = pointer<void>(y, y_numel, op, "y");
  const py::gil_scoped_release release;
  lora_expand_cpu(left, M, R, right, D, drop, y_dtype, to);
}

void accumulate(Address p, std::int64_t p_numel, std::int64_t M, std::int64_t R, Address x, std::int64_t x_numel,
                int dtype, std::int64_t D, double drop_p, std::uint64_t seed, Address g, std::int64_t g_numel) {
  const char* op = "lora_accumulate";
  check_numel(p_numel, M, R, op, "p");
  check_numel(x_numel, M, D, op, "x");
  check_numel(g_numel, R, D, op, "g");
  const LoraDropout drop = dropout(drop_p, seed, op);
  const DType x_dtype = dtype_of(dtype, op);
  const auto* left = pointer<float>(p, p_numel, op, "p");
  const void* right = pointer<void>(x, x_numel, op, "x");
  auto* to = pointer<float>(g, g_numel, op, "g");
  const py::gil_scoped_release release;
  lora_accumulate_cpu(left, M, R, right, x_dtype, D, drop, to);
}

void dropout_values(Address x, std::int64_t begin, std::int64_t count, double p, std::uint64_t seed, Address out) {
  const char* op = "lora_dropout";
  const LoraDropout drop = dropout(p, seed, op);
  const auto* from = pointer<float>(x, count, op, "x");
  auto* to = pointer<float>(out, count, op, "out");
  const py::gil_scoped_release release;
  lora_dropout_cpu(from, begin, count, drop, to);
}

}  // namespace

void register_lora(py::module_& m) {
  m.def("lora_shrink_cpu", &shrink, py::arg("x"), py::arg("x_numel"), py::arg("dtype"), py::arg("M"), py::arg("D"),
        py::arg("a"), py::arg("a_numel"), py::arg("R"), py::arg("alpha"), py::arg("p"), py::arg("seed"), py::arg("s"),
        py::arg("s_numel"));
  m.def("lora_expand_cpu", &expand, py::arg("s"), py::arg("s_numel"), py::arg("M"), py::arg("R"), py::arg("c"),
        py::arg("c_numel"), py::arg("D"), py::arg("p"), py::arg("seed"), py::arg("dtype"), py::arg("y"),
        py::arg("y_numel"));
  m.def("lora_accumulate_cpu", &accumulate, py::arg("p"), py::arg("p_numel"), py::arg("M"), py::arg("R"), py::arg("x"),
        py::arg("x_numel"), py::arg("dtype"), py::arg("D"), py::arg("drop_p"), py::arg("seed"), py::arg("g"),
        py::arg("g_numel"));
  m.def("lora_dropout_cpu", &dropout_values, py::arg("x"), py::arg("begin"), py::arg("count"), py::arg("p"),
        py::arg("seed"), py::arg("out"));
}

}  // namespace pyfastpeft
