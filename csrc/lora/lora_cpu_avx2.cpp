// The low-rank products on AVX2.
#include "lora/lora_kernels.h"

namespace pyfastpeft {

void lora_mask_rows_avx2(std::uint64_t first, std::int64_t D, double p, std::uint64_t seed, std::uint32_t* bits,
                         std::int64_t begin, std::int64_t end) {
  lora_mask_rows(first, D, p, seed, bits, begin, end);
}
void lora_shrink_rows_avx2(const LoraShrinkArgs& args, std::int64_t begin, std::int64_t end) {
  lora_shrink_rows<VecAvx2>(args, begin, end);
}
void lora_expand_rows_avx2(const LoraExpandArgs& args, std::int64_t begin, std::int64_t end) {
  lora_expand_rows<VecAvx2>(args, begin, end);
}
void lora_accumulate_columns_avx2(const LoraAccumulateArgs& args, std::int64_t begin, std::int64_t end) {
  lora_accumulate_columns<VecAvx2>(args, begin, end);
}

}  // namespace pyfastpeft
