// Errors that reach Python: std::invalid_argument becomes ValueError, std::runtime_error RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace pyfastpeft {

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// check(cond, "what", value, ...): throws ValueError with the joined parts. Say what, expected, got, way out.
template <typename... Parts>
inline void check(bool ok, const Parts&... parts) {
  if (!ok) throw std::invalid_argument(message(parts...));
}

}  // namespace pyfastpeft
