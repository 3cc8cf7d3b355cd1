"""LoraLinear: a linear base and its low-rank updates.

    y = x Wᵀ + b + Σ_adapters s · dropout(x) Aᵀ Bᵀ          x [..., K], W [N, K], A [R, K], B [N, R], y [..., N]

One op computes it (ops.linear_lora or ops.linear_4bit, as the base chooses). A and B are kept in fp32 and rounded to
the compute dtype inside the op, so a bf16 activation stays bf16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from pyfastpeft.methods.base import MethodLayer
from pyfastpeft.methods.lora.config import LoraConfig


class LoraLinear(MethodLayer):
    """A linear layer with LoRA adapters; `lora_A[name].weight` [R, K], `lora_B[name].weight` [N, R], `scaling[name]`.

    base_layer   anything as_base_linear has a view of: nn.Linear, Conv1D, NF4Linear
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        base = self.base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}

    @property
    def fan_in_fan_out(self) -> bool:
        return self.base.fan_in_fan_out

    def add_adapter(self, name: str, config: LoraConfig, path: str, *, fp32: bool, init: bool) -> None:
        """Adds an adapter with the rank and alpha that the config has for this path; frozen until it is activated."""
        rank, alpha = config.rank_for(path), config.alpha_for(path)
        base = self.base
        wide = torch.promote_types(base.weight_dtype, torch.float32) if fp32 else base.weight_dtype
        # drawn on the CPU, so that a seed gives the same adapter on every device
        a, b = draw_weights(self.in_features, self.out_features, rank, config.init_lora_weights if init else None)
        for modules, weight in ((self.lora_A, a), (self.lora_B, b)):
            with torch.device("meta"):
                projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            weight = weight.to(base.device, wide)
            projection.weight = nn.Parameter(weight, requires_grad=False)
            modules[name] = projection.train(self.training)
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout).train(self.training)
        self.r[name], self.lora_alpha[name], self.scaling[name] = rank, alpha, config.scaling(rank, alpha)

    def held_adapters(self) -> list[str]:
        return list(self.lora_A)

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.lora_A:
            return {}
        return {"lora_A.weight": self.lora_A[name].weight, "lora_B.weight": self.lora_B[name].weight}

    def remove_adapter(self, name: str) -> None:
        if name in self.merged_adapters:
            self.unmerge()
        for held in (self.lora_A, self.lora_B, self.lora_dropout, self.r, self.lora_alpha, self.scaling):
            if name in held:  # all of them, unless adding it failed half-way
                del held[name]
        self.active = tuple(other for other in self.active if other != name)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """x [..., K] -> y [..., N] in the dtype the base gives."""
        if not self.active or not self.enabled or self.merged_adapters:
            return self.base_layer(x, *args, **kwargs)
        base, active = self.base, self.active
        if len(active) == 1:
            return base.forward_lora(x, *self.factors(active[0]), self._dropout_p(active[0]))
        dropping = [name for name in active if self._dropout_p(name) > 0.0]
        if not dropping:
            return self._forward_together(base, x)
        # every adapter drops inputs of its own; only the first one fits into the fused op
        y = base.forward_lora(x, *self.factors(active[0]), self._dropout_p(active[0]))
        for name in active[1:]:
            a, b, scaling = self.factors(name)
            dropped = nn.functional.dropout(x, self._dropout_p(name))
            update = nn.functional.linear(nn.functional.linear(dropped, a.to(x.dtype)), b.to(x.dtype))
            y = y + (update * scaling).to(y.dtype)
        return y

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(A [R, K], B [N, R], s) of an adapter's update s · B A, with their history for autograd."""
        return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]

    def _forward_together(self, base, x: torch.Tensor) -> torch.Tensor:
        """Several adapters as one of the summed rank: A = [A₁; A₂], B = [s₁ B₁, s₂ B₂], so x is read once."""
        factors = [self.factors(name) for name in self.active]
        a = torch.cat([a for a, _, _ in factors])
        b = torch.cat([b * scaling for _, b, scaling in factors], dim=1)
        return base.forward_lora(x, a, b, 1.0, 0.0)

    @torch.no_grad()
    def reinitialise(self, name: str) -> None:
        """A is drawn anew and B = 0, in place; the weights they made are someone else's affair (ReLoRA merges them)."""
        a, b = draw_weights(self.in_features, self.out_features, self.r[name], True)
        self.lora_A[name].weight.copy_(a), self.lora_B[name].weight.copy_(b)

    def _dropout_p(self, name: str) -> float:
        dropout = self.lora_dropout[name]
        return dropout.p if dropout.training else 0.0

    def get_delta_weight(self, name: str) -> torch.Tensor:
        """s · B A [N, K], in fp32 (fp64 for fp64 adapters)."""
        a, b, scaling = self.factors(name)
        wide = torch.promote_types(a.dtype, torch.float32)
        return (b.detach().to(wide) @ a.detach().to(wide)) * scaling

    def merged_weights(self, names: Iterable[str]) -> tuple[torch.Tensor, None]:
        """W + Σ s · B A, summed in fp32 and not yet rounded to what the base stores."""
        deltas = [self.get_delta_weight(name) for name in names]
        weight = self.base.get_weight(deltas[0].dtype)
        return sum(deltas, start=weight), None

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}: r={rank}, scaling={self.scaling[name]:g}" for name, rank in self.r.items())
        return f"in_features={self.in_features}, out_features={self.out_features}, {{{ranks}}}, active={self.active}"


def draw_weights(
    in_features: int, out_features: int, rank: int, init: bool | str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, K] and B [N, R] in fp32 on the CPU, uninitialised when init is None.

    The draws from torch's generator are PEFT's, one for one (it makes two nn.Linear and then initialises A again), so
    a seed gives both libraries the same adapters.
    """
    a, b = torch.empty(rank, in_features, device="cpu"), torch.empty(out_features, rank, device="cpu")
    if init is None:
        return a, b
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    if isinstance(init, str):
        nn.init.normal_(a, std=1 / rank)
    elif init:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    if init:
        nn.init.zeros_(b)
    return a, b
