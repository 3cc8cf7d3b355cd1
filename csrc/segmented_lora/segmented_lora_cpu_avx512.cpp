// LoRA over a mixed batch on AVX-512.
#include "segmented_lora/segmented_lora_backward_kernels.h"
#include "segmented_lora/segmented_lora_kernels.h"

namespace pyfastpeft {

const SegmentedVariants segmented_avx512 = {segmented_shrink<VecAvx512>, segmented_expand<VecAvx512>,
                                            segmented_project<VecAvx512>, segmented_spread<VecAvx512>,
                                            segmented_gather<VecAvx512>};

}  // namespace pyfastpeft
