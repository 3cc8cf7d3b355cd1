// Python's way to the 4-bit matmul. A quantised weight arrives as its addresses and sizes and is checked once.
#include "nf4/nf4_bind.h"
#include "nf4/nf4_matmul.h"

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
  return {{pointer<std::uint8_t>(packed, packed_numel, op, "packed"), scales, N, K, blocksize, quant_type(type, op)}};
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

void matvec(const PackedWeight& w, Address x, std::int64_t x_numel, std::int64_t M, Address bias,
            std::int64_t bias_numel, int dtype, Address y, std::int64_t y_numel) {
  const char* op = "linear_4bit";
  const Nf4Matrix& m = w.matrix;
  check_count(x_numel, M * m.K, op, "x", "M·K");
  check_count(y_numel, M * m.N, op, "y", "M·N");
  if (bias != 0) check_count(bias_numel, m.N, op, "bias", "N");
  const DType x_dtype = dtype_of(dtype, op);
  const void* from = pointer<void>(x, x_numel, op, "x");
  void* to = pointer<void>(y, y_numel, op, "y");
  const py::gil_scoped_release release;
  nf4_matvec_cpu(m, from, M, reinterpret_cast<const float*>(bias), x_dtype, to);
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
  m.def("nf4_matvec_cpu", &matvec, py::arg("weight"), py::arg("x"), py::arg("x_numel"), py::arg("M"), py::arg("bias"),
        py::arg("bias_numel"), py::arg("dtype"), py::arg("y"), py::arg("y_numel"));
}

}  // namespace pyfastpeft
