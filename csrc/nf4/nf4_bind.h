// What the bindings of the 4-bit ops share: the checks of a quantised weight as Python hands it over.
#pragma once

#include <string>

#include "common/bind.h"
#include "nf4/nf4.h"

namespace pyfastpeft {

inline QuantType quant_type(const std::string& name, const char* op) {
  if (name == "nf4") return QuantType::nf4;
  if (name == "fp4") return QuantType::fp4;
  throw std::invalid_argument(message(op, ": quant_type is '", name, "', expected 'nf4' or 'fp4'"));
}

inline void check_blocksize(std::int64_t blocksize, const char* op) {
  check(is_blocksize(blocksize), op, ": blocksize is ", blocksize,
        ", expected a power of two from 32 to 4096 (bitsandbytes' default is 64)");
}

inline DType dtype_of(int code, const char* op) {
  check(code >= int(DType::f32) && code <= int(DType::bf16), op, ": dtype code is ", code,
        ", expected 0 (float32), 1 (float16) or 2 (bfloat16)");
  return DType(code);
}

inline void check_count(std::int64_t got, std::int64_t expected, const char* op, const char* name,
                        const std::string& why) {
  check(got == expected, op, ": ", name, " has ", got, " values, expected ", expected, " (= ", why, ")");
}

// The statistics of `blocks` blocks; offset = 0 says that absmax is plain fp32. (Not nested_map = 0: an empty
// tensor's address is 0 too, and uint8 codes would be read as fp32.)
inline Nf4Absmax checked_absmax(Address absmax, std::int64_t absmax_numel, Address nested_absmax,
                                std::int64_t nested_numel, Address nested_map, std::int64_t map_numel, Address offset,
                                std::int64_t blocks, const std::string& why, const char* op) {
  check_count(absmax_numel, blocks, op, "absmax", why);
  Nf4Absmax scales{};
  if (offset != 0) {
    check_count(nested_numel, block_count(blocks, kNestedBlocksize), op, "nested_absmax",
                message("ceil(", blocks, " blocks / 256)"));
    check_count(map_numel, kNestedMapSize, op, "nested_map", "the entries of an 8-bit map");
    scales.codes = pointer<const std::uint8_t>(absmax, absmax_numel, op, "absmax");
    scales.nested_absmax = pointer<const float>(nested_absmax, nested_numel, op, "nested_absmax");
    scales.nested_map = pointer<const float>(nested_map, map_numel, op, "nested_map");
    scales.offset = pointer<const float>(offset, 1, op, "offset");
  } else {
    scales.plain = pointer<const float>(absmax, absmax_numel, op, "absmax");
  }
  return scales;
}

}  // namespace pyfastpeft
