"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): low-rank updates whose ranks are allocated during training."""

from pyfastpeft.methods.adalora.allocation import RankAllocator, budget_at
from pyfastpeft.methods.adalora.config import AdaLoraConfig
from pyfastpeft.methods.adalora.layer import AdaLoraLinear
from pyfastpeft.methods.adalora.method import AdaLoraMethod

__all__ = ["AdaLoraConfig", "AdaLoraLinear", "AdaLoraMethod", "RankAllocator", "budget_at"]
