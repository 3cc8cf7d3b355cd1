"""linear_4bit in plain torch: the specification of csrc/nf4/nf4_matmul.h with csrc/lora."""

from __future__ import annotations

import torch

from pyfastpeft.quantized_tensor import QuantizedTensor
from pyfastpeft.reference import nf4
from pyfastpeft.reference.lora import linear_lora


def linear_4bit(
    x: torch.Tensor,
    q: QuantizedTensor,
    bias: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """reference.lora.linear_lora over W, the fp32 values of q (table value · absmax); computed in x's dtype."""
    weight = nf4.dequantize_4bit(*q.flat()[:-1], torch.float32)
    return linear_lora(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed)
