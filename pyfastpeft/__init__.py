"""pyfastpeft: parameter-efficient fine-tuning at the speed of the hardware."""

from pyfastpeft import nn, ops
from pyfastpeft.build_info import build_info
from pyfastpeft.nn.load_quantized import load_quantized_state_dict
from pyfastpeft.quantize_model import dequantize_model, quantize_model
from pyfastpeft.quantized_tensor import QuantizedTensor

__all__ = [
    "QuantizedTensor",
    "build_info",
    "dequantize_model",
    "load_quantized_state_dict",
    "nn",
    "ops",
    "quantize_model",
]
__version__ = build_info()["version"]
