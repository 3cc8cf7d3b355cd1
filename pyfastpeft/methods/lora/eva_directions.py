"""EVA's incremental decomposition (Ross et al. 2008, "Incremental Learning for Robust Visual Tracking", section 2.2)."""

from __future__ import annotations

import torch

_SEED = 42  # of the random projection, PEFT's


class IncrementalDirections:
    """The leading `count` directions [count, K] of rows that come in batches, and how much of their variance each has."""

    def __init__(self, count: int, tau: float) -> None:
        self.count, self.tau = count, tau
        self.directions: torch.Tensor | None = None
        self.ratio = self.singular = self.converged = None
        self._mean = self._variance = None
        self._seen = 0

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        x = x.to(torch.float32)
        rows = x.shape[0]
        mean, squares = x.mean(0, dtype=torch.float64), x.var(0, correction=0).double() * rows
        total = self._seen + rows
        centred = x - mean.to(x.dtype)
        if self.directions is None:
            self._mean, self._variance = mean, squares / total
        else:
            shift = self._mean - mean
            correction = (self._seen * rows / total) ** 0.5 * shift
            kept = self.singular[:, None] * self.directions
            centred = torch.cat([kept.to(centred), centred, correction[None].to(centred)])
            squares = self._variance * self._seen + squares + self._seen * rows / total * shift.square()
            self._mean, self._variance = (self._mean * self._seen + mean * rows) / total, squares / total
        self._seen = total
        directions, singular = _leading(centred, self.count)
        former, self.directions, self.singular = self.directions, directions, singular
        self.ratio = singular.double().square() / (self._variance.sum() * total).clamp_min(1e-300)
        if former is not None:
            self.converged = torch.cosine_similarity(directions, former) >= self.tau

    def settled(self, rank: int) -> bool:
        return rank == 0 or (self.converged is not None and bool(self.converged[:rank].all()))


def _leading(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first right singular vectors of x [rows, K], the largest entry of each positive, and their singular values."""
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_SEED)
        _, s, v = torch.svd_lowrank(x, q=min(2 * count, *x.shape), niter=4)
    v = v.T[:count]
    largest = v.gather(1, v.abs().argmax(1, keepdim=True))
    return v * torch.where(largest < 0, -1.0, 1.0), s[:count]
