"""LoRA (Hu et al. 2021, arXiv:2106.09685), and QLoRA where the base is quantised."""

from pyfastpeft.methods.lora.attention import LoraAttention
from pyfastpeft.methods.lora.config import LoraConfig
from pyfastpeft.methods.lora.layer import LoraLinear
from pyfastpeft.methods.lora.method import LoraMethod
from pyfastpeft.methods.lora.tables import LoraConv, LoraConvTranspose, LoraEmbedding

__all__ = ["LoraAttention", "LoraConfig", "LoraConv", "LoraConvTranspose", "LoraEmbedding", "LoraLinear", "LoraMethod"]
