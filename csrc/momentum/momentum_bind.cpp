// Python's way to Lion and SGD. A call is rows of 64-bit integers: parameters of whole tensors or of parts whose state lies
// in a page. What memory safety rests on is checked here, layouts by pyfastpeft/optim/rule.py.
#include <pybind11/stl.h>

#include <vector>

#include "common/bind.h"
#include "common/parallel.h"
#include "momentum/momentum.h"

namespace pyfastpeft {
namespace {

constexpr const char* kOp = "momentum_";

template <typename T>
const T* items(const py::buffer_info& info, std::int64_t count, const char* name) {
  check(info.ndim == 1 && info.itemsize == py::ssize_t(sizeof(T)) && info.size == count, kOp, ": the table of ", name,
        " has ", info.size, " entries of ", info.itemsize, " bytes, expected ", count, " of ", sizeof(T));
  return static_cast<const T*>(info.ptr);
}

MomentumOptions options_of(int rule, double lr, double weight_decay, double first, double second, bool nesterov,
                           bool maximize) {
  check(rule == int(MomentumRule::kLion) || rule == int(MomentumRule::kSgd), kOp, ": rule is ", rule,
        ", expected 0 or 1");
  return {MomentumRule(rule), lr, weight_decay, first, second, nesterov, maximize};
}

// The memory of values [first, first + n) of a parameter and its gradient; kind: bits 0-1 the parameter's dtype code, 2-3
// the gradient's.
MomentumTensor values_of(std::int64_t i, std::int64_t kind, Address param, Address grad, std::int64_t numel,
                         std::int64_t first, std::int64_t n) {
  const DType param_dtype = DType(kind & 3), grad_dtype = DType((kind >> 2) & 3);
  check(numel >= 0 && first >= 0 && n >= 0 && first <= numel - n && int(param_dtype) < 3 &&
            (grad_dtype == param_dtype || grad_dtype == DType::f32),
        kOp, ": params[", i, "] has values ", first, " to ", first + n, " of ", numel, " and kind ", kind);
  const auto skip = [&](DType dtype) { return first * (dtype == DType::f32 ? 4 : 2); };
  return {static_cast<char*>(pointer<void>(param, numel, param_dtype, kOp, "params")) + skip(param_dtype),
          static_cast<const char*>(pointer<const void>(grad, numel, grad_dtype, kOp, "grads")) + skip(grad_dtype),
          nullptr,
          nullptr,
          n,
          param_dtype,
          grad_dtype};
}

void momentum(const py::buffer& params, const py::buffer& grads, const py::buffer& momenta, const py::buffer& steps,
              const py::buffer& numels, const py::buffer& kinds, int rule, double lr, double weight_decay, double first,
              double second, bool nesterov, bool maximize) {
  const py::buffer_info infos[] = {params.request(), grads.request(),  momenta.request(),
                                   steps.request(),  numels.request(), kinds.request()};
  const std::int64_t count = infos[0].size;
  const auto* p = items<Address>(infos[0], count, "params");
  const auto* g = items<Address>(infos[1], count, "grads");
  const auto* m = items<Address>(infos[2], count, "momenta");
  const auto* s = items<Address>(infos[3], count, "steps");
  const auto* n = items<std::int64_t>(infos[4], count, "numels");
  const auto* k = items<std::uint8_t>(infos[5], count, "kinds");
  std::vector<MomentumTensor> tensors;
  tensors.reserve(std::size_t(count));
  for (std::int64_t i = 0; i < count; ++i) {
    MomentumTensor t = values_of(i, k[i], p[i], g[i], n[i], 0, n[i]);
    t.momentum = pointer<float>(m[i], n[i], kOp, "momenta");
    t.step = pointer<float>(s[i], 1, kOp, "steps");
    tensors.push_back(t);
  }
  const MomentumOptions options = options_of(rule, lr, weight_decay, first, second, nesterov, maximize);
  const py::gil_scoped_release release;
  momentum_cpu(tensors.data(), count, options);
}

struct Row {                    // made by pyfastpeft/optim/rule.py
  std::int64_t tensor, kind;    // in the tables of parameters and gradients
  std::int64_t first, n;        // of the tensor's values, in the order of memory
  std::int64_t step, momentum;  // offsets in the page
};

// The pieces of tables[i] have their state in [pages[i], pages[i] + page_bytes). At most `threads` threads, 0: all.
void momentum_pages(const std::vector<py::buffer>& tables, const std::vector<Address>& pages, std::int64_t page_bytes,
                    int threads, const py::buffer& params, const py::buffer& grads, const py::buffer& numels, int rule,
                    double lr, double weight_decay, double first, double second, bool nesterov, bool maximize) {
  const py::buffer_info infos[] = {params.request(), grads.request(), numels.request()};
  const std::int64_t count = infos[0].size;
  const auto* p = items<Address>(infos[0], count, "params");
  const auto* g = items<Address>(infos[1], count, "grads");
  const auto* numel = items<std::int64_t>(infos[2], count, "numels");
  check(tables.size() == pages.size(), kOp, ": ", tables.size(), " tables for ", pages.size(), " pages");
  std::vector<MomentumTensor> tensors;
  for (std::size_t page = 0; page < pages.size(); ++page) {
    const py::buffer_info info = tables[page].request();
    constexpr py::ssize_t kWords = sizeof(Row) / sizeof(std::int64_t);
    check(info.ndim == 1 && info.itemsize == 8 && info.size % kWords == 0, kOp, ": a table of ", info.size,
          " words of ", info.itemsize, " bytes, expected rows of ", kWords, " of 8");
    const auto* rows = static_cast<const Row*>(info.ptr);
    char* base = pointer<char>(pages[page], page_bytes, kOp, "page");
    const auto at = [&](std::int64_t offset, std::int64_t bytes) {
      check(offset >= 0 && offset % 4 == 0 && offset <= page_bytes - bytes, kOp, ": ", bytes, " bytes at ", offset,
            " of a page of ", page_bytes);
      return reinterpret_cast<float*>(base + offset);
    };
    for (std::int64_t i = 0; i < info.size / kWords; ++i) {
      const Row& row = rows[i];
      check(row.tensor >= 0 && row.tensor < count, kOp, ": row ", i, " is of tensor ", row.tensor, " of ", count);
      MomentumTensor t =
          values_of(row.tensor, row.kind, p[row.tensor], g[row.tensor], numel[row.tensor], row.first, row.n);
      t.momentum = at(row.momentum, row.n * 4);
      t.step = at(row.step, 4);
      tensors.push_back(t);
    }
  }
  const MomentumOptions options = options_of(rule, lr, weight_decay, first, second, nesterov, maximize);
  const py::gil_scoped_release release;
  const ThreadLimit limit(threads);
  momentum_cpu(tensors.data(), std::int64_t(tensors.size()), options);
}

}  // namespace

void register_momentum(py::module_& m) {
  m.def("momentum_cpu", &momentum);
  m.def("momentum_pages_cpu", &momentum_pages);
}

}  // namespace pyfastpeft
