// Errors that reach Python: std::invalid_argument becomes ValueError, std::runtime_error RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace pyfastpeft {

// `static`, here and in every header of the kernels: a function that several files share is linked once, and the copy
// chosen may come from a file compiled for an instruction set this machine lacks (tests/build/test_isa_files.py).
template <typename... Parts>
static std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// check(cond, "what", value, ...): throws ValueError with the joined parts. Say what, expected, got, way out.
template <typename... Parts>
static void check(bool ok, const Parts&... parts) {
  if (!ok) throw std::invalid_argument(message(parts...));
}

}  // namespace pyfastpeft
