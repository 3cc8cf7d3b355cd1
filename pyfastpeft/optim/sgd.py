"""SGD with momentum, its buffer in memory or in pages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from pyfastpeft.optim.rule import PagedRule, Rule, check_numbers


class SGD(Rule):
    """Stochastic gradient descent with momentum, as torch.optim.SGD defines it (Sutskever et al., ICML 2013).

    g ← g + λ p;  b ← g at the first step, then μ b + (1 - τ) g;  p ← p - lr · (g + μ b if nesterov else b)

    params      float32, bfloat16 or float16; state and arithmetic are fp32, so low-precision parameters keep an exact b
    momentum μ, dampening τ, weight_decay λ, nesterov, maximize   as torch.optim.SGD's; momentum is what the state is for
    State: step, momentum_buffer (b); torch.optim.SGD's state dicts load, and ours load there.
    """

    state_keys = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                dampening=dampening,
                weight_decay=weight_decay,
                nesterov=nesterov,
                maximize=maximize,
            ),  # fmt: skip
        )

    @staticmethod
    def _check_options(group: dict[str, Any]) -> None:
        check_numbers("SGD", group, "lr", "momentum", "weight_decay")
        if not group["momentum"] > 0:
            raise ValueError("SGD: momentum is 0, expected more; without it there is no state: use torch.optim.SGD")
        if group["nesterov"] and group["dampening"] != 0:
            raise ValueError(f"SGD: nesterov with dampening {group['dampening']}, expected 0")

    @staticmethod
    def _scalars(group: dict[str, Any]) -> tuple:
        return (
            1, float(group["lr"]), group["weight_decay"], group["momentum"], group["dampening"], group["nesterov"],
            group["maximize"],
        )  # fmt: skip

    @staticmethod
    def update(p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor], step: int, group: dict) -> None:
        lr, momentum, b = float(group["lr"]), group["momentum"], state["momentum_buffer"]
        if group["weight_decay"]:
            g.add_(p * group["weight_decay"])
        if step == 1:
            b.copy_(g)
        else:
            b.mul_(momentum).add_(g * (1 - group["dampening"]))
        p.sub_((g.add_(b * momentum) if group["nesterov"] else b) * lr)


class PagedSGD(PagedRule, SGD):
    """SGD with its state in pages; resident_bytes and spill_dir as PagedAdamW's, on the CPU. Bits are SGD's."""
