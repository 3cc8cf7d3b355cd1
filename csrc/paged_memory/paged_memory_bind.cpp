// Python's way to paged memory. Addresses are integers; pyfastpeft/paged_memory.py gives them a shape.
#include <pybind11/stl.h>

#include <cstring>

#include "common/bind.h"
#include "paged_memory/managed_memory.h"
#include "paged_memory/paged_memory.h"

namespace pyfastpeft {
namespace {

// Copies between a part of a page and memory outside.
void copy(PagedMemory& memory, std::int64_t page, std::int64_t offset, Address address, std::int64_t bytes,
          bool write) {
  const std::int64_t size = memory.stats().page_bytes;
  check(offset >= 0 && bytes >= 0 && offset <= size - bytes, "paged memory: bytes ", offset, " to ", offset + bytes,
        " of a page of ", size);
  char* outside = pointer<char>(address, bytes, "paged memory", "the buffer");
  const py::gil_scoped_release release;
  char* inside = static_cast<char*>(memory.acquire(page)) + offset;
  std::memcpy(write ? inside : outside, write ? outside : inside, std::size_t(bytes));
  memory.release(page, write);
}

py::dict stats(const PagedMemory& memory) {
  const PagedMemoryStats s = memory.stats();
  py::dict result;
  result["pages"] = s.pages;
  result["frames"] = s.frames;
  result["page_bytes"] = s.page_bytes;
  result["resident_pages"] = s.resident_pages;
  result["peak_resident_pages"] = s.peak_resident_pages;
  result["dirty_pages"] = s.dirty_pages;
  result["held_pages"] = s.held_pages;
  result["pages_in"] = s.pages_in;
  result["pages_out"] = s.pages_out;
  result["acquires"] = s.acquires;
  result["waits"] = s.waits;
  result["seconds_waited"] = s.seconds_waited;
  result["seconds_reading"] = s.seconds_reading;
  result["seconds_writing"] = s.seconds_writing;
  result["spill_file_bytes"] = s.spill_file_bytes;
  result["direct_io"] = s.direct_io;
  return result;
}

py::list events(const PagedMemory& memory) {
  constexpr const char* kNames[] = {"read", "write", "wait"};
  py::list result;
  for (const PagedMemoryEvent& e : memory.events())
    result.append(py::make_tuple(kNames[e.kind], e.thread, e.page, e.begin_ns, e.end_ns));
  return result;
}

}  // namespace

void register_paged_memory(py::module_& m) {
  // An OSError with its errno, so that `except OSError` and a look at errno.ENOSPC work.
  static PyObject* spill_error = nullptr;
  if (spill_error == nullptr) {
    spill_error = PyErr_NewExceptionWithDoc(
        "pyfastpeft.paged_memory.SpillError",
        "The spill file could not be made, enlarged, read or written. No content was lost by it.", PyExc_OSError,
        nullptr);
    if (spill_error == nullptr) throw py::error_already_set();
  }
  m.attr("SpillError") = py::reinterpret_borrow<py::object>(spill_error);
  py::register_local_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const SpillError& error) {
      PyErr_SetObject(spill_error, py::make_tuple(error.code, error.what()).ptr());
    }
  });

  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<PagedMemory>(m, "PagedMemory", py::module_local())
      .def(py::init([](std::int64_t page_bytes, std::int64_t resident_bytes, std::string spill_folder,
                       std::int64_t look_ahead, int io_threads, bool direct_io) {
             return std::make_unique<PagedMemory>(PagedMemoryOptions{
                 page_bytes, resident_bytes, std::move(spill_folder), look_ahead, io_threads, direct_io});
           }),
           py::arg("page_bytes"), py::arg("resident_bytes"), py::arg("spill_folder"), py::arg("look_ahead"),
           py::arg("io_threads"), py::arg("direct_io"))
      .def("add_pages", &PagedMemory::add_pages, Release())
      .def("set_order",
           [](PagedMemory& memory, const std::vector<std::int64_t>& order) {
             const py::gil_scoped_release release;
             memory.set_order(order);
           })
      .def(
          "acquire", [](PagedMemory& memory, std::int64_t page) { return Address(memory.acquire(page)); }, Release())
      .def("try_acquire", [](PagedMemory& memory, std::int64_t page) { return Address(memory.try_acquire(page)); })
      .def("release", &PagedMemory::release, Release())
      .def("discard", &PagedMemory::discard, Release())
      .def("prefetch", &PagedMemory::prefetch, Release())
      .def("read", [](PagedMemory& memory, std::int64_t page, std::int64_t offset, Address to,
                      std::int64_t bytes) { copy(memory, page, offset, to, bytes, false); })
      .def("write", [](PagedMemory& memory, std::int64_t page, std::int64_t offset, Address from,
                       std::int64_t bytes) { copy(memory, page, offset, from, bytes, true); })
      .def("frames", [](const PagedMemory& memory) { return Address(memory.frames()); })
      .def("resident",
           [](const PagedMemory& memory) {
             py::list result;
             for (const bool is : memory.resident()) result.append(is);
             return result;
           })
      .def("stats", &stats)
      .def("record_events", &PagedMemory::record_events)
      .def("events", &events);
  m.def("is_in_memory", &is_in_memory, py::arg("folder"));
  m.def("inject_spill_fault", &inject_spill_fault, py::arg("op"), py::arg("error"), py::arg("after") = 0,
        py::arg("times") = 1, py::arg("seconds") = 0.0);
  m.def("clear_spill_faults", &clear_spill_faults);
#if defined(PYFASTPEFT_WITH_CUDA)
  py::class_<ManagedMemory>(m, "ManagedMemory", py::module_local())
      .def_static("available", &ManagedMemory::available, py::arg("device"))
      .def(py::init<std::int64_t, int>(), py::arg("bytes"), py::arg("device"), Release())
      .def("address", [](const ManagedMemory& memory) { return Address(memory.get()); })
      .def(
          "prefetch",
          [](const ManagedMemory& memory, std::int64_t offset, std::int64_t bytes, Address stream) {
            memory.prefetch(offset, bytes, reinterpret_cast<void*>(stream));
          },
          py::arg("offset"), py::arg("bytes"), py::arg("stream"), Release());
#endif
}

}  // namespace pyfastpeft
