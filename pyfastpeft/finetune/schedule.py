"""The learning rate as a pure function of the step: resuming needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Callable


def learning_rate_at(
    step: int, *, peak: float, total: int, warmup: int, schedule: str = "cosine", min_ratio: float = 0.0
) -> float:
    """The learning rate of optimizer step `step` (0 is the first), of `total`.

    Warm-up, step < warmup:  peak · (step + 1) / (warmup + 1), so that no step is wasted on a rate of zero.
    After it, with u = (step − warmup) / (total − warmup) in [0, 1) and m = min_ratio:
        cosine    peak · (m + (1 − m) · ½ (1 + cos πu))
        linear    peak · (m + (1 − m) · (1 − u))
        constant  peak
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    u = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (min_ratio + (1.0 - min_ratio) * _SHAPES[schedule](u))


def _cosine(u: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * u))


_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "linear": lambda u: 1.0 - u,
    "constant": lambda u: 1.0,
}
