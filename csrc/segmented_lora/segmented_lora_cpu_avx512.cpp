// LoRA over a mixed batch on AVX-512.
#include "segmented_lora/segmented_lora_kernels.h"

namespace pyfastpeft {

void segmented_shrink_avx512(const SegmentedCpuArgs& args, std::int64_t begin, std::int64_t end) {
  segmented_shrink<VecAvx512>(args, begin, end);
}
void segmented_expand_avx512(const SegmentedCpuArgs& args, std::int64_t begin, std::int64_t end) {
  segmented_expand<VecAvx512>(args, begin, end);
}

}  // namespace pyfastpeft
