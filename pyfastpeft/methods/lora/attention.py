"""LoRA on nn.MultiheadAttention: the packed projection of query, key and value, and the output's, always both.

    W_in' = W_in + s · B A            W_in [3E, E], A [R, E], B [3E, R]
    W_out' = W_out + s · B_o A_o      W_out [E, E], A_o [R, E], B_o [E, R]

The module reads its weights and calls no layer, so it is called with W_in' and W_out' in place of its own: masks,
need_weights, batch_first and its fast path are its own affair. The sums are made in each forward, in fp32, and rounded once to
what the base stores (as a merge would); PEFT merges into the module and takes the sum out again for every call; its
release 0.21.2 counts the output's update twice there and in its merges, with the gradient of once. Here it counts once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from pyfastpeft.methods.base import AdapterHolder
from pyfastpeft.methods.lora.config import LoraConfig
from pyfastpeft.methods.lora.initial import draw_weights
from pyfastpeft.methods.lora.tables import Beside, Kernel
from pyfastpeft.nn.base_tables import BaseAttention


class LoraAttention(Beside):
    """nn.MultiheadAttention with LoRA adapters: `lora_A[name].weight`, `lora_B[name].weight` of the packed projection,
    `out_lora_A[name].weight`, `out_lora_B[name].weight` of the output's.

    lora_dropout does not act here, as in PEFT. An encoder layer's fast path, which reads the weights past the module, is not
    taken while an adapter acts.
    """

    base_layer: nn.MultiheadAttention
    base: BaseAttention
    reinitialise = None  # ReLoRA's: not here

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.out_lora_A, self.out_lora_B = nn.ModuleDict(), nn.ModuleDict()

    def add_adapter(self, name: str, config: LoraConfig, path: str, *, fp32: bool, init: bool) -> None:
        rank, kind = self._hold(name, config, path), config.init_lora_weights if init else None
        if init and not self.out_lora_A:
            draw_weights(self.in_features, self.in_features, rank, kind)  # PEFT draws the first adapter's output twice
        pairs = ((self.lora_A, self.lora_B, self.out_features), (self.out_lora_A, self.out_lora_B, self.in_features))
        for into_a, into_b, out_features in pairs:
            a, b = draw_weights(self.in_features, out_features, rank, kind)
            into_a[name] = Kernel(self._parameter(a, fp32)).train(self.training)
            into_b[name] = Kernel(self._parameter(b, fp32)).train(self.training)

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        tensors = super().adapter_tensors(name)
        if tensors:
            tensors["base_layer.out_proj.lora_A.weight"] = self.out_lora_A[name].weight
            tensors["base_layer.out_proj.lora_B.weight"] = self.out_lora_B[name].weight
        return tensors

    def remove_adapter(self, name: str) -> None:
        super().remove_adapter(name)
        for held in (self.out_lora_A, self.out_lora_B):
            if name in held:
                del held[name]

    def _changed(self, names: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """W_in' and W_out' in fp32 or wider, with their history for autograd."""
        wide = torch.promote_types(self.base.weight_dtype, torch.float32)
        packed, out = self.base_layer.in_proj_weight.to(wide), self.base_layer.out_proj.weight.to(wide)
        for name in names:
            scaling = self.scaling[name]
            packed = packed + (self.lora_B[name].weight.to(wide) @ self.lora_A[name].weight.to(wide)) * scaling
            out = out + (self.out_lora_B[name].weight.to(wide) @ self.out_lora_A[name].weight.to(wide)) * scaling
        return packed, out

    def forward(self, query: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the module gives: (output, attention weights or None)."""
        if not self._acts:
            return self.base_layer(query, *args, **kwargs)
        packed, out = (weight.to(self.base.weight_dtype) for weight in self._changed(self.active))
        weights = {"in_proj_weight": packed, "out_proj.weight": out}
        return torch.func.functional_call(self.base_layer, weights, (query, *args), kwargs)

    @property
    def _acts(self) -> bool:
        return bool(self.active) and self.enabled and not self.merged_adapters

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False keeps TransformerEncoderLayer off its fast path, which would pass the adapter by."""
        return not self._acts and self.base_layer._qkv_same_embed_dim

    @property
    def in_proj_weight(self) -> torch.Tensor:
        """W_in' for code that reads it: TransformerEncoder makes nested tensors where this needs no gradient."""
        return (
            self._changed(self.active)[0].to(self.base.weight_dtype) if self._acts else self.base_layer.in_proj_weight
        )

    def check_mixed(self, name: str, path: str) -> None:
        """Where the batch is in the arguments only the module knows."""
        AdapterHolder.check_mixed(self, name, path)

    def merged_weights(self, names: Iterable[str]) -> tuple[torch.Tensor, None]:
        """W_in' and W_out' below one another [4E, E]."""
        return torch.cat(self._changed(names)).detach(), None


def check_attention(path: str, bare: nn.MultiheadAttention, config: LoraConfig) -> None:
    """Raises ValueError where an attention module cannot have an adapter of this config."""
    if not bare._qkv_same_embed_dim:
        raise ValueError(
            f"{path} is a MultiheadAttention with kdim or vdim of its own, so its projections are not packed; LoRA adapts "
            "packed ones. Name its weights in target_parameters"
        )
    init = config.init_lora_weights
    wrong = {
        "use_dora=True": config.use_dora,
        "lora_bias=True": config.lora_bias,
        f"bias={config.bias!r}": config.bias != "none",
        f"init_lora_weights={init!r}": isinstance(init, str) and init.lower() not in ("gaussian", "orthogonal"),
    }
    for field, here in wrong.items():
        if here:
            raise ValueError(
                f"{path} is a MultiheadAttention, which has no {field}; use an adapter of its own without it"
            )
    if config.lora_dropout:
        warnings.warn(f"{path} is a MultiheadAttention, where lora_dropout does not act", stacklevel=5)
