// The AMX kernel's source with its instructions replaced by their twin (csrc/common/amx_tiles.h), as a shared library for
// tests/ops/test_linear_4bit_amx.py: runs on any machine, on the calling thread.
#define PYFASTPEFT_AMX_TWIN
#include "nf4/nf4_matmul_cpu_amx.cpp"

using namespace pyfastpeft;

namespace {
// One scale per group of 64 or per block, as nf4_matmul_cpu.cpp's does, value by value.
float value(const Nf4Matrix& w, std::int64_t i) {
  const std::int64_t b = i / w.blocksize;
  const Nf4Absmax& a = w.absmax;
  const float absmax =
      a.plain != nullptr ? a.plain[b] : a.nested_map[a.codes[b]] * a.nested_absmax[b / kNestedBlocksize] + *a.offset;
  const std::uint8_t byte = w.packed[i / 2];
  const float* const table = w.type == QuantType::nf4 ? kNf4Table : kFp4Table;
  return table[i % 2 == 0 ? even_code(byte) : odd_code(byte)] * absmax;
}
}  // namespace

namespace pyfastpeft {
void nf4_decode_values(const Nf4Matrix& w, std::int64_t first, std::int64_t count, DType, void* out) {  // bf16 alone
  for (std::int64_t i = 0; i < count; ++i) static_cast<bf16*>(out)[i] = from_f32<bf16>(value(w, first + i));
}
}  // namespace pyfastpeft

// y [M, N] = x [M, K]·Wᵀ + s [M, R]·bᵀ + bias; rows of W in `parts` calls, as threads would take them.
extern "C" void panel_amx_twin(const std::uint8_t* packed, const float* absmax, const std::uint8_t* codes,
                               const float* nested_absmax, const float* nested_map, const float* offset, std::int64_t N,
                               std::int64_t K, std::int64_t blocksize, int fp4, const void* x, std::int64_t M,
                               const float* bias, const float* s, const float* b, std::int64_t R, std::int64_t parts,
                               void* y) {
  const Nf4Matrix w{packed,    {codes == nullptr ? absmax : nullptr, codes, nested_absmax, nested_map, offset},
                    N,         K,
                    blocksize, fp4 ? QuantType::fp4 : QuantType::nf4};
  const Nf4PanelColumns columns = nf4_panel_columns(w, R);
  const std::unique_ptr<char[]> space(new char[std::size_t((M + 15) / 16 * 16 * columns.end * 2 + 64)]);
  char* const v = space.get() + (64 - reinterpret_cast<std::uintptr_t>(space.get()) % 64) % 64;
  const Nf4PanelArgs args{&w,
                          static_cast<const bf16*>(x),
                          M,
                          bias,
                          s,
                          b,
                          R,
                          columns.low_rank,
                          columns.end,
                          reinterpret_cast<bf16*>(v),
                          static_cast<bf16*>(y)};
  for (std::int64_t group = 0; 16 * group < M; ++group) nf4_panel_amx_twin.pack(args, group);
  const std::int64_t step = ((N + 15) / 16 + parts - 1) / parts * 16;
  for (std::int64_t n = 0; n < N; n += step) nf4_panel_amx_twin.rows(args, n, std::min(N, n + step));
}

// dx [M, K] = dy [M, N]·W + ds [M, R]·a [R, K]; columns in `parts` calls.
extern "C" void backward_amx_twin(const std::uint8_t* packed, const float* absmax, const std::uint8_t* codes,
                                  const float* nested_absmax, const float* nested_map, const float* offset,
                                  std::int64_t N, std::int64_t K, std::int64_t blocksize, int fp4, const void* dy,
                                  std::int64_t M, const float* ds, const float* a, std::int64_t R, std::int64_t parts,
                                  void* dx) {
  const Nf4Matrix w{packed,    {codes == nullptr ? absmax : nullptr, codes, nested_absmax, nested_map, offset},
                    N,         K,
                    blocksize, fp4 ? QuantType::fp4 : QuantType::nf4};
  const Nf4BackwardVariant& way = nf4_backward_bf16_amx_twin;
  const std::int64_t low_rank = (N + way.pad - 1) / way.pad * way.pad,
                     terms = low_rank + (R + way.pad - 1) / way.pad * way.pad;
  const std::int64_t tokens = nf4_backward_tokens(M), chunks = (terms + way.chunk - 1) / way.chunk;
  const std::unique_ptr<char[]> space(new char[std::size_t(chunks * tokens * way.stride * way.size)]);
  const Nf4BackwardArgs args{&w, dy, M, DType::bf16, ds, a, R, low_rank, terms, space.get(), dx};
  way.pack(args, 0, tokens);
  const std::int64_t units = (K + kNf4Group - 1) / kNf4Group, step = (units + parts - 1) / parts;
  for (std::int64_t u = 0; u < units; u += step) way.columns(args, u, std::min(units, u + step));
}

// c [16, 16] += a [16, 32]·b [16, 16, 2], one tile instruction.
extern "C" void tdpbf16ps_twin(float* c, const void* a, const void* b) {
  const AmxTiles tiles;
  amx_load<0>(c, 64);
  amx_load<1>(a, 64);
  amx_load<2>(b, 64);
  amx_dot<0, 1, 2>();
  amx_store<0>(c, 64);
}
