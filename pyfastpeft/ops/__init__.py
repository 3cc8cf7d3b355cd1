"""The kernels as functions. `torch.ops.pyfastpeft.<name>` is the flat form of each."""

from pyfastpeft.ops.adamw import adamw_
from pyfastpeft.ops.ia3 import ia3_scale
from pyfastpeft.ops.lora import linear_lora
from pyfastpeft.ops.nf4 import dequantize_4bit, quantize_4bit
from pyfastpeft.ops.nf4_matmul import linear_4bit

__all__ = ["adamw_", "dequantize_4bit", "ia3_scale", "linear_4bit", "linear_lora", "quantize_4bit"]
