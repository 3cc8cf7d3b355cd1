// Python's way to AdamW. The lists arrive as arrays of addresses (buffers of 64-bit integers), one entry per tensor;
// layouts and dtypes are checked by pyfastpeft/ops/adamw.py, here what memory safety rests on.
#include <pybind11/stl.h>

#include <mutex>
#include <vector>

#include "adamw/adamw.h"
#include "common/bind.h"
#include "common/cuda_device.h"
#include "common/parallel.h"

namespace pyfastpeft {
namespace {

constexpr const char* kOp = "adamw_";

template <typename T>
const T* items(const py::buffer_info& info, std::int64_t count, const char* name) {
  check(info.ndim == 1 && info.itemsize == py::ssize_t(sizeof(T)) && info.size == count, kOp, ": the table of ", name,
        " has ", info.size, " entries of ", info.itemsize, " bytes, expected ", count, " of ", sizeof(T));
  return static_cast<const T*>(info.ptr);
}

// The memory of tensor `index` of a list; a const T says that no kernel writes it.
template <typename T>
T* at(Address address, std::int64_t numel, DType dtype, const char* name, std::int64_t index) {
  check(address != 0 || numel == 0, kOp, ": ", name, "[", index, "] has no memory (a fake or meta tensor?), expected ",
        numel, " values; call through torch.ops.pyfastpeft, which has an implementation for such tensors");
  return pointer<T>(address, numel, dtype, kOp, name);
}

template <typename T>
T* at(Address address, std::int64_t numel, const char* name, std::int64_t index) {
  check(address != 0 || numel == 0, kOp, ": ", name, "[", index, "] has no memory (a fake or meta tensor?), expected ",
        numel, " values; call through torch.ops.pyfastpeft, which has an implementation for such tensors");
  return pointer<T>(address, numel, kOp, name);
}

const float* checked_map(Address address, const char* name) {
  const float* map = reinterpret_cast<const float*>(address);
  if (map == nullptr) return nullptr;
  for (int i = 0; i < 256; ++i)
    check(i == 0 ? map[0] == map[0] : map[i] >= map[i - 1], kOp, ": ", name, "[", i, "] is ", map[i],
          ", expected 256 ascending levels; use pyfastpeft.reference.nf4.dynamic_map()");
  return map;
}

// The lists of a call. kinds: per tensor, bits 0-1 the parameter's dtype code, 2-3 the gradient's, 4: 8-bit state,
// 5: has a master. absmax1, absmax2 and masters may be None where no tensor has them.
std::vector<AdamwTensor> read_lists(std::int64_t count, const py::buffer& params, const py::buffer& grads,
                                    const py::buffer& exp_avgs, const py::buffer& exp_avg_sqs,
                                    const py::object& absmax1, const py::object& absmax2, const py::object& masters,
                                    const py::buffer& steps, const py::buffer& numels, const py::buffer& kinds,
                                    bool has_maps) {
  const py::buffer_info infos[] = {params.request(), grads.request(),  exp_avgs.request(), exp_avg_sqs.request(),
                                   steps.request(),  numels.request(), kinds.request()};
  const auto* p = items<Address>(infos[0], count, "params");
  const auto* g = items<Address>(infos[1], count, "grads");
  const auto* m = items<Address>(infos[2], count, "exp_avgs");
  const auto* v = items<Address>(infos[3], count, "exp_avg_sqs");
  const auto* s = items<Address>(infos[4], count, "steps");
  const auto* n = items<std::int64_t>(infos[5], count, "numels");
  const auto* k = items<std::uint8_t>(infos[6], count, "kinds");
  py::buffer_info optional[3];
  const Address* extra[3] = {nullptr, nullptr, nullptr};
  const py::object* given[] = {&absmax1, &absmax2, &masters};
  const char* names[] = {"absmax1", "absmax2", "masters"};
  for (int i = 0; i < 3; ++i) {
    if (given[i]->is_none()) continue;
    optional[i] = given[i]->cast<py::buffer>().request();
    extra[i] = items<Address>(optional[i], count, names[i]);
  }
  std::vector<AdamwTensor> tensors(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    AdamwTensor& t = tensors[std::size_t(i)];
    const int param_dtype = k[i] & 3, grad_dtype = (k[i] >> 2) & 3;
    const bool bits8 = k[i] & 16, master = k[i] & 32;
    check(n[i] >= 0 && param_dtype < 3 && (grad_dtype == param_dtype || grad_dtype == int(DType::f32)), kOp,
          ": params[", i, "] has ", n[i], " values and kind ", int(k[i]));
    check(!bits8 || (extra[0] && extra[1] && has_maps), kOp, ": exp_avgs[", i,
          "] is 8-bit, expected absmax1, absmax2, qmap1 and qmap2 with it");
    check(!master || extra[2], kOp, ": params[", i, "] has a master, expected the table of masters");
    const std::int64_t blocks = bits8 ? (n[i] + kAdamwBlock - 1) / kAdamwBlock : 0;
    const auto moments = [&](const Address* list, const char* name) {
      return bits8 ? static_cast<void*>(at<std::uint8_t>(list[i], n[i], name, i))
                   : static_cast<void*>(at<float>(list[i], n[i], name, i));
    };
    t = {at<void>(p[i], n[i], DType(param_dtype), "params", i),
         at<const void>(g[i], n[i], DType(grad_dtype), "grads", i),
         moments(m, "exp_avgs"),
         moments(v, "exp_avg_sqs"),
         bits8 ? at<float>(extra[0][i], blocks, "absmax1", i) : nullptr,
         bits8 ? at<float>(extra[1][i], blocks, "absmax2", i) : nullptr,
         master ? at<float>(extra[2][i], n[i], "masters", i) : nullptr,
         at<float>(s[i], 1, "steps", i),
         n[i],
         DType(param_dtype),
         DType(grad_dtype),
         bits8};
  }
  return tensors;
}

void adamw(std::int64_t count, const py::buffer& params, const py::buffer& grads, const py::buffer& exp_avgs,
           const py::buffer& exp_avg_sqs, const py::object& absmax1, const py::object& absmax2,
           const py::object& masters, const py::buffer& steps, const py::buffer& numels, const py::buffer& kinds,
           double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled, bool maximize,
           Address map1, Address map2, Address seed, double grad_scale) {
  const AdamwOptions options{lr,
                             beta1,
                             beta2,
                             eps,
                             weight_decay,
                             decoupled,
                             maximize,
                             grad_scale,
                             checked_map(map1, "qmap1"),
                             checked_map(map2, "qmap2"),
                             reinterpret_cast<const std::int64_t*>(seed)};
  const auto tensors = read_lists(count, params, grads, exp_avgs, exp_avg_sqs, absmax1, absmax2, masters, steps, numels,
                                  kinds, options.map1 != nullptr && options.map2 != nullptr);
  const py::gil_scoped_release release;
  adamw_cpu(tensors.data(), count, options);
}

// A part of a tensor whose state lies in a page: row of a table of 64-bit integers, made by pyfastpeft/optim/paged_adamw.py.
struct Piece {
  std::int64_t tensor;    // in the tables of parameters and gradients
  std::int64_t kind;      // as in read_lists
  std::int64_t first, n;  // of the tensor's values, in the order of memory; first is a multiple of 256
  std::int64_t index;     // of the tensor in the call that stochastic rounding counts
  std::int64_t step, exp_avg, exp_avg_sq, absmax1, absmax2, master;  // offsets in the page; -1: none
};

// The tensor of piece i of a page, with everything that memory safety rests on checked.
AdamwTensor tensor_of(const Piece& piece, std::int64_t i, char* page, std::int64_t page_bytes,
                      std::int64_t tensor_count, const Address* params, const Address* grads,
                      const std::int64_t* numels, const AdamwOptions& options) {
  const DType param_dtype = DType(piece.kind & 3), grad_dtype = DType((piece.kind >> 2) & 3);
  const bool bits8 = piece.kind & 16, master = piece.kind & 32;
  check(piece.tensor >= 0 && piece.tensor < tensor_count, kOp, ": piece ", i, " is of tensor ", piece.tensor, " of ",
        tensor_count);
  const std::int64_t numel = numels[piece.tensor];
  check(piece.first >= 0 && piece.first % kAdamwBlock == 0 && piece.n >= 0 && piece.first + piece.n <= numel &&
            int(param_dtype) < 3 && (grad_dtype == param_dtype || grad_dtype == DType::f32),
        kOp, ": piece ", i, " has values ", piece.first, " to ", piece.first + piece.n, " of ", numel, " and kind ",
        piece.kind);
  check(!bits8 || (options.map1 != nullptr && options.map2 != nullptr), kOp, ": piece ", i,
        " is 8-bit, expected qmap1 and qmap2 with it");
  const auto at = [&](std::int64_t offset, std::int64_t bytes) {
    check(offset >= 0 && offset % 4 == 0 && offset <= page_bytes - bytes, kOp, ": piece ", i, " has ", bytes,
          " bytes at ", offset, " of a page of ", page_bytes);
    return static_cast<void*>(page + offset);
  };
  const std::int64_t scales = (piece.n + kAdamwBlock - 1) / kAdamwBlock * 4, moments = piece.n * (bits8 ? 1 : 4);
  const auto skip = [&](DType dtype) { return piece.first * (dtype == DType::f32 ? 4 : 2); };
  return {
      static_cast<char*>(pointer<void>(params[piece.tensor], numel, param_dtype, kOp, "params")) + skip(param_dtype),
      static_cast<const char*>(pointer<const void>(grads[piece.tensor], numel, grad_dtype, kOp, "grads")) +
          skip(grad_dtype),
      at(piece.exp_avg, moments),
      at(piece.exp_avg_sq, moments),
      bits8 ? static_cast<float*>(at(piece.absmax1, scales)) : nullptr,
      bits8 ? static_cast<float*>(at(piece.absmax2, scales)) : nullptr,
      master ? static_cast<float*>(at(piece.master, piece.n * 4)) : nullptr,
      static_cast<float*>(at(piece.step, 4)),
      piece.n,
      param_dtype,
      grad_dtype,
      bits8,
      piece.first,
      piece.index};
}

// The pieces of tables[i] have their state in [pages[i], pages[i] + page_bytes).
std::vector<AdamwTensor> read_pages(const std::vector<py::buffer>& tables, const std::vector<Address>& pages,
                                    std::int64_t page_bytes, const py::buffer& params, const py::buffer& grads,
                                    const py::buffer& numels, const AdamwOptions& options) {
  const py::buffer_info param_info = params.request(), grad_info = grads.request(), numel_info = numels.request();
  const std::int64_t tensor_count = param_info.size;
  const auto* p = items<Address>(param_info, tensor_count, "params");
  const auto* g = items<Address>(grad_info, tensor_count, "grads");
  const auto* numel = items<std::int64_t>(numel_info, tensor_count, "numels");
  check(tables.size() == pages.size(), kOp, ": ", tables.size(), " tables for ", pages.size(), " pages");
  std::vector<AdamwTensor> tensors;
  for (std::size_t page = 0; page < pages.size(); ++page) {
    const py::buffer_info rows = tables[page].request();
    constexpr py::ssize_t kWords = sizeof(Piece) / sizeof(std::int64_t);
    check(rows.ndim == 1 && rows.itemsize == 8 && rows.size % kWords == 0, kOp, ": a table of ", rows.size,
          " words of ", rows.itemsize, " bytes, expected rows of ", kWords, " of 8");
    const auto* pieces = static_cast<const Piece*>(rows.ptr);
    char* base = pointer<char>(pages[page], page_bytes, kOp, "page");
    for (std::int64_t i = 0; i < rows.size / kWords; ++i)
      tensors.push_back(tensor_of(pieces[i], i, base, page_bytes, tensor_count, p, g, numel, options));
  }
  return tensors;
}

// At most `threads` threads, 0: all.
void adamw_pages(const std::vector<py::buffer>& tables, const std::vector<Address>& pages, std::int64_t page_bytes,
                 int threads, const py::buffer& params, const py::buffer& grads, const py::buffer& numels, double lr,
                 double beta1, double beta2, double eps, double weight_decay, bool decoupled, bool maximize,
                 Address map1, Address map2, Address seed, double grad_scale) {
  const AdamwOptions options{lr,
                             beta1,
                             beta2,
                             eps,
                             weight_decay,
                             decoupled,
                             maximize,
                             grad_scale,
                             checked_map(map1, "qmap1"),
                             checked_map(map2, "qmap2"),
                             reinterpret_cast<const std::int64_t*>(seed)};
  const auto tensors = read_pages(tables, pages, page_bytes, params, grads, numels, options);
  const py::gil_scoped_release release;
  const ThreadLimit limit(threads);
  adamw_cpu(tensors.data(), std::int64_t(tensors.size()), options);
}

#if defined(PYFASTPEFT_WITH_CUDA)
// What the host knows of a table in device memory; one call at a time works on it.
struct Table {
  AdamwTableContent content;
  std::mutex mutex;
};

template <typename T>
T* optional(Address address, std::int64_t numel, const char* name) {
  return address == 0 ? nullptr : pointer<T>(address, numel, kOp, name);
}

// As adamw, on the GPU: maps, seed and the scalars behind lr_tensor, grad_scale and found_inf (0: none) lie there.
void adamw_on_cuda(std::int64_t count, const py::buffer& params, const py::buffer& grads, const py::buffer& exp_avgs,
                   const py::buffer& exp_avg_sqs, const py::object& absmax1, const py::object& absmax2,
                   const py::object& masters, const py::buffer& steps, const py::buffer& numels,
                   const py::buffer& kinds, double lr, double beta1, double beta2, double eps, double weight_decay,
                   bool decoupled, bool maximize, Address map1, Address map2, Address seed, Address lr_tensor,
                   bool lr_is_f64, Address grad_scale, Address found_inf, Table& content, Address table,
                   std::int64_t table_words, int multiprocessors, int device, Address stream) {
  check((map1 != 0) == (map2 != 0), kOp, ": qmap1 and qmap2 are given together or not at all");
  check(table_words == adamw_table_words(count), kOp, ": the table has ", table_words, " words, expected ",
        adamw_table_words(count), " for ", count, " tensors");
  check(multiprocessors > 0, kOp, ": the device has ", multiprocessors, " multiprocessors");
  const AdamwOptions options{lr,
                             beta1,
                             beta2,
                             eps,
                             weight_decay,
                             decoupled,
                             maximize,
                             1.0,
                             optional<const float>(map1, 256, "qmap1"),
                             optional<const float>(map2, 256, "qmap2"),
                             optional<const std::int64_t>(seed, 1, "rounding_seed")};
  const AdamwDeviceScalars scalars{
      lr_is_f64 ? static_cast<const void*>(optional<const double>(lr_tensor, 1, "lr_tensor"))
                : static_cast<const void*>(optional<const float>(lr_tensor, 1, "lr_tensor")),
      lr_is_f64, optional<const float>(grad_scale, 1, "grad_scale"), optional<const float>(found_inf, 1, "found_inf")};
  const auto tensors = read_lists(count, params, grads, exp_avgs, exp_avg_sqs, absmax1, absmax2, masters, steps, numels,
                                  kinds, options.map1 != nullptr);
  auto* words = pointer<std::uint64_t>(table, table_words, kOp, "table");
  const py::gil_scoped_release release;
  const std::lock_guard<std::mutex> lock(content.mutex);
  const DeviceGuard guard(device, kOp);
  adamw_cuda(tensors.data(), count, options, scalars, words, content.content, multiprocessors,
             reinterpret_cast<void*>(stream));
}

// As adamw_pages, on the GPU; the pages lie there, or in host memory that it can reach. Its stochastic rounding counts
// from the beginning of what it is given, so parts of tensors are rounded to nearest only.
void adamw_pages_on_cuda(const std::vector<py::buffer>& tables, const std::vector<Address>& pages,
                         std::int64_t page_bytes, const py::buffer& params, const py::buffer& grads,
                         const py::buffer& numels, double lr, double beta1, double beta2, double eps,
                         double weight_decay, bool decoupled, bool maximize, Address map1, Address map2,
                         Address lr_tensor, bool lr_is_f64, Address grad_scale, Address found_inf, Table& content,
                         Address table, std::int64_t table_words, int multiprocessors, int device, Address stream) {
  check((map1 != 0) == (map2 != 0), kOp, ": qmap1 and qmap2 are given together or not at all");
  check(multiprocessors > 0, kOp, ": the device has ", multiprocessors, " multiprocessors");
  const AdamwOptions options{lr,
                             beta1,
                             beta2,
                             eps,
                             weight_decay,
                             decoupled,
                             maximize,
                             1.0,
                             optional<const float>(map1, 256, "qmap1"),
                             optional<const float>(map2, 256, "qmap2"),
                             nullptr};
  const AdamwDeviceScalars scalars{
      lr_is_f64 ? static_cast<const void*>(optional<const double>(lr_tensor, 1, "lr_tensor"))
                : static_cast<const void*>(optional<const float>(lr_tensor, 1, "lr_tensor")),
      lr_is_f64, optional<const float>(grad_scale, 1, "grad_scale"), optional<const float>(found_inf, 1, "found_inf")};
  const auto tensors = read_pages(tables, pages, page_bytes, params, grads, numels, options);
  const auto count = std::int64_t(tensors.size());
  check(table_words == adamw_table_words(count), kOp, ": the table has ", table_words, " words, expected ",
        adamw_table_words(count), " for ", count, " tensors");
  auto* words = pointer<std::uint64_t>(table, table_words, kOp, "table");
  const py::gil_scoped_release release;
  const std::lock_guard<std::mutex> lock(content.mutex);
  const DeviceGuard guard(device, kOp);
  adamw_cuda(tensors.data(), count, options, scalars, words, content.content, multiprocessors,
             reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

void register_adamw(py::module_& m) {
  m.def("adamw_cpu", &adamw);
  m.def("adamw_pages_cpu", &adamw_pages);
#if defined(PYFASTPEFT_WITH_CUDA)
  py::class_<Table>(m, "AdamwTable", py::module_local()).def(py::init<>());
  m.def("adamw_table_words", &adamw_table_words);
  m.def("adamw_cuda", &adamw_on_cuda);
  m.def("adamw_pages_cuda", &adamw_pages_on_cuda);
#endif
}

}  // namespace pyfastpeft
