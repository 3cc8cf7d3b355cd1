"""The kernels as functions. `torch.ops.pyfastpeft.<name>` is the flat form of each."""

from pyfastpeft.ops.adamw import adamw_
from pyfastpeft.ops.ia3 import ia3_scale
from pyfastpeft.ops.lora import linear_lora
from pyfastpeft.ops.nf4 import dequantize_4bit, quantize_4bit
from pyfastpeft.ops.nf4_matmul import linear_4bit
from pyfastpeft.ops.nf4_matmul_cuda import batch_invariant
from pyfastpeft.ops.nf4_matmul_ia3 import linear_4bit_ia3
from pyfastpeft.ops.segmented_lora import segmented_lora, segments

__all__ = [
    "adamw_", "batch_invariant", "dequantize_4bit", "ia3_scale", "linear_4bit", "linear_4bit_ia3", "linear_lora",
    "quantize_4bit", "segmented_lora", "segments",
]  # fmt: skip
