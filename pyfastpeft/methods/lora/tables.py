"""LoRA on embeddings and convolutions: the update beside the base's own call, not one op with it.

    y = base(x) + Σ_adapters s · B A(x)

DoRA as in layer.py, with a row of W for each output feature: y = base(x) + (g − 1) ⊙ (base(x) − b) + g ⊙ s · B A(x).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from pyfastpeft.methods.lora.config import LoraConfig
from pyfastpeft.methods.lora.factor import Factor
from pyfastpeft.methods.lora.initial import takes_from_base
from pyfastpeft.methods.lora.layer import LoraLinear, Magnitude
from pyfastpeft.mixed_batch import by_adapter
from pyfastpeft.nn.base_tables import CONVOLUTIONS, TRANSPOSED

_CONVOLVE = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}
_TRANSPOSED = {
    3: nn.functional.conv_transpose1d,
    4: nn.functional.conv_transpose2d,
    5: nn.functional.conv_transpose3d,
}


class Beside(LoraLinear):
    """What the layers here have in common. A subclass has A and B in a shape of their own, and their update."""

    def update(self, x: torch.Tensor, name: str, *args, **kwargs) -> torch.Tensor:
        """B A(x) in the dtype the base computes in, s left out."""
        raise NotImplementedError

    def along_features(self, vector: torch.Tensor) -> torch.Tensor:
        """vector [N] in a shape that broadcasts over y."""
        return vector

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The base's answer and every active adapter's update, in the dtype the base gives."""
        plain = self.base_layer(x, *args, **kwargs)
        if not self.active or not self.enabled or self.merged_adapters:
            return plain
        y = plain
        for name in self.active:
            update = self.update(x, name, *args, **kwargs) * self.scaling[name]
            if name in self.lora_magnitude_vector:
                gain = self.lora_magnitude_vector[name].weight.flatten() / self.row_norms(name)
                bias = 0.0 if self.base.bias is None else self.along_features(self.base.bias)
                gain = self.along_features(gain)
                y = y + ((gain - 1) * (plain - bias)).to(plain.dtype) + (gain * update).to(plain.dtype)
            else:
                y = y + update.to(plain.dtype)
        return y

    def forward_mixed(self, batch, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Each adapter's samples apart."""
        return by_adapter(self, batch, x, *args, **kwargs)

    def take_from_base(self, name: str, config: LoraConfig, path: str, keep_adapter: bool = False) -> float:
        raise ValueError(
            f"{path}: init_lora_weights={config.init_lora_weights!r} is for linear layers, this is a "
            f"{type(self.base_layer).__name__}; leave it to an adapter of its own"
        )

    def _hold(self, name: str, config: LoraConfig, path: str) -> tuple[int, torch.dtype]:
        """Notes the adapter's numbers; returns its rank."""
        rank, alpha = config.rank_for(path), config.alpha_for(path)
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout).train(self.training)
        self.r[name], self.lora_alpha[name], self.scaling[name] = rank, alpha, config.scaling(rank, alpha)
        return rank

    def _parameter(self, values: torch.Tensor, fp32: bool) -> nn.Parameter:
        """Frozen values where the base is, in what the adapter is stored in."""
        dtype = self.base.weight_dtype
        dtype = torch.promote_types(dtype, torch.float32) if fp32 else dtype
        return nn.Parameter(values.to(self.base.device, dtype), requires_grad=False)

    def _add_magnitude(self, name: str, shape: tuple[int, ...], fp32: bool, init: bool) -> None:
        self.lora_magnitude_vector[name] = Magnitude(self._parameter(torch.empty(shape, device="cpu"), fp32).detach())
        if init:
            self.reset_magnitude(name)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)  # model code reads num_embeddings, stride and so on


