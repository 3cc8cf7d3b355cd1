// Python's way to the 4-bit kernels. Every size is checked here, once, for all backends of an op.
#include "nf4/nf4_bind.h"

#include <string>

#include "common/bind.h"
#include "common/cuda_device.h"

namespace pyfastpeft {
namespace {

// Checks what every backend is given, then calls launch(weight, dtype, n, blocksize, type, packed, absmax).
template <typename Launch>
auto checked_quantize(Address weight, int dtype, std::int64_t n, std::int64_t blocksize, const std::string& type,
                      Address packed, std::int64_t packed_numel, Address absmax, std::int64_t absmax_numel,
                      Launch launch) {
  const char* op = "quantize_4bit";
  check(n >= 0, op, ": the weight has ", n, " values");
  check_blocksize(blocksize, op);
  const QuantType quant = quant_type(type, op);
  check_count(packed_numel, packed_bytes(n), op, "packed", message("(", n, " + 1) / 2"));
  check_count(absmax_numel, block_count(n, blocksize), op, "absmax",
              message("ceil(", n, " / blocksize ", blocksize, ")"));
  const DType weight_dtype = dtype_of(dtype, op);
  const void* w = pointer<const void>(weight, n, weight_dtype, op, "weight");
  auto* p = pointer<std::uint8_t>(packed, packed_numel, op, "packed");
  auto* a = pointer<float>(absmax, absmax_numel, op, "absmax");
  const py::gil_scoped_release release;
  return launch(w, weight_dtype, n, blocksize, quant, p, a);
}

std::int64_t quantize(Address weight, int dtype, std::int64_t n, std::int64_t blocksize, const std::string& type,
                      Address packed, std::int64_t packed_numel, Address absmax, std::int64_t absmax_numel) {
  return checked_quantize(weight, dtype, n, blocksize, type, packed, packed_numel, absmax, absmax_numel,
                          nf4_quantize_cpu);
}

#if defined(PYFASTPEFT_WITH_CUDA)
void quantize_cuda(Address weight, int dtype, std::int64_t n, std::int64_t blocksize, const std::string& type,
                   Address packed, std::int64_t packed_numel, Address absmax, std::int64_t absmax_numel, Address bad,
                   int device, Address stream) {
  auto* first_bad = bad == 0 ? nullptr : pointer<std::int64_t>(bad, 1, "quantize_4bit", "bad");
  checked_quantize(weight, dtype, n, blocksize, type, packed, packed_numel, absmax, absmax_numel, [&](auto... args) {
    const DeviceGuard guard(device, "quantize_4bit");
    nf4_quantize_cuda(args..., first_bad, reinterpret_cast<void*>(stream));
  });
}
#endif

// What Python hands over for double quantisation; the map lies in the host's memory on every device.
struct QuantizeAbsmax {
  const float* absmax;
  std::int64_t blocks;
  const float* map;
  std::uint8_t* codes;
  float* nested_absmax;
};

QuantizeAbsmax checked_quantize_absmax(Address absmax, std::int64_t blocks, Address host_map, std::int64_t map_numel,
                                       Address codes, std::int64_t codes_numel, Address nested_absmax,
                                       std::int64_t nested_numel) {
  const char* op = "quantize_absmax";
  check_count(map_numel, kNestedMapSize, op, "nested_map", "the entries of an 8-bit map");
  check_count(codes_numel, blocks, op, "codes", "one per absmax");
  check_count(nested_numel, block_count(blocks, kNestedBlocksize), op, "nested_absmax",
              message("ceil(", blocks, " / 256)"));
  return {pointer<const float>(absmax, blocks, op, "absmax"), blocks,
          pointer<const float>(host_map, map_numel, op, "nested_map"),
          pointer<std::uint8_t>(codes, codes_numel, op, "codes"),
          pointer<float>(nested_absmax, nested_numel, op, "nested_absmax")};
}

std::int64_t quantize_absmax(Address absmax, std::int64_t blocks, float offset, Address nested_map,
                             std::int64_t map_numel, Address codes, std::int64_t codes_numel, Address nested_absmax,
                             std::int64_t nested_numel) {
  const QuantizeAbsmax q =
      checked_quantize_absmax(absmax, blocks, nested_map, map_numel, codes, codes_numel, nested_absmax, nested_numel);
  const py::gil_scoped_release release;
  return nf4_quantize_absmax_cpu(q.absmax, blocks, offset, q.map, q.codes, q.nested_absmax);
}

#if defined(PYFASTPEFT_WITH_CUDA)
void quantize_absmax_cuda(Address absmax, std::int64_t blocks, Address offset, Address host_map, std::int64_t map_numel,
                          Address codes, std::int64_t codes_numel, Address nested_absmax, std::int64_t nested_numel,
                          Address nested_map, Address bad, int device, Address stream) {
  const char* op = "quantize_absmax";
  const QuantizeAbsmax q =
      checked_quantize_absmax(absmax, blocks, host_map, map_numel, codes, codes_numel, nested_absmax, nested_numel);
  const auto* mean = pointer<const float>(offset, 1, op, "offset");
  auto* map = pointer<float>(nested_map, kNestedMapSize, op, "nested_map");
  auto* first_bad = bad == 0 ? nullptr : pointer<std::int64_t>(bad, 1, op, "bad");
  const py::gil_scoped_release release;
  const DeviceGuard guard(device, op);
  nf4_quantize_absmax_cuda(q.absmax, blocks, mean, q.map, q.codes, q.nested_absmax, map, first_bad,
                           reinterpret_cast<void*>(stream));
}
#endif

// What Python hands over of a quantised weight and of the tensor it is decoded into.
struct Dequantize {
  Address packed;
  std::int64_t packed_numel;
  Address absmax;
  std::int64_t absmax_numel;
  Address nested_absmax;
  std::int64_t nested_numel;
  Address nested_map;
  std::int64_t map_numel;
  Address offset;
  std::int64_t n, blocksize;
  std::string type;
  int dtype;
  Address out;
  std::int64_t out_numel;
};

// Checks it, then calls launch(packed, absmax, n, blocksize, type, out_dtype, out).
template <typename Launch>
void checked_dequantize(const Dequantize& d, Launch launch) {
  const char* op = "dequantize_4bit";
  check(d.n >= 0, op, ": the shape has ", d.n, " values");
  check_blocksize(d.blocksize, op);
  const QuantType quant = quant_type(d.type, op);
  const std::int64_t blocks = block_count(d.n, d.blocksize);
  check_count(d.packed_numel, packed_bytes(d.n), op, "packed", message("(", d.n, " + 1) / 2 bytes"));
  check_count(d.out_numel, d.n, op, "out", "those of the shape");
  const DType out_dtype = dtype_of(d.dtype, op);
  const Nf4Absmax scales =
      checked_absmax(d.absmax, d.absmax_numel, d.nested_absmax, d.nested_numel, d.nested_map, d.map_numel, d.offset,
                     blocks, message("ceil(", d.n, " / blocksize ", d.blocksize, ")"), op);
  const auto* p = pointer<const std::uint8_t>(d.packed, d.packed_numel, op, "packed");
  void* o = pointer<void>(d.out, d.out_numel, out_dtype, op, "out");
  const py::gil_scoped_release release;
  launch(p, scales, d.n, d.blocksize, quant, out_dtype, o);
}

void dequantize(Address packed, std::int64_t packed_numel, Address absmax, std::int64_t absmax_numel,
                Address nested_absmax, std::int64_t nested_numel, Address nested_map, std::int64_t map_numel,
                Address offset, std::int64_t n, std::int64_t blocksize, const std::string& type, int dtype, Address out,
                std::int64_t out_numel) {
  checked_dequantize({packed, packed_numel, absmax, absmax_numel, nested_absmax, nested_numel, nested_map, map_numel,
                      offset, n, blocksize, type, dtype, out, out_numel},
                     nf4_dequantize_cpu);
}

#if defined(PYFASTPEFT_WITH_CUDA)
void dequantize_cuda(Address packed, std::int64_t packed_numel, Address absmax, std::int64_t absmax_numel,
                     Address nested_absmax, std::int64_t nested_numel, Address nested_map, std::int64_t map_numel,
                     Address offset, std::int64_t n, std::int64_t blocksize, const std::string& type, int dtype,
                     Address out, std::int64_t out_numel, int device, Address stream) {
  checked_dequantize({packed, packed_numel, absmax, absmax_numel, nested_absmax, nested_numel, nested_map, map_numel,
                      offset, n, blocksize, type, dtype, out, out_numel},
                     [&](auto... args) {
                       const DeviceGuard guard(device, "dequantize_4bit");
                       nf4_dequantize_cuda(args..., reinterpret_cast<void*>(stream));
                     });
}
#endif

}  // namespace

void register_nf4(py::module_& m) {
  m.def(
      "nf4_check",
      [](std::int64_t blocksize, const std::string& type, const std::string& op) {
        check_blocksize(blocksize, op.c_str());
        quant_type(type, op.c_str());
      },
      py::arg("blocksize"), py::arg("quant_type"), py::arg("op"));
  m.def("nf4_quantize_cpu", &quantize, py::arg("weight"), py::arg("dtype"), py::arg("n"), py::arg("blocksize"),
        py::arg("quant_type"), py::arg("packed"), py::arg("packed_numel"), py::arg("absmax"), py::arg("absmax_numel"));
#if defined(PYFASTPEFT_WITH_CUDA)
  m.def("nf4_quantize_cuda", &quantize_cuda, py::arg("weight"), py::arg("dtype"), py::arg("n"), py::arg("blocksize"),
        py::arg("quant_type"), py::arg("packed"), py::arg("packed_numel"), py::arg("absmax"), py::arg("absmax_numel"),
        py::arg("bad"), py::arg("device"), py::arg("stream"));
#endif
  m.def("nf4_quantize_absmax_cpu", &quantize_absmax, py::arg("absmax"), py::arg("blocks"), py::arg("offset"),
        py::arg("nested_map"), py::arg("map_numel"), py::arg("codes"), py::arg("codes_numel"), py::arg("nested_absmax"),
        py::arg("nested_numel"));
  m.def("nf4_dequantize_cpu", &dequantize, py::arg("packed"), py::arg("packed_numel"), py::arg("absmax"),
        py::arg("absmax_numel"), py::arg("nested_absmax"), py::arg("nested_numel"), py::arg("nested_map"),
        py::arg("map_numel"), py::arg("offset"), py::arg("n"), py::arg("blocksize"), py::arg("quant_type"),
        py::arg("dtype"), py::arg("out"), py::arg("out_numel"));
#if defined(PYFASTPEFT_WITH_CUDA)
  m.def("nf4_quantize_absmax_cuda", &quantize_absmax_cuda, py::arg("absmax"), py::arg("blocks"), py::arg("offset"),
        py::arg("host_map"), py::arg("map_numel"), py::arg("codes"), py::arg("codes_numel"), py::arg("nested_absmax"),
        py::arg("nested_numel"), py::arg("nested_map"), py::arg("bad"), py::arg("device"), py::arg("stream"));
  m.def("nf4_dequantize_cuda", &dequantize_cuda, py::arg("packed"), py::arg("packed_numel"), py::arg("absmax"),
        py::arg("absmax_numel"), py::arg("nested_absmax"), py::arg("nested_numel"), py::arg("nested_map"),
        py::arg("map_numel"), py::arg("offset"), py::arg("n"), py::arg("blocksize"), py::arg("quant_type"),
        py::arg("dtype"), py::arg("out"), py::arg("out_numel"), py::arg("device"), py::arg("stream"));
#endif
}

}  // namespace pyfastpeft
