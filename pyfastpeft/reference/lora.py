"""The low-rank path in plain torch: Philox dropout and linear_lora, the specification of the kernels.

LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, eq. 3.
"""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _mulhilo(a: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and low 32 bits of a·m for a in [0, 2^32), in int64 arithmetic (by 16-bit halves: it has no 64-bit product)."""
    low, high = a & 0xFFFF, a >> 16
    first, second = low * m, high * m  # each below 2^48
    middle = (first >> 16) + second
    return middle >> 16, ((middle & 0xFFFF) << 16) | (first & 0xFFFF)


def philox4x32_10(counter: torch.Tensor, seed: int) -> torch.Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011) of counters (counter[i], 0) under a 64-bit key: int64 [len, 4] in [0, 2^32)."""
    seed &= 0xFFFFFFFFFFFFFFFF
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _LOW, seed >> 32
    for _ in range(10):
        high0, low0 = _mulhilo(c0, _MULTIPLIERS[0])
        high1, low1 = _mulhilo(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


def dropout_mask(shape: tuple[int, ...], p: float, seed: int) -> torch.Tensor:
    """bool, True where a value is kept: u32(seed, flat position) >= round(p·2^32); element i uses counter i//4, lane i%4."""
    n = 1
    for size in shape:
        n *= size
    random = philox4x32_10(torch.arange((n + 3) // 4), seed).reshape(-1)[:n]
    return (random >= int(float(torch.tensor(p, dtype=torch.float32)) * 4294967296.0 + 0.5)).reshape(shape)


def dropout(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """x ⊙ mask / (1 - p), the mask over the flat positions of x."""
    if p == 0:
        return x
    mask = dropout_mask(tuple(x.shape), p, seed)
    return torch.where(mask, x * (1.0 / (1.0 - p) if p < 1 else 0.0), torch.zeros_like(x))


def linear_lora(x, weight, bias, lora_a, lora_b, scaling=1.0, dropout_p=0.0, seed=None):
    """y = x·Wᵀ + b + scaling · drop(x)·Aᵀ·Bᵀ, every operand taken to x's dtype first (give fp32 or fp64 for a reference)."""
    y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if lora_a is None:
        return y
    dropped = dropout(x, dropout_p, int(seed)) if dropout_p else x
    return y + scaling * (dropped @ lora_a.to(x.dtype).T) @ lora_b.to(x.dtype).T
