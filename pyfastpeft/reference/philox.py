"""Philox4x32-10 in plain torch: the specification of csrc/common/philox.h.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Four 32-bit numbers as a pure function of a
128-bit counter and a 64-bit key.
"""

import torch

_MASK = 0xFFFFFFFF


def _multiply(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of the 64-bit product, in 16-bit halves: int64 would overflow its sign."""
    low = constant * (word & 0xFFFF)
    high = constant * (word >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter_low: torch.Tensor, counter_high: int, key: int) -> torch.Tensor:
    """counter_low int64 [n] → int64 [n, 4], values in [0, 2^32)."""
    c0, c1 = counter_low & _MASK, (counter_low >> 32) & _MASK
    c2, c3 = torch.full_like(c0, counter_high & _MASK), torch.full_like(c0, (counter_high >> 32) & _MASK)
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def philox_u32(numel: int, counter_high: int, key: int) -> torch.Tensor:
    """The number of each flat position i < numel: lane i % 4 of counter i // 4. int64 [numel]."""
    counters = torch.arange((numel + 3) // 4, dtype=torch.int64)
    return philox(counters, counter_high, key).reshape(-1)[:numel]
