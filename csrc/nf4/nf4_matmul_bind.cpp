// Python's way to the 4-bit matmul. A quantised weight arrives as its addresses and sizes and is checked once.
#include "nf4/nf4_bind.h"
#include "nf4/nf4_matmul.h"
#if defined(PYFASTPEFT_WITH_CUDA)
#include "common/cuda_device.h"
#include "nf4/nf4_matmul_cuda.h"
#endif

namespace pyfastpeft {
namespace {

// The weight [N, K] as Python hands it over; kept alive by the caller for the length of the call.
struct PackedWeight {
  Nf4Matrix matrix;
};

PackedWeight packed_weight(Address packed, std::int64_t packed_numel, Address absmax, std::int64_t absmax_numel,
                           Address nested_absmax, std::int64_t nested_numel, Address nested_map, std::int64_t map_numel,
                           Address offset, std::int64_t N, std::int64_t K, std::int64_t blocksize,
                           const std::string& type) {
  const char* op = "linear_4bit";
  check(N >= 0 && K >= 0, op, ": the weight's shape is [", N, ", ", K, "]");
  check_blocksize(blocksize, op);
  const std::int64_t n = N * K, blocks = block_count(n, blocksize);
  check_count(packed_numel, packed_bytes(n), op, "packed", message("(", N, "·", K, " + 1) / 2 bytes"));
  const Nf4Absmax scales =
      checked_absmax(absmax, absmax_numel, nested_absmax, nested_numel, nested_map, map_numel, offset, blocks,
                     message("ceil(", N, "·", K, " / blocksize ", blocksize, ")"), op);
  return {
      {pointer<const std::uint8_t>(packed, packed_numel, op, "packed"), scales, N, K, blocksize, quant_type(type, op)}};
}

void dequantize_tile(const PackedWeight& w, std::int64_t row, std::int64_t rows, std::int64_t col, std::int64_t cols,
                     int dtype, Address out, std::int64_t out_numel) {
  const char* op = "linear_4bit";
  const Nf4Matrix& m = w.matrix;
  check(row >= 0 && rows >= 0 && row + rows <= m.N && col >= 0 && cols >= 0 && col + cols <= m.K, op, ": the tile [",
        row, ":", row + rows, ", ", col, ":", col + cols, "] is not inside the weight [", m.N, ", ", m.K, "]");
  check_count(out_numel, rows * cols, op, "out", "the tile's");
  const DType out_dtype = dtype_of(dtype, op);
  void* o = pointer<void>(out, out_numel, op, "out");
  const py::gil_scoped_release release;
  nf4_dequantize_tile_cpu(m, row, rows, col, cols, out_dtype, o);
}

// Both CPU products take the same arguments; kPanel says which one runs.
template <bool kPanel>
void product(const PackedWeight& w, Address x, std::int64_t x_numel, std::int64_t M, Address bias,
             std::int64_t bias_numel, Address s, std::int64_t s_numel, Address b, std::int64_t b_numel, std::int64_t R,
             int dtype, Address y, std::int64_t y_numel) {
  const char* op = "linear_4bit";
  const Nf4Matrix& m = w.matrix;
  check_count(x_numel, M * m.K, op, "x", "M·K");
  check_count(y_numel, M * m.N, op, "y", "M·N");
  if (bias != 0) check_count(bias_numel, m.N, op, "bias", "N");
  Nf4LowRank low{};
  if (R > 0) {
    check_count(s_numel, M * R, op, "s", "M·R");
    check_count(b_numel, m.N * R, op, "lora_b", "N·R");
    low = {pointer<const float>(s, s_numel, op, "s"), pointer<const float>(b, b_numel, op, "lora_b"), R};
  }
  const DType x_dtype = dtype_of(dtype, op);
  if constexpr (kPanel) check(x_dtype == DType::bf16, op, ": the panel kernel multiplies bfloat16 alone");
  const void* from = pointer<void>(x, x_numel, op, "x");
  void* to = pointer<void>(y, y_numel, op, "y");
  const py::gil_scoped_release release;
  const float* const added = reinterpret_cast<const float*>(bias);
  if constexpr (kPanel)
    nf4_panel_cpu(m, static_cast<const bf16*>(from), M, added, low, static_cast<bf16*>(to));
  else
    nf4_matvec_cpu(m, from, M, added, low, x_dtype, to);
}

void backward(const PackedWeight& w, Address dy, std::int64_t dy_numel, std::int64_t M, Address ds,
              std::int64_t ds_numel, Address a, std::int64_t a_numel, std::int64_t R, int dtype, Address dx,
              std::int64_t dx_numel) {
  const char* op = "linear_4bit_backward";
  const Nf4Matrix& m = w.matrix;
  check_count(dy_numel, M * m.N, op, "grad_output", "M·N");
  check_count(dx_numel, M * m.K, op, "grad_x", "M·K");
  Nf4BackwardLowRank low{};
  if (R > 0) {
    check_count(ds_numel, M * R, op, "ds", "M·R");
    check_count(a_numel, R * m.K, op, "lora_a", "R·K");
    low = {pointer<const float>(ds, ds_numel, op, "ds"), pointer<const float>(a, a_numel, op, "lora_a"), R};
  }
  const DType grad_dtype = dtype_of(dtype, op);
  const void* from = pointer<void>(dy, dy_numel, op, "grad_output");
  void* to = pointer<void>(dx, dx_numel, op, "grad_x");
  const py::gil_scoped_release release;
  nf4_backward_cpu(m, from, M, low, grad_dtype, to);
}

#if defined(PYFASTPEFT_WITH_CUDA)
std::int64_t matmul_workspace(std::int64_t M, std::int64_t N, std::int64_t K) {
  check(M >= 0 && N >= 0 && K >= 0, "linear_4bit: sizes ", M, ", ", N, ", ", K, " of M, N, K, expected none below 0");
  return N == 0 ? 0 : nf4_matmul_workspace(M, N, K);
}

// Both fused kernels take the same arguments; kMatmul says which one runs.
template <bool kMatmul>
void fused(Address packed, std::int64_t packed_numel, Address absmax, std::int64_t absmax_numel, Address nested_absmax,
           std::int64_t nested_numel, Address nested_map, std::int64_t map_numel, Address offset, std::int64_t N,
           std::int64_t K, std::int64_t blocksize, const std::string& type, Address x, std::int64_t x_numel,
           std::int64_t M, int dtype, Address s, std::int64_t s_numel, Address a, std::int64_t a_numel, float a_scaling,
           Address b, std::int64_t b_numel, std::int64_t b_row_stride, std::int64_t b_rank_stride, std::int64_t R,
           Address bias, std::int64_t bias_numel, Address scale, std::int64_t scale_numel, Address workspace,
           std::int64_t workspace_numel, Address y, std::int64_t y_numel, int device, Address stream) {
  const char* op = "linear_4bit";
  const Nf4Matrix w = packed_weight(packed, packed_numel, absmax, absmax_numel, nested_absmax, nested_numel, nested_map,
                                    map_numel, offset, N, K, blocksize, type)
                          .matrix;
  const DType x_dtype = dtype_of(dtype, op);
  check(K > 0 && K % kNf4RowMultiple == 0, op, ": the fused kernels take rows of a multiple of ", kNf4RowMultiple,
        " values, got K = ", K);
  check(nf4_fits_kernels(N, K), op, ": a weight [", N, ", ", K, "], expected sides up to 2^30 and at most 2^37 values");
  check(M >= 0 && (!kMatmul || M <= kNf4MatmulRows), op, ": M is ", M, ", expected 0 to ", kNf4MatmulRows);
  check(packed % 16 == 0 && x % 16 == 0, op, ": packed and x must begin at multiples of 16 bytes");
  check_count(x_numel, M * K, op, "x", "M·K");
  check_count(y_numel, M * N, op, "y", "M·N");
  Nf4Epilogue epilogue{};
  if (bias != 0) {
    check_count(bias_numel, N, op, "bias", "N");
    epilogue.bias = pointer<const float>(bias, N, op, "bias");
  }
  if (scale != 0) {
    check_count(scale_numel, N, op, "scale", "N");
    epilogue.scale = pointer<const float>(scale, N, op, "scale");
  }
  if (R > 0) {
    if (a != 0) {
      check(!kMatmul && R <= kNf4ShrinkRanks && s == 0, op, ": lora_a of ", R, " ranks, expected at most ",
            kNf4ShrinkRanks, " in nf4_matvec_cuda and no s");
      check_count(a_numel, R * K, op, "lora_a", "R·K");
      check(a % 16 == 0, op, ": lora_a must begin at a multiple of 16 bytes");
      epilogue.a = pointer<const float>(a, a_numel, op, "lora_a");
      epilogue.a_scaling = a_scaling;
    } else {
      check_count(s_numel, M * R, op, "s", "M·R");
      epilogue.s = pointer<const float>(s, s_numel, op, "s");
    }
    check_count(b_numel, N * R, op, "lora_b", "N·R");
    const bool dense =
        (b_rank_stride == 1 && b_row_stride == R) || (b_row_stride == 1 && b_rank_stride == N) || N == 1 || R == 1;
    check(dense, op, ": lora_b has strides ", b_row_stride, ", ", b_rank_stride, ", expected a dense [", N, ", ", R,
          "]");
    epilogue.b = pointer<const float>(b, b_numel, op, "lora_b");
    epilogue.b_row_stride = R == 1 && N > 1 ? 1 : b_row_stride;
    epilogue.b_rank_stride = N == 1 && R > 1 ? 1 : b_rank_stride;
    epilogue.R = R;
  }
  const void* from = pointer<const void>(x, x_numel, x_dtype, op, "x");
  void* to = pointer<void>(y, y_numel, x_dtype, op, "y");
  float* space = nullptr;
  if constexpr (kMatmul) {
    check_count(workspace_numel, matmul_workspace(M, N, K), op, "workspace", "nf4_matmul_workspace");
    space = pointer<float>(workspace, workspace_numel, op, "workspace");
  }
  const py::gil_scoped_release release;
  const DeviceGuard guard(device, op);
  if constexpr (kMatmul)
    nf4_matmul_cuda(w, from, M, x_dtype, epilogue, space, to, reinterpret_cast<void*>(stream));
  else
    nf4_matvec_cuda(w, from, M, x_dtype, epilogue, to, reinterpret_cast<void*>(stream));
}

template <typename F>
void define_fused(py::module_& m, const char* name, F f) {
  m.def(name, f, py::arg("packed"), py::arg("packed_numel"), py::arg("absmax"), py::arg("absmax_numel"),
        py::arg("nested_absmax"), py::arg("nested_numel"), py::arg("nested_map"), py::arg("map_numel"),
        py::arg("offset"), py::arg("N"), py::arg("K"), py::arg("blocksize"), py::arg("quant_type"), py::arg("x"),
        py::arg("x_numel"), py::arg("M"), py::arg("dtype"), py::arg("s"), py::arg("s_numel"), py::arg("a"),
        py::arg("a_numel"), py::arg("a_scaling"), py::arg("b"), py::arg("b_numel"), py::arg("b_row_stride"),
        py::arg("b_rank_stride"), py::arg("R"), py::arg("bias"), py::arg("bias_numel"), py::arg("scale"),
        py::arg("scale_numel"), py::arg("workspace"), py::arg("workspace_numel"), py::arg("y"), py::arg("y_numel"),
        py::arg("device"), py::arg("stream"));
}
#endif

template <typename F>
void define_product(py::module_& m, const char* name, F f) {
  m.def(name, f, py::arg("weight"), py::arg("x"), py::arg("x_numel"), py::arg("M"), py::arg("bias"),
        py::arg("bias_numel"), py::arg("s"), py::arg("s_numel"), py::arg("b"), py::arg("b_numel"), py::arg("R"),
        py::arg("dtype"), py::arg("y"), py::arg("y_numel"));
}

}  // namespace

void register_nf4_matmul(py::module_& m) {
  py::class_<PackedWeight>(m, "PackedWeight", "A 4-bit weight's addresses and sizes, checked.")
      .def(py::init(&packed_weight), py::arg("packed"), py::arg("packed_numel"), py::arg("absmax"),
           py::arg("absmax_numel"), py::arg("nested_absmax"), py::arg("nested_numel"), py::arg("nested_map"),
           py::arg("map_numel"), py::arg("offset"), py::arg("N"), py::arg("K"), py::arg("blocksize"),
           py::arg("quant_type"));
  m.def("nf4_dequantize_tile_cpu", &dequantize_tile, py::arg("weight"), py::arg("row"), py::arg("rows"), py::arg("col"),
        py::arg("cols"), py::arg("dtype"), py::arg("out"), py::arg("out_numel"));
  define_product(m, "nf4_matvec_cpu", &product<false>);
  define_product(m, "nf4_panel_cpu", &product<true>);
  m.def("nf4_backward_cpu", &backward, py::arg("weight"), py::arg("grad_output"), py::arg("grad_numel"), py::arg("M"),
        py::arg("ds"), py::arg("ds_numel"), py::arg("a"), py::arg("a_numel"), py::arg("R"), py::arg("dtype"),
        py::arg("grad_x"), py::arg("grad_x_numel"));
  m.def("nf4_panel_available", &nf4_panel_available);
#if defined(PYFASTPEFT_WITH_CUDA)
  m.def("nf4_matmul_workspace", &matmul_workspace, py::arg("M"), py::arg("N"), py::arg("K"));
  define_fused(m, "nf4_matvec_cuda", &fused<false>);
  define_fused(m, "nf4_matmul_cuda", &fused<true>);
#endif
}

}  // namespace pyfastpeft
