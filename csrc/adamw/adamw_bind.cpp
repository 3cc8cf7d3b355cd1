// Python's way to AdamW. The lists arrive as arrays of addresses (buffers of 64-bit integers), one entry per tensor;
// layouts and dtypes are checked by pyfastpeft/ops/adamw.py, here what memory safety rests on.
#include <mutex>
#include <tuple>
#include <vector>

#include "adamw/adamw.h"
#include "common/bind_tables.h"
#include "common/cuda_device.h"
#include "common/parallel.h"

namespace pyfastpeft {
namespace {

constexpr const char* kOp = "adamw_";

// lr, beta1, beta2, eps, weight_decay, decoupled, maximize
using Scalars = std::tuple<double, double, double, double, double, bool, bool>;

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

// The options that CPU and GPU take alike, as ops/adamw.py gives them; maps and seed are added by the bindings.
AdamwOptions options_of(const Scalars& scalars) {
  AdamwOptions options{};
  std::tie(options.lr, options.beta1, options.beta2, options.eps, options.weight_decay, options.decoupled,
           options.maximize) = scalars;
  options.grad_scale = 1.0;
  return options;
}

// On the CPU; a seed of 0 is none.
AdamwOptions cpu_options(const Scalars& scalars, Address map1, Address map2, Address seed, double grad_scale) {
  AdamwOptions options = options_of(scalars);
  options.grad_scale = grad_scale;
  options.map1 = checked_map(map1, "qmap1");
  options.map2 = checked_map(map2, "qmap2");
  options.seed = reinterpret_cast<const std::int64_t*>(seed);
  return options;
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
  const auto* p = items<Address>(infos[0], count, kOp, "params");
  const auto* g = items<Address>(infos[1], count, kOp, "grads");
  const auto* m = items<Address>(infos[2], count, kOp, "exp_avgs");
  const auto* v = items<Address>(infos[3], count, kOp, "exp_avg_sqs");
  const auto* s = items<Address>(infos[4], count, kOp, "steps");
  const auto* n = items<std::int64_t>(infos[5], count, kOp, "numels");
  const auto* k = items<std::uint8_t>(infos[6], count, kOp, "kinds");
  py::buffer_info optional[3];
  const Address* extra[3] = {nullptr, nullptr, nullptr};
  const py::object* given[] = {&absmax1, &absmax2, &masters};
  const char* names[] = {"absmax1", "absmax2", "masters"};
  for (int i = 0; i < 3; ++i) {
    if (given[i]->is_none()) continue;
    optional[i] = given[i]->cast<py::buffer>().request();
    extra[i] = items<Address>(optional[i], count, kOp, names[i]);
  }
  std::vector<AdamwTensor> tensors(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    AdamwTensor& t = tensors[std::size_t(i)];
    const DType param_dtype = DType(k[i] & 3), grad_dtype = DType((k[i] >> 2) & 3);
    const bool bits8 = k[i] & 16, master = k[i] & 32;
    check(n[i] >= 0 && is_kind(k[i]), kOp, ": params[", i, "] has ", n[i], " values and kind ", int(k[i]));
    check(!bits8 || (extra[0] && extra[1] && has_maps), kOp, ": exp_avgs[", i,
          "] is 8-bit, expected absmax1, absmax2, qmap1 and qmap2 with it");
    check(!master || extra[2], kOp, ": params[", i, "] has a master, expected the table of masters");
    const std::int64_t blocks = bits8 ? (n[i] + kAdamwBlock - 1) / kAdamwBlock : 0;
    const auto moments = [&](const Address* list, const char* name) {
      return bits8 ? static_cast<void*>(at<std::uint8_t>(list[i], n[i], name, i))
                   : static_cast<void*>(at<float>(list[i], n[i], name, i));
    };
    t = {at<void>(p[i], n[i], param_dtype, "params", i),
         at<const void>(g[i], n[i], grad_dtype, "grads", i),
         moments(m, "exp_avgs"),
         moments(v, "exp_avg_sqs"),
         bits8 ? at<float>(extra[0][i], blocks, "absmax1", i) : nullptr,
         bits8 ? at<float>(extra[1][i], blocks, "absmax2", i) : nullptr,
         master ? at<float>(extra[2][i], n[i], "masters", i) : nullptr,
         at<float>(s[i], 1, "steps", i),
         n[i],
         param_dtype,
         grad_dtype,
         bits8};
  }
  return tensors;
}

void adamw(std::int64_t count, const py::buffer& params, const py::buffer& grads, const py::buffer& exp_avgs,
           const py::buffer& exp_avg_sqs, const py::object& absmax1, const py::object& absmax2,
           const py::object& masters, const py::buffer& steps, const py::buffer& numels, const py::buffer& kinds,
           const Scalars& scalars, Address map1, Address map2, Address seed, double grad_scale) {
  const AdamwOptions options = cpu_options(scalars, map1, map2, seed, grad_scale);
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

std::vector<AdamwTensor> read_pages(const std::vector<py::buffer>& tables, const std::vector<Address>& pages,
                                    std::int64_t page_bytes, const py::buffer& params, const py::buffer& grads,
                                    const py::buffer& numels, bool has_maps) {
  const WholeTensors whole(params, grads, numels, kOp);
  std::vector<AdamwTensor> tensors;
  each_row<Piece>(tables, pages, page_bytes, kOp, [&](const Piece& piece, const StatePage& page) {
    const bool bits8 = piece.kind & 16, master = piece.kind & 32;
    check(piece.first % kAdamwBlock == 0, kOp, ": a piece begins at ", piece.first, ", expected a multiple of ",
          kAdamwBlock);
    check(!bits8 || has_maps, kOp, ": a piece is 8-bit, expected qmap1 and qmap2 with it");
    AdamwTensor t;
    whole.set_part(t, piece.tensor, piece.kind, piece.first, piece.n);
    const std::int64_t scales = (piece.n + kAdamwBlock - 1) / kAdamwBlock * 4, moments = piece.n * (bits8 ? 1 : 4);
    t.exp_avg = page.at<void>(piece.exp_avg, moments);
    t.exp_avg_sq = page.at<void>(piece.exp_avg_sq, moments);
    t.absmax1 = bits8 ? page.at<float>(piece.absmax1, scales) : nullptr;
    t.absmax2 = bits8 ? page.at<float>(piece.absmax2, scales) : nullptr;
    t.master = master ? page.at<float>(piece.master, piece.n * 4) : nullptr;
    t.step = page.at<float>(piece.step, 4);
    t.bits8 = bits8;
    t.first = piece.first;
    t.index = piece.index;
    tensors.push_back(t);
  });
  return tensors;
}

// At most `threads` threads, 0: all.
void adamw_pages(const std::vector<py::buffer>& tables, const std::vector<Address>& pages, std::int64_t page_bytes,
                 int threads, const py::buffer& params, const py::buffer& grads, const py::buffer& numels,
                 const Scalars& scalars, Address map1, Address map2, Address seed, double grad_scale) {
  const AdamwOptions options = cpu_options(scalars, map1, map2, seed, grad_scale);
  const auto tensors =
      read_pages(tables, pages, page_bytes, params, grads, numels, options.map1 != nullptr && options.map2 != nullptr);
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

// What lies on the GPU, 0: none; lr_tensor is f64 where lr_is_f64.
struct OnDevice {
  Address map1 = 0, map2 = 0, seed = 0, lr_tensor = 0, grad_scale = 0, found_inf = 0;
  bool lr_is_f64 = false;
};

// Where and by what means a launch runs.
struct Launch {
  Table& content;
  Address table;
  std::int64_t table_words;
  int multiprocessors, device;
  Address stream;
};

void run_on_cuda(const std::vector<AdamwTensor>& tensors, const Scalars& scalars, const OnDevice& there,
                 const Launch& launch) {
  const auto count = std::int64_t(tensors.size());
  check((there.map1 != 0) == (there.map2 != 0), kOp, ": qmap1 and qmap2 are given together or not at all");
  check(launch.table_words == adamw_table_words(count), kOp, ": the table has ", launch.table_words,
        " words, expected ", adamw_table_words(count), " for ", count, " tensors");
  check(launch.multiprocessors > 0, kOp, ": the device has ", launch.multiprocessors, " multiprocessors");
  AdamwOptions options = options_of(scalars);
  options.map1 = optional<const float>(there.map1, 256, "qmap1");
  options.map2 = optional<const float>(there.map2, 256, "qmap2");
  options.seed = optional<const std::int64_t>(there.seed, 1, "rounding_seed");
  const AdamwDeviceScalars device_scalars{
      there.lr_is_f64 ? static_cast<const void*>(optional<const double>(there.lr_tensor, 1, "lr_tensor"))
                      : static_cast<const void*>(optional<const float>(there.lr_tensor, 1, "lr_tensor")),
      there.lr_is_f64, optional<const float>(there.grad_scale, 1, "grad_scale"),
      optional<const float>(there.found_inf, 1, "found_inf")};
  auto* words = pointer<std::uint64_t>(launch.table, launch.table_words, kOp, "table");
  const py::gil_scoped_release release;
  const std::lock_guard<std::mutex> lock(launch.content.mutex);
  const DeviceGuard guard(launch.device, kOp);
  adamw_cuda(tensors.data(), count, options, device_scalars, words, launch.content.content, launch.multiprocessors,
             reinterpret_cast<void*>(launch.stream));
}

// As adamw, on the GPU: maps, seed and the scalars behind lr_tensor, grad_scale and found_inf (0: none) lie there.
void adamw_on_cuda(std::int64_t count, const py::buffer& params, const py::buffer& grads, const py::buffer& exp_avgs,
                   const py::buffer& exp_avg_sqs, const py::object& absmax1, const py::object& absmax2,
                   const py::object& masters, const py::buffer& steps, const py::buffer& numels,
                   const py::buffer& kinds, const Scalars& scalars, const OnDevice& there, Table& content,
                   Address table, std::int64_t table_words, int multiprocessors, int device, Address stream) {
  run_on_cuda(read_lists(count, params, grads, exp_avgs, exp_avg_sqs, absmax1, absmax2, masters, steps, numels, kinds,
                         there.map1 != 0 && there.map2 != 0),
              scalars, there, {content, table, table_words, multiprocessors, device, stream});
}

// As adamw_pages, on the GPU; the pages lie there, or in host memory that it can reach. Its stochastic rounding counts
// from the beginning of what it is given, so parts of tensors are rounded to nearest only: no seed.
void adamw_pages_on_cuda(const std::vector<py::buffer>& tables, const std::vector<Address>& pages,
                         std::int64_t page_bytes, const py::buffer& params, const py::buffer& grads,
                         const py::buffer& numels, const Scalars& scalars, const OnDevice& there, Table& content,
                         Address table, std::int64_t table_words, int multiprocessors, int device, Address stream) {
  check(there.seed == 0, kOp, ": parts of tensors are not rounded stochastically on a GPU");
  run_on_cuda(read_pages(tables, pages, page_bytes, params, grads, numels, there.map1 != 0 && there.map2 != 0), scalars,
              there, {content, table, table_words, multiprocessors, device, stream});
}
#endif

}  // namespace

void register_adamw(py::module_& m) {
  m.def("adamw_cpu", &adamw);
  m.def("adamw_pages_cpu", &adamw_pages);
#if defined(PYFASTPEFT_WITH_CUDA)
  py::class_<OnDevice>(m, "AdamwOnDevice", py::module_local())
      .def(py::init<Address, Address, Address, Address, Address, Address, bool>(), py::arg("map1"), py::arg("map2"),
           py::arg("seed"), py::arg("lr_tensor"), py::arg("grad_scale"), py::arg("found_inf"), py::arg("lr_is_f64"));
  py::class_<Table>(m, "AdamwTable", py::module_local()).def(py::init<>());
  m.def("adamw_table_words", &adamw_table_words);
  m.def("adamw_cuda", &adamw_on_cuda);
  m.def("adamw_pages_cuda", &adamw_pages_on_cuda);
#endif
}

}  // namespace pyfastpeft
