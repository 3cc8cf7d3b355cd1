"""pyfastpeft: parameter-efficient fine-tuning at the speed of the hardware."""

from pyfastpeft import nn, ops
from pyfastpeft.build_info import build_info
from pyfastpeft.quantized_tensor import QuantizedTensor

__all__ = ["QuantizedTensor", "build_info", "nn", "ops"]
__version__ = build_info()["version"]
