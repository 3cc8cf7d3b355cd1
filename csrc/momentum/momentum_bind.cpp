// Python's way to Lion and SGD. A call is rows of 64-bit integers: parameters of whole tensors or of parts whose state lies
// in a page. What memory safety rests on is checked here, layouts by pyfastpeft/optim/rule.py.
#include "common/bind_tables.h"
#include "common/parallel.h"
#include "momentum/momentum.h"

namespace pyfastpeft {
namespace {

constexpr const char* kOp = "momentum_";

MomentumOptions options_of(int rule, double lr, double weight_decay, double first, double second, bool nesterov,
                           bool maximize) {
  check(rule == int(MomentumRule::kLion) || rule == int(MomentumRule::kSgd), kOp, ": rule is ", rule,
        ", expected 0 or 1");
  return {MomentumRule(rule), lr, weight_decay, first, second, nesterov, maximize};
}

void momentum(const py::buffer& params, const py::buffer& grads, const py::buffer& momenta, const py::buffer& steps,
              const py::buffer& numels, const py::buffer& kinds, int rule, double lr, double weight_decay, double first,
              double second, bool nesterov, bool maximize) {
  const WholeTensors whole(params, grads, numels, kOp);
  const py::buffer_info infos[] = {momenta.request(), steps.request(), kinds.request(), numels.request()};
  const std::int64_t count = infos[3].size;
  const auto* m = items<Address>(infos[0], count, kOp, "momenta");
  const auto* s = items<Address>(infos[1], count, kOp, "steps");
  const auto* k = items<std::uint8_t>(infos[2], count, kOp, "kinds");
  const auto* n = items<std::int64_t>(infos[3], count, kOp, "numels");
  std::vector<MomentumTensor> tensors(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    MomentumTensor& t = tensors[std::size_t(i)];
    whole.set_part(t, i, k[i], 0, n[i]);
    t.momentum = pointer<float>(m[i], n[i], kOp, "momenta");
    t.step = pointer<float>(s[i], 1, kOp, "steps");
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

// At most `threads` threads, 0: all.
void momentum_pages(const std::vector<py::buffer>& tables, const std::vector<Address>& pages, std::int64_t page_bytes,
                    int threads, const py::buffer& params, const py::buffer& grads, const py::buffer& numels, int rule,
                    double lr, double weight_decay, double first, double second, bool nesterov, bool maximize) {
  const WholeTensors whole(params, grads, numels, kOp);
  std::vector<MomentumTensor> tensors;
  each_row<Row>(tables, pages, page_bytes, kOp, [&](const Row& row, const StatePage& page) {
    MomentumTensor t;
    whole.set_part(t, row.tensor, row.kind, row.first, row.n);
    t.momentum = page.at<float>(row.momentum, row.n * 4);
    t.step = page.at<float>(row.step, 4);
    tensors.push_back(t);
  });
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
