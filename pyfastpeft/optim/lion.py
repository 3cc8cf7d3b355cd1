"""Lion: steps by the sign of an interpolated momentum; one fp32 tensor of state a parameter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from pyfastpeft.optim.rule import PagedRule, Rule, check_numbers


class Lion(Rule):
    """Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, algorithm 2).

    c = β1 m + (1 - β1) g;  p ← (1 - lr·λ) p - lr · sign(c);  m ← β2 m + (1 - β2) g

    params    float32, bfloat16 or float16; state and arithmetic are fp32
    lr        three to ten times less than AdamW's, and weight_decay as much more (the paper's section 5)
    maximize  ascend instead of descend
    State: step, exp_avg (m).
    """

    state_keys = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize))

    @staticmethod
    def _check_options(group: dict[str, Any]) -> None:
        check_numbers("Lion", group, "lr", "weight_decay")
        if len(group["betas"]) != 2 or not all(0 <= b < 1 for b in group["betas"]):
            raise ValueError(f"Lion: betas is {group['betas']}, expected two numbers in [0, 1)")

    @staticmethod
    def _scalars(group: dict[str, Any]) -> tuple:
        return 0, float(group["lr"]), group["weight_decay"], *map(float, group["betas"]), False, group["maximize"]

    @staticmethod
    def update(p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor], step: int, group: dict) -> None:
        (beta1, beta2), lr, m = group["betas"], float(group["lr"]), state["exp_avg"]
        direction = (m * beta1).add_(g * (1 - beta1)).sign_()
        if group["weight_decay"]:
            p.mul_(1 - lr * group["weight_decay"])
        p.sub_(direction.mul_(lr))
        m.mul_(beta2).add_(g.mul_(1 - beta2))


class PagedLion(PagedRule, Lion):
    """Lion with its state in pages; resident_bytes and spill_dir as PagedAdamW's, on the CPU. Bits are Lion's."""
