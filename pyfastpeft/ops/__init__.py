"""The kernels as functions. `torch.ops.pyfastpeft.<name>` is the flat form of each."""

from pyfastpeft.ops.nf4 import dequantize_4bit, quantize_4bit

__all__ = ["dequantize_4bit", "quantize_4bit"]
