"""The jagged cosine schedule: a cosine that falls to zero and warms up again after every restart."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR


class JaggedCosine:
    """Step t (0 is the first) → the factor of the learning rate, of N = total_steps with a restart every R steps.

    With m = min_lr_ratio and c(u) = m + (1 − m) · ½ (1 + cos(π (u − warmup_steps) / (N − warmup_steps))):

        t < warmup_steps                                 t / warmup_steps
        t ≥ R and k = τ mod R < restart_warmup_steps     k / restart_warmup_steps · c(τ − k + restart_warmup_steps)
        otherwise                                        c(τ)                          τ = t + adjust_step, at most N

    adjust_step   by how much the restarts come earlier than the multiples of R
    The last cycle is shorter where N is no multiple of R.
    """

    def __init__(
        self,
        total_steps: int,
        restart_every: int,
        warmup_steps: int = 0,
        restart_warmup_steps: int = 0,
        min_lr_ratio: float = 0.1,
        adjust_step: int = 0,
    ) -> None:
        for name, value, low in (
            ("total_steps", total_steps, 1), ("restart_every", restart_every, 1), ("warmup_steps", warmup_steps, 0),
            ("restart_warmup_steps", restart_warmup_steps, 0), ("adjust_step", adjust_step, 0),
        ):  # fmt: skip
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"JaggedCosine: {name} is {value!r}, expected an integer of at least {low}")
        if warmup_steps >= total_steps or restart_warmup_steps >= restart_every:
            raise ValueError(
                f"JaggedCosine: warmup_steps {warmup_steps} must be below total_steps {total_steps}, and "
                f"restart_warmup_steps {restart_warmup_steps} below restart_every {restart_every}"
            )
        if not 0.0 <= min_lr_ratio <= 1.0:
            raise ValueError(f"JaggedCosine: min_lr_ratio is {min_lr_ratio}, expected 0 to 1")
        self.total_steps, self.restart_every, self.warmup_steps = total_steps, restart_every, warmup_steps
        self.restart_warmup_steps, self.min_lr_ratio, self.adjust_step = restart_warmup_steps, min_lr_ratio, adjust_step

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return step / self.warmup_steps
        at = step + self.adjust_step
        k = at % self.restart_every
        if step >= self.restart_every and k < self.restart_warmup_steps:
            return k / self.restart_warmup_steps * self._cosine(at - k + self.restart_warmup_steps)
        return self._cosine(at)

    def _cosine(self, at: int) -> float:
        u = min(1.0, (at - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * u))


class JaggedCosineLR(LambdaLR):
    """JaggedCosine as a torch learning-rate scheduler; arguments as there.

    Source: Lialin et al., arXiv:2307.05695, section 3 and figure 2.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *args, last_epoch: int = -1, **kwargs) -> None:
        super().__init__(optimizer, JaggedCosine(*args, **kwargs), last_epoch)
