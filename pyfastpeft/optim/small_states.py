"""State of small tensors, side by side in memory."""

from __future__ import annotations

from typing import Any

import torch

CHUNK = 1 << 18  # values, at most, of a piece of memory that states share
LARGEST = 1 << 14  # values of a tensor that counts as small
_LINE = 16  # values: each begins at a cache line of its own


class SmallStates:
    """zeros_like() for state. Small contiguous CPU tensors are views into chunks, in the order in which they are asked for.

    Ten thousand tensors each somewhere else in memory are ten thousand places that the processor cannot foresee, three or
    four times a step; side by side a step reads them as it reads one large tensor. A chunk is freed with its last state.
    """

    def __init__(self) -> None:
        self._total = (
            0  # values handed out; chunks grow with it, so that little is left over (and saved with the others)
        )
        self._chunks: dict[torch.dtype, tuple[torch.Tensor, int]] = {}  # with how many values are taken

    def zeros_like(self, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        n = p.numel()
        if n > LARGEST or p.device.type != "cpu" or not p.is_contiguous():
            return torch.zeros_like(p, dtype=dtype)
        return self._take(dtype, n).view(p.shape)

    def step(self, device: torch.device) -> torch.Tensor:
        """A count of steps, 0."""
        if device.type != "cpu":
            return torch.zeros((), dtype=torch.float32, device=device)
        return self._take(torch.float32, 1).view(())

    def placed(self, p: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """A state that was loaded, what is small of it copied to its place."""
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.is_contiguous():
                if value.numel() == 1:
                    state[key] = self._take(value.dtype, 1).view(value.shape).copy_(value)
                elif value.shape == p.shape and value.numel() <= LARGEST:
                    state[key] = self._take(value.dtype, value.numel()).view(value.shape).copy_(value)
        return state

    def _take(self, dtype: torch.dtype, n: int) -> torch.Tensor:
        chunk, used = self._chunks.get(dtype) or (torch.zeros(0, dtype=dtype), 0)
        if used + n > len(chunk):
            chunk, used = torch.zeros(max(n, min(CHUNK, self._total // 2)), dtype=dtype), 0
        self._total += n
        self._chunks[dtype] = chunk, used + -(n // -_LINE) * _LINE
        return chunk[used : used + n]
