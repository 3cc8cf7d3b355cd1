"""LoRA (Hu et al. 2021, arXiv:2106.09685), and QLoRA where the base is quantised."""

from pyfastpeft.methods.lora.config import LoraConfig
from pyfastpeft.methods.lora.layer import LoraLinear
from pyfastpeft.methods.lora.method import LoraMethod

__all__ = ["LoraConfig", "LoraLinear", "LoraMethod"]
