// The scales of W's groups of 64 values, for kernels that read the packed bytes of whole groups (nf4_whole_groups).
#pragma once

#include "common/vec.h"
#include "nf4/nf4_matmul_cpu.h"

namespace pyfastpeft {
namespace {

// Where the scale of each group of 64 columns is found.
//   plain    base[block]
//   nested   the 256 scales a nested block may have are computed once (2 vector operations for 16), then
//            base[nested block · 256 + code]
struct Nf4Scales {
  const float* base;
  const std::uint8_t* codes;  // nested only
  std::int64_t origin;        // nested: the first value of `base`, nested block · 256
  int shift;                  // log2(groups per block)

  template <bool nested>
  float at(std::int64_t group) const {
    const std::int64_t block = group >> shift;
    if (!nested) return base[block];
    return base[((block & ~(kNestedBlocksize - 1)) - origin) + codes[block]];
  }
};

// Room for the scales of the nested blocks of some rows, which may begin and end within one.
inline std::int64_t nf4_scale_table(const Nf4Matrix& w, std::int64_t rows) {
  if (w.absmax.plain != nullptr) return 0;
  return (rows * w.K / w.blocksize / kNestedBlocksize + 2) * kNestedBlocksize;
}

// The scales of `rows` rows from row n on, `table` keeps those of nested blocks.
template <typename V>
Nf4Scales nf4_scales(const Nf4Matrix& w, std::int64_t n, std::int64_t rows, float* table) {
  const std::int64_t per_row = w.K / kNf4Group, first = n * per_row;
  int shift = 0;
  while (kNf4Group << shift < w.blocksize) ++shift;
  if (w.absmax.plain != nullptr) return {w.absmax.plain, nullptr, 0, shift};
  const std::int64_t begin = (first >> shift) / kNestedBlocksize;
  const std::int64_t end = ((first + rows * per_row - 1) >> shift) / kNestedBlocksize + 1;
  const V offset = V::set(*w.absmax.offset);
  for (std::int64_t b = begin; b < end; ++b) {
    const V scale = V::set(w.absmax.nested_absmax[b]);
    for (std::int64_t i = 0; i < kNestedBlocksize; i += V::width)  // a multiply, then an add: the format's
      (V::load(w.absmax.nested_map + i) * scale + offset).store(table + (b - begin) * kNestedBlocksize + i);
  }
  return {table, w.absmax.codes, begin * kNestedBlocksize, shift};
}

}  // namespace
}  // namespace pyfastpeft
