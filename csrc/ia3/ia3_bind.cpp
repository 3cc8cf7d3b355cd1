// Python's way to the (IA)³ kernels. Shapes are checked by pyfastpeft/ops/ia3.py; here that no pointer is null.
#include "common/bind.h"
#include "ia3/ia3.h"

namespace pyfastpeft {
namespace {

DType dtype_of(int code, const char* op) {
  check(code >= int(DType::f32) && code <= int(DType::bf16), op, ": dtype code is ", code,
        ", expected 0 (float32), 1 (float16) or 2 (bfloat16)");
  return DType(code);
}

void check_matrix(std::int64_t M, std::int64_t D, std::int64_t stride, const char* op, const char* name) {
  check(M >= 0 && D >= 0, op, ": ", name, " is [", M, ", ", D, "]");
  check(M <= 1 || stride >= D, op, ": ", name, " has row stride ", stride, ", expected at least D = ", D);
}

void scale(Address x, Address scale, Address y, std::int64_t M, std::int64_t D, std::int64_t x_stride, int dtype) {
  const char* op = "ia3_scale";
  check_matrix(M, D, x_stride, op, "x");
  const DType type = dtype_of(dtype, op);
  const void* px = pointer<void>(x, M * D, op, "x");
  const float* ps = pointer<float>(scale, D, op, "scale");
  void* py_ = pointer<void>(y, M * D, op, "output");
  const py::gil_scoped_release release;
  ia3_scale_cpu(px, ps, py_, M, D, x_stride, type);
}

// grad_x or grad_scale 0: not wanted
void backward(Address grad_y, Address x, Address scale, Address grad_x, Address grad_scale, std::int64_t M,
              std::int64_t D, std::int64_t grad_stride, std::int64_t x_stride, int dtype) {
  const char* op = "ia3_scale_backward";
  check_matrix(M, D, grad_stride, op, "grad_output");
  check_matrix(M, D, x_stride, op, "x");
  const DType type = dtype_of(dtype, op);
  const void* pg = pointer<void>(grad_y, M * D, op, "grad_output");
  const void* px = pointer<void>(x, grad_scale != 0 ? M * D : 0, op, "x");
  const float* ps = pointer<float>(scale, D, op, "scale");
  const py::gil_scoped_release release;
  ia3_scale_backward_cpu(pg, px, ps, reinterpret_cast<void*>(grad_x), reinterpret_cast<float*>(grad_scale), M, D,
                         grad_stride, x_stride, type);
}

}  // namespace

void register_ia3(py::module_& m) {
  m.def("ia3_scale_cpu", &scale);
  m.def("ia3_scale_backward_cpu", &backward);
}

}  // namespace pyfastpeft