class LoraEmbedding(Beside):
    """An embedding with LoRA adapters; `lora_embedding_A[name]` [R, V], `lora_embedding_B[name]` [D, R], Parameters.

        y = base(ids) + s · c · A[:, ids]ᵀ Bᵀ         c the embedding's own scale (Gemma), 1 otherwise

    A starts at 0 and B at N(0, 1), whatever init_lora_weights but False, as in PEFT; dropout has nothing to drop.
    A subclass of nn.Embedding with a forward of its own (scale, offset) looks A up by that forward.
    """

    base_layer: nn.Embedding

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()

    def add_adapter(self, name: str, config: LoraConfig, path: str, *, fp32: bool, init: bool) -> None:
        rank = self._hold(name, config, path)
        shapes = (rank, self.in_features), (self.out_features, rank)
        # PEFT's draws from torch's generator, one for one
        a, b = (torch.randn(s, device="cpu") if init else torch.empty(s, device="cpu") for s in shapes)
        if init and config.init_lora_weights:
            a.zero_(), b.normal_()
        self.lora_embedding_A[name] = self._parameter(a, fp32)
        self.lora_embedding_B[name] = self._parameter(b, fp32)
        if config.use_dora:
            self._add_magnitude(name, (self.out_features,), fp32, init)

    def held_adapters(self) -> list[str]:
        return list(self.lora_embedding_A)

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.lora_embedding_A or name in self.followed:
            return {}
        tensors = {"lora_embedding_A": self.lora_embedding_A[name], "lora_embedding_B": self.lora_embedding_B[name]}
        if name in self.lora_magnitude_vector:
            tensors["lora_magnitude_vector"] = self.lora_magnitude_vector[name].weight
        return tensors

    def ranked(self, name: str, parameters: Iterable[str] | None = None) -> list[Factor]:
        held = ("lora_embedding_A", self.lora_embedding_A, 0), ("lora_embedding_B", self.lora_embedding_B, 1)
        return [] if name in self.followed else [Factor(key, values, name, axis) for key, values, axis in held]

    @torch.no_grad()
    def empty(self, name: str) -> None:
        self.lora_embedding_A[name].zero_()
        if name in self.lora_magnitude_vector:
            self.reset_magnitude(name)

    def follow(self, name: str, embedding: LoraEmbedding, config: LoraConfig) -> None:
        """Adds an adapter that is another embedding's, whose weight this one has: A and B are the same Parameters."""
        self.followed[name] = embedding
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout).train(self.training)
        self.take_numbers(name)

    def take_numbers(self, name: str) -> None:
        super().take_numbers(name)
        for factor in ("lora_embedding_A", "lora_embedding_B"):
            getattr(self, factor)[name] = getattr(self.followed[name], factor)[name]

    def remove_adapter(self, name: str) -> None:
        super().remove_adapter(name)
        for held in (self.lora_embedding_A, self.lora_embedding_B):
            if name in held:
                del held[name]

    def update(self, x: torch.Tensor, name: str, *args, **kwargs) -> torch.Tensor:
        a, b, _ = self.factors(name)
        base, dtype = self.base_layer, self.base.weight_dtype
        table = a.t().to(dtype)
        if type(base).forward is nn.Embedding.forward:
            rows = nn.functional.embedding(x, table, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        else:
            rows = torch.func.functional_call(base, {"weight": table}, (x, *args), kwargs)
        return nn.functional.linear(rows, b.to(rows.dtype))

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name], self.scaling[name]

    @torch.no_grad()
    def set_factors(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        self.lora_embedding_A[name].copy_(a), self.lora_embedding_B[name].copy_(b)

    @torch.no_grad()
    def reinitialise(self, name: str) -> None:
        if name in self.followed:
            return  # with the other's
        self.lora_embedding_A[name].zero_(), self.lora_embedding_B[name].normal_()

    def _bias(self, names) -> None:
        return None


class LoraConv(Beside):
    """A convolution with LoRA adapters; `lora_A[name].weight` [R, K, k…] and `lora_B[name].weight` [N, R/groups, 1…].

        y = base(x) + s · B ∗ (A ∗ dropout(x))        A with the base's kernel, stride, padding and dilation; B 1 × 1

    and merged, exactly, W + s · B A over the kernel's positions. PEFT's A keeps neither dilation nor padding_mode: with a
    dilated base it fails, or stands elsewhere than its merge. With groups A reads all channels and B's groups take R/groups
    of its outputs each (PEFT's layout), which no kernel of the grouped base can do: that cannot be merged, nor have DoRA.
    """

    base_layer: nn.Conv2d

    def add_adapter(self, name: str, config: LoraConfig, path: str, *, fp32: bool, init: bool) -> None:
        rank, base, kind = self._hold(name, config, path), self.base_layer, config.init_lora_weights
        ones = (1,) * len(base.kernel_size)
        a, b = (torch.empty(shape, device="cpu") for shape in self._shapes(rank))
        bias = torch.empty(base.out_channels, device="cpu") if config.lora_bias else None
        if init:
            # PEFT's draws from torch's generator, one for one
            nn.init.kaiming_uniform_(a, a=math.sqrt(5)), nn.init.kaiming_uniform_(b, a=math.sqrt(5))
            if bias is not None:
                bound = 1 / math.sqrt(b[0].numel())
                nn.init.uniform_(bias, -bound, bound)
            if kind:
                gaussian = isinstance(kind, str)
                nn.init.normal_(a, std=1 / rank) if gaussian else nn.init.kaiming_uniform_(a, a=math.sqrt(5))
                b.zero_()
                if bias is not None:
                    bias.zero_()
        self.lora_A[name] = Kernel(self._parameter(a, fp32)).train(self.training)
        bias = None if bias is None else self._parameter(bias, fp32)
        self.lora_B[name] = Kernel(self._parameter(b, fp32), bias).train(self.training)
        if config.use_dora:
            self._add_magnitude(name, (1, self.out_features, *ones), fp32, init)

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and of B."""
        base = self.base_layer
        ones = (1,) * len(base.kernel_size)
        return (rank, base.in_channels, *base.kernel_size), (base.out_channels, rank // base.groups, *ones)

    def ranked(self, name: str, parameters: Iterable[str] | None = None) -> list[Factor]:
        """With groups, each takes its own part of A's ranks."""
        groups = self.base_layer.groups
        return [
            Factor("lora_A.weight", self.lora_A[name], "weight", 0, blocks=groups),
            Factor("lora_B.weight", self.lora_B[name], "weight", 1, divide=groups),
        ]

    def along_features(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.view(-1, *[1] * len(self.base_layer.kernel_size))

    def update(self, x: torch.Tensor, name: str) -> torch.Tensor:
        base = self.base_layer
        a, b, bias = self.lora_A[name].weight, self.lora_B[name].weight, self.lora_B[name].bias
        dtype = base.weight.dtype
        convolve = _CONVOLVE[a.dim()]
        x = nn.functional.dropout(x, self._dropout_p(name)).to(dtype)
        padding = base.padding
        if base.padding_mode != "zeros":
            x = nn.functional.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = 0
        inner = convolve(x, a.to(dtype), None, base.stride, padding, base.dilation)
        return convolve(inner, b.to(inner.dtype), None if bias is None else bias.to(inner.dtype), groups=base.groups)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(A [R, K · k], B [N, R], s); with groups there is no such product."""
        if self.base_layer.groups > 1:
            raise ValueError(_GROUPED.format("have a product B A", self.base_layer.groups))
        return self.lora_A[name].weight.flatten(1), self.lora_B[name].weight.flatten(1), self.scaling[name]

    @torch.no_grad()
    def set_factors(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        for module, values in ((self.lora_A[name], a), (self.lora_B[name], b)):
            module.weight.copy_(values.reshape(module.weight.shape))

    @torch.no_grad()
    def check_merge(self, names, safe: bool) -> None:
        if self.mergeable(names) and self.base_layer.groups > 1:
            raise ValueError(_GROUPED.format("be merged", self.base_layer.groups))
        super().check_merge(names, safe)

    @torch.no_grad()
    def reinitialise(self, name: str) -> None:
        nn.init.kaiming_uniform_(self.lora_A[name].weight, a=math.sqrt(5)), self.lora_B[name].weight.zero_()


class LoraConvTranspose(LoraConv):
    """A transposed convolution with LoRA adapters; `lora_A[name].weight` [R, K/groups, 1…] and `lora_B[name].weight`
    [R, N/groups, k…].

        y = base(x) + s · B ∗ᵀ (A ∗ dropout(x))        A 1 × 1; B transposed with the base's kernel, stride, padding, dilation
        W'[i, o] = W[i, o] + s · Σ_r A[r, i] B[r, o]        i, o channels of one group, r of that group's R/groups ranks

    PEFT has none; this is ours: the kernel goes where the base has it, behind, so that the update is a weight of the base's shape
    for every kernel, stride and number of groups, and merges exactly. DoRA's norms sum the whole weight in every forward.
    """

    base_layer: nn.ConvTranspose2d

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        base = self.base_layer
        ones = (1,) * len(base.kernel_size)
        return (rank, base.in_channels // base.groups, *ones), (
            rank,
            base.out_channels // base.groups,
            *base.kernel_size,
        )

    def ranked(self, name: str, parameters: Iterable[str] | None = None) -> list[Factor]:
        return [
            Factor(f"{part}.weight", getattr(self, part)[name], "weight", 0, blocks=self.base_layer.groups)
            for part in ("lora_A", "lora_B")
        ]

    def update(self, x: torch.Tensor, name: str, output_size: list[int] | None = None) -> torch.Tensor:
        base = self.base_layer
        a, b, bias = self.lora_A[name].weight, self.lora_B[name].weight, self.lora_B[name].bias
        dtype, dimensions = base.weight.dtype, len(base.kernel_size)
        x = nn.functional.dropout(x, self._dropout_p(name)).to(dtype)
        inner = _CONVOLVE[a.dim()](x, a.to(dtype), None, groups=base.groups)
        extra = base._output_padding(
            inner, output_size, base.stride, base.padding, base.kernel_size, dimensions, base.dilation
        )
        b, bias = b.to(inner.dtype), None if bias is None else bias.to(inner.dtype)
        return _TRANSPOSED[a.dim()](inner, b, bias, base.stride, base.padding, extra, base.groups, base.dilation)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(A [R, K], B [N · k, R], s); with groups there is no such product."""
        if self.base_layer.groups > 1:
            raise ValueError(_GROUPED.format("have a product B A", self.base_layer.groups))
        return self.lora_A[name].weight.flatten(1), self.lora_B[name].weight.flatten(1).T, self.scaling[name]

    @torch.no_grad()
    def set_factors(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        super().set_factors(name, a, b.T)

    def get_delta_weight(self, name: str) -> torch.Tensor:
        """s · B A as the base's W [N, K/groups · k]."""
        a, b = self.lora_A[name].weight.detach(), self.lora_B[name].weight.detach()
        wide, groups = torch.promote_types(a.dtype, torch.float32), self.base_layer.groups
        a, b = (each.to(wide).unflatten(0, (groups, -1)) for each in (a.flatten(1), b.flatten(2)))
        delta = torch.einsum("gri,grok->goik", a, b) * self.scaling[name]
        return delta.flatten(0, 1).flatten(1)

    @torch.no_grad()
    def row_norms(self, name: str) -> torch.Tensor:
        delta = self.get_delta_weight(name)
        return (self.base.get_weight(delta.dtype) + delta).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def check_merge(self, names, safe: bool) -> None:
        LoraLinear.check_merge(self, names, safe)


_GROUPED = "LoRA on a convolution with groups={1} cannot {0}: its A reads the channels of all groups; use it unmerged"


class Kernel(nn.Module):
    """A convolution's weight and bias, by the names a state dict has for them."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias


def check_table(path: str, bare: nn.Module, config: LoraConfig) -> None:
    """Raises ValueError where an embedding or a convolution cannot have an adapter of this config."""
    if isinstance(bare, nn.Embedding):
        for name, value in (("max_norm", bare.max_norm), ("sparse", bare.sparse or None)):
            if value is not None:
                why = "rescales the weight in the forward pass" if name == "max_norm" else "has sparse gradients"
                raise ValueError(
                    f"{path} is an embedding with {name}={value}, which {why}: LoRA cannot adapt it; take it out of "
                    f"target_modules, or set {name} to {None if name == 'max_norm' else False}"
                )
        if config.lora_bias:
            raise ValueError(f"{path} is an embedding, which has no place for lora_bias; use an adapter of its own")
    elif isinstance(bare, CONVOLUTIONS + TRANSPOSED):
        kind, rank = type(bare).__name__, config.rank_for(path)
        if bare.groups > 1 and rank % bare.groups:
            raise ValueError(
                f"{path} is a {kind} with groups={bare.groups}, which must divide the rank, {rank}; choose another rank "
                "(rank_pattern), or take it out of target_modules"
            )
        if bare.groups > 1 and config.use_dora and isinstance(bare, CONVOLUTIONS):
            raise ValueError(f"{path}: {_GROUPED.format('have DoRA', bare.groups)}")
        if takes_from_base(config.init_lora_weights) or config.init_lora_weights == "orthogonal":
            raise ValueError(
                f"{path} is a {kind}; init_lora_weights={config.init_lora_weights!r} is for linear layers. Give the "
                "convolutions an adapter of their own"
            )
        known = next(kind for kind in CONVOLUTIONS + TRANSPOSED if isinstance(bare, kind))
        if type(bare).forward is not known.forward:
            raise ValueError(
                f"{path} is a {kind} with a forward of its own, which LoRA's kernel cannot follow; take it out of "
                "target_modules"
            )
