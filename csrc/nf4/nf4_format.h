// THE 4-bit weight format (bitsandbytes' layout), shared by every backend: host and device, no dependencies.
// README.md in this folder derives each rule and lists what bitsandbytes itself does differently.
//
// A weight [N, K] is row-major, contiguous and flattened to n = N·K values; blocks of `blocksize` values run over that
// flat array (they may straddle rows; the last one may be shorter). Per block: absmax = max |w| in fp32.
//
//   code(i)  = encode(w[i] · (1 / max(absmax, kAbsmaxFloor)))                          fp32, round to nearest
//   byte[j]  = code(2j) << 4 | code(2j + 1)                                            high nibble first
//   value(i) = table[code(i)] · absmax[i / blocksize]                                  fp32, then one cast
//
// Double quantisation stores absmax as 8 bits in blocks of 256, around its mean:
//
//   absmax[b] = nested_map[q[b]] · nested_absmax[b / 256] + offset                     multiply, then add: no FMA
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYFASTPEFT_HOST_DEVICE __host__ __device__
#else
#define PYFASTPEFT_HOST_DEVICE
#endif

// The tables as initialiser lists, so that device code can put them into __constant__ memory and vector code into
// registers without a second copy of a single digit. Hexadecimal floats: every bit is on the page.
#define PYFASTPEFT_NF4_TABLE                                                                                          \
  -0x1p+0f, -0x1.647362p-1f, -0x1.0cd66p-1f, -0x1.94654p-2f, -0x1.23449ap-2f, -0x1.7a6a7ep-3f, -0x1.74f0e2p-4f, 0.0f, \
      0x1.45f5fep-4f, 0x1.4995c6p-3f, 0x1.f809bap-3f, 0x1.5a0674p-2f, 0x1.c3497p-2f, 0x1.200f56p-1f, 0x1.722766p-1f,  \
      0x1p+0f
#define PYFASTPEFT_NF4_THRESHOLDS                                                                                    \
  -0x1.b239bp-1f, -0x1.38a4ep-1f, -0x1.d709p-2f, -0x1.5bd4ecp-2f, -0x1.e079d8p-3f, -0x1.1a7178p-3f, -0x1.74f0e2p-5f, \
      0x1.45f5fep-5f, 0x1.ec90c4p-4f, 0x1.a0cfcp-3f, 0x1.2b05a8p-2f, 0x1.8ea7f2p-2f, 0x1.00da08p-1f, 0x1.491b5ep-1f, \
      0x1.b913b4p-1f
#define PYFASTPEFT_FP4_TABLE                                                                             \
  0.0f, 0x1.555556p-8f, 0x1.555556p-1f, 0x1p+0f, 0x1.555556p-2f, 0x1p-1f, 0x1.555556p-3f, 0x1p-2f, 0.0f, \
      -0x1.555556p-8f, -0x1.555556p-1f, -0x1p+0f, -0x1.555556p-2f, -0x1p-1f, -0x1.555556p-3f, -0x1p-2f
// Between neighbouring magnitudes in ascending order (PYFASTPEFT_FP4_ASCENDING), applied to |x|.
#define PYFASTPEFT_FP4_THRESHOLDS \
  0x1.555556p-9f, 0x1.6p-4f, 0x1.aaaaacp-3f, 0x1.2aaaacp-2f, 0x1.aaaaacp-2f, 0x1.2aaaacp-1f, 0x1.aaaaacp-1f
#define PYFASTPEFT_FP4_ASCENDING 0, 1, 6, 7, 4, 5, 2, 3  // the code of each magnitude, smallest first

