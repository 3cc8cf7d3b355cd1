"""LoRA on nn.MultiheadAttention: the projections of query, key and value, and the output's, always all of them.

    W' = W + s · B A            packed: W_in [3E, E], A [R, E], B [3E, R]; with kdim or vdim W_q [E, E], W_k [E, kdim],
                                W_v [E, vdim], an A and a B each; W_out [E, E]
    W' = m / ‖W + s B A‖_row · (W + s B A)         with DoRA, the norm without a gradient
    b' = b + s · bias_B                            with lora_bias, where the module has biases

The module reads its weights and calls no layer, so it is called with W' in place of its own: masks, is_causal, need_weights,
batch_first, bias_k and bias_v, add_zero_attn and its fast path are its own affair. The sums are made in each forward, in fp32,
and rounded once to what the base stores (as a merge would); PEFT merges into the module and takes the sum out again for every
call; its release 0.21.2 counts the output's update twice there and in its merges, with the gradient of once. Here it counts
once. PEFT has neither kdim and vdim, DoRA, lora_bias nor mixed batches here.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable

import torch
from torch import nn

from pyfastpeft.methods.lora.config import LoraConfig
from pyfastpeft.methods.lora.factor import Factor
from pyfastpeft.methods.lora.initial import draw_weights, draw_with_bias
from pyfastpeft.methods.lora.layer import LoraLinear
from pyfastpeft.methods.lora.tables import Beside, Kernel
from pyfastpeft.mixed_batch import MixedBatch
from pyfastpeft.nn.base_tables import BaseAttention


@dataclasses.dataclass(frozen=True)
class Projection:
    """One of the module's matrices: its Parameters' names, the attributes that hold its adapters, where the files have them."""

    weight: str
    bias: str
    prefix: str  # of lora_A, lora_B, lora_magnitude_vector
    key: str


_PACKED = Projection("in_proj_weight", "in_proj_bias", "", "")
_OUT = Projection("out_proj.weight", "out_proj.bias", "out_", "base_layer.out_proj.")
_SEPARATE = (
    Projection("q_proj_weight", "in_proj_bias", "", "base_layer.q_proj."),
    Projection("k_proj_weight", "in_proj_bias", "k_", "base_layer.k_proj."),
    Projection("v_proj_weight", "in_proj_bias", "v_", "base_layer.v_proj."),
)


class LoraAttention(Beside):
    """nn.MultiheadAttention with LoRA adapters: `lora_A[name].weight`, `lora_B[name].weight` of the packed projection (or the
    query's, with `k_lora_A`, `v_lora_A`, … beside them), `out_lora_A[name].weight`, `out_lora_B[name].weight` of the output's.

    lora_dropout does not act here, as in PEFT. An encoder layer's fast path, which reads the weights past the module, is not
    taken while an adapter acts.
    """

    base_layer: nn.MultiheadAttention
    base: BaseAttention
    reinitialise = None  # ReLoRA's: not here

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.projections = ((_PACKED,) if base_layer._qkv_same_embed_dim else _SEPARATE) + (_OUT,)
        for projection in self.projections:
            for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
                if projection.prefix:
                    setattr(self, projection.prefix + part, nn.ModuleDict())

    def _held(self, projection: Projection, part: str) -> nn.ModuleDict:
        return getattr(self, projection.prefix + part)

    def _weight(self, projection: Projection) -> torch.Tensor:
        return self.base_layer.get_parameter(projection.weight)

    def add_adapter(self, name: str, config: LoraConfig, path: str, *, fp32: bool, init: bool) -> None:
        rank, kind = self._hold(name, config, path), config.init_lora_weights if init else None
        if init and not self.out_lora_A:
            draw_weights(self.in_features, self.in_features, rank, kind)  # PEFT draws the first adapter's output twice
        for projection in self.projections:
            out_features, in_features = self._weight(projection).shape
            a, b, bias = draw_with_bias(in_features, out_features, rank, kind, config.lora_bias)
            bias = None if bias is None else self._parameter(bias, fp32)
            self._held(projection, "lora_A")[name] = Kernel(self._parameter(a, fp32)).train(self.training)
            self._held(projection, "lora_B")[name] = Kernel(self._parameter(b, fp32), bias).train(self.training)
            if config.use_dora:
                magnitude = Kernel(self._parameter(torch.empty(out_features, device="cpu"), fp32))
                self._held(projection, "lora_magnitude_vector")[name] = magnitude
        if config.use_dora and init:
            self.reset_magnitude(name)

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        tensors = {}
        for projection in self.projections if name in self.lora_A else ():
            tensors[f"{projection.key}lora_A.weight"] = self._held(projection, "lora_A")[name].weight
            b = self._held(projection, "lora_B")[name]
            tensors[f"{projection.key}lora_B.weight"] = b.weight
            if b.bias is not None:
                tensors[f"{projection.key}lora_B.bias"] = b.bias
            if name in self.lora_magnitude_vector:
                magnitude = self._held(projection, "lora_magnitude_vector")[name].weight
                tensors[f"{projection.key}lora_magnitude_vector"] = magnitude
        return tensors

    def ranked(self, name: str, parameters: Iterable[str] | None = None) -> list[Factor]:
        return [
            Factor(f"{each.key}lora_{part}.weight", self._held(each, f"lora_{part}")[name], "weight", axis)
            for each in self.projections
            for part, axis in (("A", 0), ("B", 1))
        ]

    def remove_adapter(self, name: str) -> None:
        super().remove_adapter(name)
        for projection in self.projections:
            for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
                if name in self._held(projection, part):
                    del self._held(projection, part)[name]

    def _whole(self, projection: Projection, name: str, weight: torch.Tensor) -> torch.Tensor:
        """W + s B A of one adapter, W in fp32 or wider."""
        a, b = (self._held(projection, part)[name].weight.to(weight.dtype) for part in ("lora_A", "lora_B"))
        return weight + (b @ a) * self.scaling[name]

    def _changed(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """W' (and b') by the Parameters' names, in fp32 or wider, with their history for autograd."""
        wide, changed = torch.promote_types(self.base.weight_dtype, torch.float32), {}
        for projection in self.projections:
            weight = self._weight(projection).to(wide)
            total = weight
            for name in names:
                whole = self._whole(projection, name, weight)
                if name in self.lora_magnitude_vector:
                    magnitude = self._held(projection, "lora_magnitude_vector")[name].weight.to(wide)
                    whole = (magnitude / _row_norms(whole))[:, None] * whole
                total = whole if total is weight else total + (whole - weight)
            changed[projection.weight] = total
        for key in (_PACKED.bias, _OUT.bias):
            biases = [update for name in names if (update := self._bias_update(key, name)) is not None]
            if biases:
                changed[key] = sum(biases, start=self.base_layer.get_parameter(key).to(wide))
        return changed

    def _bias_update(self, key: str, name: str) -> torch.Tensor | None:
        """s · bias_B for one of the module's biases; None: the adapter has no lora_bias."""
        parts = [self._held(each, "lora_B")[name].bias for each in self.projections if each.bias == key]
        return None if parts[0] is None else torch.cat(parts) * self.scaling[name]

    @torch.no_grad()
    def reset_magnitude(self, name: str) -> None:
        for projection in self.projections:
            magnitude = self._held(projection, "lora_magnitude_vector")[name].weight
            wide = torch.promote_types(self.base.weight_dtype, torch.float32)
            magnitude.copy_(_row_norms(self._whole(projection, name, self._weight(projection).to(wide))))

    def products(self, name: str) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        pairs = ((self._held(each, part)[name].weight for part in ("lora_A", "lora_B")) for each in self.projections)
        return [(*pair, self.scaling[name]) for pair in pairs]

    @torch.no_grad()
    def set_products(self, name: str, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for projection, (a, b) in zip(self.projections, pairs, strict=True):
            self._held(projection, "lora_A")[name].weight.copy_(a)
            self._held(projection, "lora_B")[name].weight.copy_(b)

    @torch.no_grad()
    def empty(self, name: str) -> None:
        for projection in self.projections:
            b = self._held(projection, "lora_B")[name]
            b.weight.zero_()
            if b.bias is not None:
                b.bias.zero_()
        if name in self.lora_magnitude_vector:
            self.reset_magnitude(name)

    def forward(self, query: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the module gives: (output, attention weights or None)."""
        if not self._acts:
            return self.base_layer(query, *args, **kwargs)
        weights = {key: weight.to(self.base.weight_dtype) for key, weight in self._changed(self.active).items()}
        return torch.func.functional_call(self.base_layer, weights, (query, *args), kwargs)

    def forward_mixed(self, batch: MixedBatch, query: torch.Tensor, *args, **kwargs) -> tuple:
        """Each adapter's samples apart, with their part of every argument that has a row for each sample."""
        names = ("key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        if query.dim() != 3 or query.is_nested:
            raise ValueError(
                f"adapter_names: a MultiheadAttention got a query of {query.dim()} dimensions{' (nested)' if query.is_nested else ''}, "
                "expected 3 (batch, length, features): which samples it holds is not to be seen"
            )
        dim = 0 if self.base_layer.batch_first else 1
        groups, active = batch.groups(query.transpose(0, dim)), self.active
        output = weights = None
        self.mixed = None
        try:
            for name, samples in groups:
                self.active = (name,) if name in self.held_adapters() else ()
                part = {key: self._of_samples(key, value, samples, query, dim) for key, value in given.items()}
                y, w = self(query.index_select(dim, samples), **part)
                if output is None:
                    shape = list(y.shape)
                    shape[dim] = query.shape[dim]
                    output = y.new_empty(shape)
                    weights = None if w is None else w.new_empty(query.shape[dim], *w.shape[1:])
                output = output.index_copy(dim, samples, y)
                weights = None if w is None else weights.index_copy(0, samples, w)
        finally:
            self.mixed, self.active = batch, active
        return output, weights

    def _of_samples(self, key: str, value, samples: torch.Tensor, query: torch.Tensor, dim: int):
        """These samples' part of an argument."""
        if not isinstance(value, torch.Tensor):
            return value
        if key in ("key", "value"):
            return value.index_select(dim, samples)
        if key == "key_padding_mask":
            return value.index_select(0, samples)
        if key == "attn_mask" and value.dim() == 3:  # a mask for each sample and head
            return value.unflatten(0, (query.shape[dim], -1)).index_select(0, samples).flatten(0, 1)
        return value

    @property
    def _acts(self) -> bool:
        return bool(self.active) and self.enabled and not self.merged_adapters

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False keeps TransformerEncoderLayer off its fast path, which would pass the adapter by."""
        mixed = self.mixed is not None and self.enabled
        return not self._acts and not mixed and self.base_layer._qkv_same_embed_dim

    @property
    def in_proj_weight(self) -> torch.Tensor | None:
        """W_in' for code that reads it: TransformerEncoder makes nested tensors where this needs no gradient."""
        packed = self.base_layer.in_proj_weight
        if not self._acts or packed is None:
            return packed
        return self._changed(self.active)[_PACKED.weight].to(packed.dtype)

    def check_mixed(self, name: str, path: str) -> None:
        LoraLinear.check_mixed(self, name, path)

    def merged_weights(self, names: Iterable[str]) -> tuple[torch.Tensor, None]:
        """All that the module's products use, as BaseAttention has it: W' and b'."""
        changed = self._changed(names)
        wide = next(iter(changed.values())).dtype
        parts = (changed.get(key, parameter.to(wide)) for key, parameter in self.base.parts().items())
        return torch.cat([part.detach().flatten() for part in parts])[None], None

    def _bias(self, names: Iterable[str]) -> None:
        return None  # among the merged weights


def _row_norms(whole: torch.Tensor) -> torch.Tensor:
    return whole.detach().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)


def check_attention(path: str, bare: nn.MultiheadAttention, config: LoraConfig) -> None:
    """Raises ValueError where an attention module cannot have an adapter of this config."""
    init = config.init_lora_weights
    if config.bias != "none":
        raise ValueError(
            f"{path} is a MultiheadAttention, whose biases (in_proj_bias, out_proj.bias) are not among those that "
            f"bias={config.bias!r} trains and saves; use lora_bias, or an adapter of its own"
        )
    if isinstance(init, str) and init.lower() not in ("gaussian", "orthogonal"):
        raise ValueError(
            f"{path} is a MultiheadAttention, which has no init_lora_weights={init!r}: it is for single linear layers; use an "
            "adapter of its own without it"
        )
    if config.lora_bias and bare.in_proj_bias is None:
        raise ValueError(
            f"{path} is a MultiheadAttention without biases (bias=False), in which lora_bias has nothing to change; leave it "
            "out for this module (an adapter of its own)"
        )
    if config.lora_dropout:
        warnings.warn(f"{path} is a MultiheadAttention, where lora_dropout does not act", stacklevel=5)
