// Python's way to the (IA)³ kernels. Shapes are checked by pyfastpeft/ops/ia3.py; here that no pointer is null.
#include "common/bind.h"
#include "common/cuda_device.h"
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

#if defined(PYFASTPEFT_WITH_CUDA)
// Values from the first to the last of a matrix whose rows lie `stride` apart.
std::int64_t span(std::int64_t M, std::int64_t D, std::int64_t stride) {
  return M == 0 || D == 0 ? 0 : (M - 1) * stride + D;
}

DType scale_dtype(DType type, bool scale_is_f32) { return scale_is_f32 ? DType::f32 : type; }

void scale_cuda(Address x, Address scale, bool scale_is_f32, Address y, std::int64_t M, std::int64_t D,
                std::int64_t x_stride, int dtype, int device, Address stream) {
  const char* op = "ia3_scale";
  check_matrix(M, D, x_stride, op, "x");
  const DType type = dtype_of(dtype, op);
  const void* from = pointer<const void>(x, span(M, D, x_stride), type, op, "x");
  const void* factors = pointer<const void>(scale, D, scale_dtype(type, scale_is_f32), op, "scale");
  void* to = pointer<void>(y, M * D, type, op, "output");
  const py::gil_scoped_release release;
  const DeviceGuard guard(device, op);
  ia3_scale_cuda(from, factors, scale_is_f32, to, M, D, x_stride, type, reinterpret_cast<void*>(stream));
}

std::int64_t backward_workspace(std::int64_t M, std::int64_t D, int dtype) {
  return ia3_scale_backward_workspace(M, D, dtype_of(dtype, "ia3_scale_backward"));
}

// grad_x or grad_scale 0: not wanted
void backward_cuda(Address grad_y, Address x, Address scale, bool scale_is_f32, Address grad_x, Address grad_scale,
                   Address workspace, std::int64_t workspace_numel, std::int64_t M, std::int64_t D,
                   std::int64_t grad_stride, std::int64_t x_stride, int dtype, int device, Address stream) {
  const char* op = "ia3_scale_backward";
  check_matrix(M, D, grad_stride, op, "grad_output");
  check_matrix(M, D, x_stride, op, "x");
  const DType type = dtype_of(dtype, op);
  const std::int64_t expected = ia3_scale_backward_workspace(M, D, type);
  check(workspace_numel == expected || grad_scale == 0, op, ": workspace has ", workspace_numel, " values, expected ",
        expected);
  const void* grad = pointer<const void>(grad_y, span(M, D, grad_stride), type, op, "grad_output");
  const void* values = pointer<const void>(x, grad_scale != 0 ? span(M, D, x_stride) : 0, type, op, "x");
  const void* factors = pointer<const void>(scale, D, scale_dtype(type, scale_is_f32), op, "scale");
  void* to_x = pointer<void>(grad_x, grad_x != 0 ? M * D : 0, type, op, "grad_x");
  void* to_scale =
      pointer<void>(grad_scale, grad_scale != 0 ? D : 0, scale_dtype(type, scale_is_f32), op, "grad_scale");
  auto* space = pointer<float>(workspace, workspace_numel, op, "workspace");
  const py::gil_scoped_release release;
  const DeviceGuard guard(device, op);
  ia3_scale_backward_cuda(grad, values, factors, scale_is_f32, to_x, to_scale, space, M, D, grad_stride, x_stride, type,
                          reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

void register_ia3(py::module_& m) {
  m.def("ia3_scale_cpu", &scale);
  m.def("ia3_scale_backward_cpu", &backward);
#if defined(PYFASTPEFT_WITH_CUDA)
  m.def("ia3_scale_cuda", &scale_cuda);
  m.def("ia3_scale_backward_workspace", &backward_workspace);
  m.def("ia3_scale_backward_cuda", &backward_cuda);
#endif
}

}  // namespace pyfastpeft
