// Lists of tensors as Python hands them over: buffers of 64-bit integers, and for state that lies in pages a table of rows
// for each page. What memory safety rests on is checked here, for every optimizer.
#pragma once

#include <pybind11/stl.h>

#include <vector>

#include "common/bind.h"

namespace pyfastpeft {

template <typename T>
const T* items(const py::buffer_info& info, std::int64_t count, const char* op, const char* name) {
  check(info.ndim == 1 && info.itemsize == py::ssize_t(sizeof(T)) && info.size == count, op, ": the table of ", name,
        " has ", info.size, " entries of ", info.itemsize, " bytes, expected ", count, " of ", sizeof(T));
  return static_cast<const T*>(info.ptr);
}

// Bits 0-1 of a kind are the parameter's dtype code, 2-3 the gradient's: the same, or f32.
inline bool is_kind(std::int64_t kind) {
  const std::int64_t param = kind & 3, grad = (kind >> 2) & 3;
  return param < 3 && (grad == param || grad == int(DType::f32));
}

// Parameters and gradients of which parts are stepped.
class WholeTensors {
 public:
  WholeTensors(const py::buffer& params, const py::buffer& grads, const py::buffer& numels, const char* op)
      : op_(op), infos_{params.request(), grads.request(), numels.request()}, count_(infos_[0].size) {
    params_ = items<Address>(infos_[0], count_, op, "params");
    grads_ = items<Address>(infos_[1], count_, op, "grads");
    numels_ = items<std::int64_t>(infos_[2], count_, op, "numels");
  }

  // Sets param, grad, n and the dtypes of a T to values [first, first + n) of a tensor, which are in the order of memory.
  template <typename T>
  void set_part(T& part, std::int64_t tensor, std::int64_t kind, std::int64_t first, std::int64_t n) const {
    check(tensor >= 0 && tensor < count_, op_, ": a piece is of tensor ", tensor, " of ", count_);
    const std::int64_t numel = numels_[tensor];
    check(numel >= 0 && first >= 0 && n >= 0 && first <= numel - n && is_kind(kind), op_, ": params[", tensor,
          "] has values ", first, " to ", first + n, " of ", numel, " and kind ", kind);
    part.param_dtype = DType(kind & 3);
    part.grad_dtype = DType((kind >> 2) & 3);
    part.n = n;
    const auto skip = [&](DType dtype) { return first * (dtype == DType::f32 ? 4 : 2); };
    part.param = static_cast<char*>(pointer<void>(params_[tensor], numel, part.param_dtype, op_, "params")) +
                 skip(part.param_dtype);
    part.grad = static_cast<const char*>(pointer<const void>(grads_[tensor], numel, part.grad_dtype, op_, "grads")) +
                skip(part.grad_dtype);
  }

 private:
  const char* op_;
  py::buffer_info infos_[3];
  std::int64_t count_;
  const Address *params_, *grads_;
  const std::int64_t* numels_;
};

// One page of state.
struct StatePage {
  char* base;
  std::int64_t bytes;
  const char* op;

  template <typename T>
  T* at(std::int64_t offset, std::int64_t nbytes) const {
    check(offset >= 0 && offset % 4 == 0 && offset <= bytes - nbytes, op, ": ", nbytes, " bytes at ", offset,
          " of a page of ", bytes);
    return reinterpret_cast<T*>(base + offset);
  }
};

// Calls f(row, page) for the rows of tables[i], structs of 64-bit integers whose state lies in
// [pages[i], pages[i] + page_bytes).
template <typename Row, typename F>
void each_row(const std::vector<py::buffer>& tables, const std::vector<Address>& pages, std::int64_t page_bytes,
              const char* op, F&& f) {
  constexpr py::ssize_t kWords = sizeof(Row) / sizeof(std::int64_t);
  check(tables.size() == pages.size(), op, ": ", tables.size(), " tables for ", pages.size(), " pages");
  for (std::size_t i = 0; i < pages.size(); ++i) {
    const py::buffer_info info = tables[i].request();
    check(info.ndim == 1 && info.itemsize == 8 && info.size % kWords == 0, op, ": a table of ", info.size, " words of ",
          info.itemsize, " bytes, expected rows of ", kWords, " of 8");
    const StatePage page{pointer<char>(pages[i], page_bytes, op, "page"), page_bytes, op};
    const auto* rows = static_cast<const Row*>(info.ptr);
    for (std::int64_t row = 0; row < info.size / kWords; ++row) f(rows[row], page);
  }
}

}  // namespace pyfastpeft
