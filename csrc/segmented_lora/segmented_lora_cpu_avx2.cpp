// LoRA over a mixed batch on AVX2.
#include "segmented_lora/segmented_lora_backward_kernels.h"
#include "segmented_lora/segmented_lora_kernels.h"

namespace pyfastpeft {

const SegmentedVariants segmented_avx2 = {segmented_shrink<VecAvx2>, segmented_expand<VecAvx2>,
                                          segmented_project<VecAvx2>, segmented_spread<VecAvx2>,
                                          segmented_gather<VecAvx2>};

}  // namespace pyfastpeft
