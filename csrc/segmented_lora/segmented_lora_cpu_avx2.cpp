// LoRA over a mixed batch on AVX2.
#include "segmented_lora/segmented_lora_kernels.h"

namespace pyfastpeft {

void segmented_shrink_avx2(const SegmentedCpuArgs& args, std::int64_t begin, std::int64_t end) {
  segmented_shrink<VecAvx2>(args, begin, end);
}
void segmented_expand_avx2(const SegmentedCpuArgs& args, std::int64_t begin, std::int64_t end) {
  segmented_expand<VecAvx2>(args, begin, end);
}

}  // namespace pyfastpeft
