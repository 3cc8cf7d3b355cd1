"""pyfastpeft: parameter-efficient fine-tuning at the speed of the hardware."""

from pyfastpeft import ops
from pyfastpeft.quantized_tensor import QuantizedTensor

__all__ = ["QuantizedTensor", "ops"]