// Functions here are static: files compiled for different instruction sets must never share one out-of-line copy.
namespace pyfastpeft {

enum class QuantType : int { nf4 = 0, fp4 = 1 };

constexpr float kNf4Table[16] = {PYFASTPEFT_NF4_TABLE};
constexpr float kNf4Thresholds[15] = {PYFASTPEFT_NF4_THRESHOLDS};
constexpr float kFp4Table[16] = {PYFASTPEFT_FP4_TABLE};
constexpr float kFp4Thresholds[7] = {PYFASTPEFT_FP4_THRESHOLDS};
constexpr std::uint8_t kFp4Ascending[8] = {PYFASTPEFT_FP4_ASCENDING};

constexpr std::int64_t kMinBlocksize = 32;
constexpr std::int64_t kMaxBlocksize = 4096;
constexpr std::int64_t kNestedBlocksize = 256;  // blocks of the double quantisation
constexpr std::int64_t kNestedMapSize = 256;

// A block whose absmax is smaller is scaled as if it were this: 1 / absmax must stay finite. fp32 bits 006ce3ee.
constexpr float kAbsmaxFloor = 1e-38f;

// The low nibble of the last byte when n is odd, and every code of an all-zero block: the code of zero.
constexpr std::uint8_t kNf4Zero = 7;
constexpr std::uint8_t kFp4Zero = 0;

static constexpr PYFASTPEFT_HOST_DEVICE std::uint8_t zero_code(QuantType type) {
  return type == QuantType::nf4 ? kNf4Zero : kFp4Zero;
}
static constexpr PYFASTPEFT_HOST_DEVICE bool is_blocksize(std::int64_t blocksize) {
  return blocksize >= kMinBlocksize && blocksize <= kMaxBlocksize && (blocksize & (blocksize - 1)) == 0;
}
// How many bytes and statistics n values need. 64-bit throughout: n may exceed 2^31.
static constexpr PYFASTPEFT_HOST_DEVICE std::int64_t packed_bytes(std::int64_t n) { return n / 2 + n % 2; }
static constexpr PYFASTPEFT_HOST_DEVICE std::int64_t block_count(std::int64_t n, std::int64_t blocksize) {
  return n / blocksize + (n % blocksize != 0);
}
static constexpr PYFASTPEFT_HOST_DEVICE std::uint8_t pack(std::uint8_t even_code, std::uint8_t odd_code) {
  return static_cast<std::uint8_t>(even_code << 4 | odd_code);
}
static constexpr PYFASTPEFT_HOST_DEVICE std::uint8_t even_code(std::uint8_t byte) { return byte >> 4; }
static constexpr PYFASTPEFT_HOST_DEVICE std::uint8_t odd_code(std::uint8_t byte) { return byte & 15; }

// The code of a scaled value x in [-1, 1] (no NaN): how many thresholds lie strictly below it. Tables are parameters
// because device code keeps its own copy in constant memory. `static`: files compiled for different instruction sets
static constexpr PYFASTPEFT_HOST_DEVICE std::uint8_t encode_nf4(float x, const float* thresholds) {
  int code = 0;
  for (int i = 0; i < 15; ++i) code += thresholds[i] < x;
  return static_cast<std::uint8_t>(code);
}
// FP4 counts the thresholds below |x|; code + 8 is the negative. What rounds to zero has code 0 whatever its sign.
static constexpr PYFASTPEFT_HOST_DEVICE std::uint8_t encode_fp4(float x, const float* thresholds,
                                                                const std::uint8_t* ascending) {
  const float magnitude = x < 0 ? -x : x;
  int rank = 0;
  for (int i = 0; i < 7; ++i) rank += thresholds[i] < magnitude;
  return static_cast<std::uint8_t>(ascending[rank] + (rank > 0 && x < 0 ? 8 : 0));
}

// ---- what must hold, checked by every compiler that reads this file ----------------------------------------------
namespace nf4_format_checks {

constexpr bool nf4_holds() {
  for (int i = 0; i < 15; ++i) {
    if (!(kNf4Table[i] < kNf4Table[i + 1])) return false;
    if (kNf4Thresholds[i] != (kNf4Table[i] + kNf4Table[i + 1]) / 2) return false;
  }
  for (int i = 0; i < 16; ++i)  // every level encodes to itself
    if (encode_nf4(kNf4Table[i], kNf4Thresholds) != i) return false;
  return kNf4Table[kNf4Zero] == 0 && kNf4Table[0] == -1 && kNf4Table[15] == 1;
}
constexpr bool fp4_holds() {
  for (int i = 0; i < 7; ++i) {
    const float low = kFp4Table[kFp4Ascending[i]], high = kFp4Table[kFp4Ascending[i + 1]];
    if (!(low < high) || kFp4Thresholds[i] != (low + high) / 2) return false;
  }
  for (int i = 0; i < 8; ++i) {
    if (kFp4Table[i + 8] != -kFp4Table[i]) return false;
    if (encode_fp4(kFp4Table[i], kFp4Thresholds, kFp4Ascending) != i) return false;
    if (i > 0 && encode_fp4(-kFp4Table[i], kFp4Thresholds, kFp4Ascending) != i + 8) return false;
  }
  return kFp4Table[kFp4Zero] == 0 && kFp4Table[3] == 1;
}
static_assert(nf4_holds(), "NF4: thresholds are the fp32 midpoints of the levels, and levels encode to themselves");
static_assert(fp4_holds(), "FP4: thresholds are the fp32 midpoints of the magnitudes, and levels encode to themselves");
static_assert(kAbsmaxFloor == 0x1.b38fb8p-127f, "the floor is the float nearest 1e-38, a subnormal");
static_assert(1.0f / kAbsmaxFloor < 0x1p+127f, "its reciprocal is finite");
static_assert(pack(15, 1) == 0xf1 && even_code(0xf1) == 15 && odd_code(0xf1) == 1, "high nibble first");
static_assert(packed_bytes(5) == 3 && packed_bytes((std::int64_t{1} << 40) + 1) == (std::int64_t{1} << 39) + 1, "");
static_assert(block_count(0, 64) == 0 && block_count(64, 64) == 1 && block_count(65, 64) == 2, "");
static_assert(kMinBlocksize % 2 == 0, "a byte never belongs to two blocks");

}  // namespace nf4_format_checks
}  // namespace pyfastpeft
