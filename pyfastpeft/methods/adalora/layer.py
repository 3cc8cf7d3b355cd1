"""AdaLoraLinear: a linear base and an update in the form of a singular value decomposition.

    y = x Wᵀ + b + s · dropout(x) (E ⊙ A)ᵀ Bᵀ          A [R, K], E [R, 1], B [N, R], s = lora_alpha / (init_r + 1e-5)

E ⊙ A is taken first ([R, K], small); the rest is LoRA's op.
"""

from __future__ import annotations

import torch
from torch import nn

from pyfastpeft.methods.adalora.allocation import RankAllocator
from pyfastpeft.methods.adalora.config import AdaLoraConfig
from pyfastpeft.methods.base import adapter_holders
from pyfastpeft.methods.lora.layer import LoraLinear


class AdaLoraLinear(LoraLinear):
    """A linear layer with AdaLoRA adapters: `lora_A[name]`, `lora_E[name]`, `lora_B[name]` are Parameters, as in PEFT."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_A, self.lora_E, self.lora_B = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.allocators: dict[str, RankAllocator] = {}

    def add_adapter(self, name: str, config: AdaLoraConfig, path: str, *, fp32: bool, init: bool) -> None:
        """Adds an adapter of init_r triplets, or of those that the config's rank pattern keeps; frozen for now."""
        # to be trained on it gets all of them: those that were pruned start again at E = 0
        kept = config.kept_at(path) if config.inference_mode else None
        rank = config.init_r if kept is None else sum(kept)
        base = self.base
        wide = torch.promote_types(base.weight_dtype, torch.float32) if fp32 else base.weight_dtype
        drawn = draw_triplets(
            self.in_features, self.out_features, rank, bool(config.init_lora_weights) if init else None
        )
        for held, weight in zip((self.lora_A, self.lora_E, self.lora_B), drawn, strict=True):
            held[name] = nn.Parameter(weight.to(base.device, wide), requires_grad=False)
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout).train(self.training)
        self.r[name], self.lora_alpha[name] = rank, config.lora_alpha
        # init_r and not the present rank, so that pruning does not change the scale of what is left
        self.scaling[name] = (config.lora_alpha if config.lora_alpha > 0 else config.init_r) / (config.init_r + 1e-5)

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.lora_A:
            return {}
        return {"lora_A": self.lora_A[name], "lora_B": self.lora_B[name], "lora_E": self.lora_E[name]}

    def remove_adapter(self, name: str) -> None:
        super().remove_adapter(name)
        if name in self.lora_E:
            del self.lora_E[name]
        self.allocators.pop(name, None)

    def activate(self, names, trainable: bool) -> None:
        super().activate(names, trainable)
        self.active = tuple(name for name in self.active if self.r[name] > 0)  # one of rank 0 adds nothing

    reinitialise = None  # its singular values cannot start again: ReLoRA is LoRA's

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        return self.lora_A[name] * self.lora_E[name], self.lora_B[name], self.scaling[name]


def draw_triplets(
    in_features: int, out_features: int, rank: int, init: bool | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A [R, K], E [R, 1] and B [N, R] in fp32 on the CPU: A, B ~ N(0, 0.02²) and E = 0; all N(0, 1) for init False;
    uninitialised for None. The draws from torch's generator are PEFT's, one for one."""
    shapes = ((rank, in_features), (rank, 1), (out_features, rank))
    if init is None:
        return tuple(torch.empty(shape, device="cpu") for shape in shapes)
    a, e, b = (torch.randn(shape, device="cpu") for shape in shapes)
    torch.randn(1, device="cpu")
    if init:
        nn.init.zeros_(e), nn.init.normal_(a, std=0.02), nn.init.normal_(b, std=0.02)
    return a, e, b


def adalora_layers(model: nn.Module, name: str) -> dict[str, AdaLoraLinear]:
    """{path: layer} of the AdaLoRA layers that hold the adapter."""
    return {
        path: holder
        for path, holder in adapter_holders(model)
        if isinstance(holder, AdaLoraLinear) and name in holder.lora_E
    }
