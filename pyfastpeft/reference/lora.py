"""LoRA in plain torch: the dropout mask and linear_lora, the specification of csrc/lora.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import math

import torch

from pyfastpeft.reference.philox import philox_u32


def dropout_mask(shape: tuple[int, ...], p: float, seed: int) -> torch.Tensor:
    """bool, True where a value is kept: iff the Philox number of its flat position, under the key `seed` and counter
    high word 0, is at least round(p · 2^32)."""
    return (philox_u32(math.prod(shape), 0, seed) >= math.floor(p * 2**32 + 0.5)).reshape(shape)


def dropout(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """x ⊙ mask / (1 - p), the mask over the flat positions of x; in x's dtype (give fp32 or fp64)."""
    if p == 0:
        return x
    kept = dropout_mask(tuple(x.shape), p, seed)
    return torch.where(kept, x * (1.0 / (1.0 - p) if p < 1 else 0.0), 0.0)


def linear_lora(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """y = x·Wᵀ + b + scaling · drop(x)·Aᵀ·Bᵀ, every operand taken to x's dtype first (give fp32 or fp64)."""
    y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if lora_a is None:
        return y
    dropped = dropout(x, dropout_p, int(seed)) if dropout_p else x
    return y + scaling * (dropped @ lora_a.to(x.dtype).t()) @ lora_b.to(x.dtype).t()
