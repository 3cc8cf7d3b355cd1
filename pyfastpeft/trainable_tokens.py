"""Some rows of an embedding trained in place of the whole matrix: beside an adapter (trainable_token_indices), or as a method
of their own (methods/trainable_tokens).

    y[t] = D[i] where token t is the i-th index, else W[t]          W [V, d], D [n, d], n indices

D starts as the rows it replaces. An output head that shares W with the embedding (tied weights: one Parameter) follows: the
logits of those tokens are h Dᵀ + bias. Neither builds a second W: PEFT copies all of it in every forward, and leaves out the
head's bias. The files hold D alone, under PEFT's key: `<path>.token_adapter.trainable_tokens_delta` of rows beside an adapter.
Which modules have rows: token_modules.py.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from pyfastpeft.methods.base import (
    AdapterHolder,
    MethodLayer,
    PeftConfig,
    replace_module,
)
from pyfastpeft.nn import as_base_linear


class TrainableTokens(MethodLayer):
    """An embedding or an output head with trainable rows for some tokens.

    base_layer   an nn.Embedding, or an nn.Linear
    source       the TrainableTokens of the embedding whose weight this module shares: its rows are this one's too
    """

    base_key = "token_adapter.base_layer"
    rows_key = "token_adapter.trainable_tokens_delta"

    def __init__(self, base_layer: nn.Module, source: TrainableTokens | None = None) -> None:
        AdapterHolder.__init__(self)
        self._hold(base_layer)
        self._source = [] if source is None else [source]  # in a list: its parameters are not this module's
        # an embedding's weight is written in place, and those who share it follow; a head gets one of its own first
        self.merges_weight = not isinstance(base_layer, nn.Embedding) and source is None
        self.merged_adapters = ()
        self.base_changed = False
        self._snapshot: dict[str, torch.Tensor] | None = None

    def _hold(self, base_layer: nn.Module) -> None:
        self.token_adapter = _TokenAdapter(base_layer)

    @property
    def _held(self) -> nn.Module:
        """What has base_layer, trainable_tokens_delta and lookup."""
        return self.token_adapter

    @property
    def source(self) -> TrainableTokens | None:
        return self._source[0] if self._source else None

    @property
    def base_layer(self) -> nn.Module:
        return self._held._modules["base_layer"]

    @property
    def base(self):
        return as_base_linear(self.base_layer)

    @property
    def rows(self) -> nn.ParameterDict:
        """{adapter: D [n, d]}."""
        return (self.source or self)._held.trainable_tokens_delta

    @property
    def weight(self) -> torch.Tensor:
        """W with the active adapters' rows in it (a copy): models may use an embedding's weight as their head's."""
        weight = self.base_layer.weight
        for name in self._acting():
            rows = self.rows[name].to(weight.device, weight.dtype)
            weight = weight.index_copy(0, self.indices(name).to(weight.device), rows)
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _OWN:
                raise
            return getattr(self.base_layer, name)

    def indices(self, name: str) -> torch.Tensor:
        """The tokens of D's rows [n]."""
        return (self.source or self)._held.lookup[name].indices

    def add_adapter(self, name: str, indices: list[int], *, fp32: bool, init: bool = True) -> None:
        """Rows for these tokens, as the base has them (as merged adapters left them, where these share a token); random
        ones without init."""
        weight = self.base_layer.weight
        wide = torch.promote_types(weight.dtype, torch.float32) if fp32 else weight.dtype
        index = torch.tensor(indices, device=weight.device)
        former = weight.detach()[index]
        rows = (former if init else torch.randn_like(former)).to(wide, copy=True)
        self._held.lookup[name] = _Lookup(index)
        self.rows[name] = nn.Parameter(rows, requires_grad=False)

    def held_adapters(self) -> list[str]:
        return list(self.rows)

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        if self.source is not None or name not in self.rows:
            return {}
        return {self.rows_key: self.rows[name]}

    def adapter_parameters(self, name: str) -> Iterable[nn.Parameter]:
        return [self.rows[name]] if name in self.rows else []

    def check_together(self, names: list[str], path: str) -> None:
        seen: dict[int, str] = {}
        for name in names:
            for token in self.indices(name).tolist():
                if seen.setdefault(token, name) != name:
                    raise ValueError(
                        f"adapters {seen[token]!r} and {name!r} both have a row for token {token} of {path}: only one of "
                        "them can be active"
                    )

    def remove_adapter(self, name: str) -> None:
        if name in self.merged_adapters:
            self.unmerge()
        for held in (self._held.lookup, self._held.trainable_tokens_delta):
            if name in held:
                del held[name]
        self.active = tuple(other for other in self.active if other != name)

    def _acting(self) -> tuple[str, ...]:
        return () if self.merged_adapters or not self.enabled else self.active

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Tokens [...] -> [..., d] for an embedding; h [..., d] -> logits [..., V] for a head."""
        y = self.base_layer(x, *args, **kwargs)
        for name in self._acting():
            y = self._embed(name, x, y) if isinstance(self.base_layer, nn.Embedding) else self._project(name, x, y)
        return y

    def _embed(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        base, lookup = self.base_layer, (self.source or self)._held.lookup[name]
        hit, position = lookup(x)
        # as in the base, the padding token's row has no gradient
        padding = None if base.padding_idx is None else lookup.positions.get(base.padding_idx)
        new = F.embedding(position, self.rows[name].to(y.device), padding_idx=padding).to(base.weight.dtype)
        scale = getattr(base, "embed_scale", None)
        if scale is not None:
            new = new * (scale.to(new.dtype) if isinstance(scale, torch.Tensor) else scale)
        return torch.where(hit.unsqueeze(-1), new.to(y.dtype), y)

    def _project(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        base, index = self.base_layer, self.indices(name).to(y.device)
        rows = self.rows[name].to(y.device, base.weight.dtype)
        new = F.linear(x, rows, None if base.bias is None else base.bias[index]).to(y.dtype)
        # nobody but hooks keeps the plain layer's output, so its columns can be overwritten
        private = type(base) is nn.Linear and "forward" not in vars(base) and not base._forward_hooks
        return (y.index_copy_ if private else y.index_copy)(-1, index, new)

    @torch.no_grad()
    def merge(self, names: Iterable[str], keep_snapshot: bool, dtype: torch.dtype | None = None) -> float:
        """Writes the rows into W, in place; a head that follows an embedding finds them there."""
        names = self.mergeable(names)
        self.check_together([*self.merged_adapters, *names], "the weight")
        weight = self.base_layer.weight.detach()
        for name in names if self.source is None else ():
            index = self.indices(name).to(weight.device)
            if keep_snapshot:
                self._snapshot = {**(self._snapshot or {}), name: weight[index]}
            weight.index_copy_(0, index, self.rows[name].detach().to(weight))
        self.merged_adapters += names
        return 0.0

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.source is None and self.merged_adapters:
            if self._snapshot is None:
                raise RuntimeError(f"{type(self).__name__}: the rows were merged for good; load the base model again")
            weight = self.base_layer.weight.detach()
            for name, rows in self._snapshot.items():
                weight.index_copy_(0, self.indices(name).to(weight.device), rows.to(weight))
        self._snapshot, self.merged_adapters = None, ()

    @torch.no_grad()
    def check_merge(self, names: Iterable[str], safe: bool) -> None:
        names = self.mergeable(names)
        self.check_together([*self.merged_adapters, *names], "the weight")
        for name in names:
            stored = self.rows[name].to(self.base_layer.weight.dtype) if safe else self.rows[name]
            if not torch.isfinite(stored).all():
                raise ValueError(f"adapter {name!r} has NaN or infinities in its rows for tokens; not merged")

    def extra_repr(self) -> str:
        counts = ", ".join(f"{name}: {len(rows)}" for name, rows in self.rows.items())
        return f"tokens={{{counts}}}, active={self.active}, follows={self.source is not None}"


class TokensLayer(TrainableTokens):
    """The same as a method of its own: PEFT's files have no token_adapter in the keys then."""

    base_key = "base_layer"
    rows_key = "trainable_tokens_delta"

    def _hold(self, base_layer: nn.Module) -> None:
        self._modules["base_layer"] = base_layer
        self.trainable_tokens_delta = nn.ParameterDict()
        self.lookup = nn.ModuleDict()

    @property
    def _held(self) -> nn.Module:
        return self


_OWN = ("token_adapter", "trainable_tokens_delta", "lookup", "_modules", "_source")


class _TokenAdapter(nn.Module):
    """The base and the rows under the names they have in PEFT's modules."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.trainable_tokens_delta = nn.ParameterDict()
        self.lookup = nn.ModuleDict()


class _Lookup(nn.Module):
    """Which tokens have a row of their own, and which one."""

    def __init__(self, indices: torch.Tensor) -> None:
        super().__init__()
        ordered, order = indices.sort()
        for name, value in (("indices", indices), ("ordered", ordered), ("order", order)):
            self.register_buffer(name, value, persistent=False)
        self.positions = {token: i for i, token in enumerate(indices.tolist())}

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(whether each token has a row, its row's number or 0)."""
        ordered, order = self.ordered.to(tokens.device), self.order.to(tokens.device)
        place = torch.searchsorted(ordered, tokens.to(ordered.dtype).contiguous()).clamp(max=len(ordered) - 1)
        hit = ordered[place] == tokens
        return hit, torch.where(hit, order[place], 0)


def check_token_indices(config: PeftConfig) -> None:
    """The field trainable_token_indices of a config: TypeError / ValueError for what no model can have."""
    value, owner = config.trainable_token_indices, type(config).__name__
    if value is None:
        return
    if isinstance(value, dict):
        groups = {f"trainable_token_indices[{name!r}]": indices for name, indices in value.items()}
        if not value or not all(isinstance(name, str) and name for name in value):
            raise ValueError(f"{owner}: trainable_token_indices is {value!r}, expected names of modules as its keys")
    else:
        groups = {"trainable_token_indices": value}
    for field, indices in groups.items():
        check_tokens(config, field, indices)


def check_tokens(config: PeftConfig, field: str, indices: object) -> None:
    """A field, or a part of one, that lists tokens: each once."""
    owner = type(config).__name__
    if not isinstance(indices, (list, tuple)) or not all(type(index) is int for index in indices):
        raise TypeError(f"{owner}: {field} is {indices!r}, expected a list of integers")
    if not indices or min(indices) < 0:
        raise ValueError(f"{owner}: {field} is {indices!r}, expected at least one token, none of them negative")
    if len(set(indices)) < len(indices):
        raise ValueError(f"{owner}: {field} names a token more than once: {sorted(indices)}")


def add_trainable_tokens(
    model: nn.Module,
    found: list[tuple],
    adapter_name: str,
    *,
    fp32: bool,
    init: bool = True,
    kind: type[TrainableTokens] = TrainableTokens,
) -> None:
    """Gives every module of find_token_modules() rows for the adapter; kind: the layer that goes around it."""
    holders: dict[int, TrainableTokens] = {}
    for module, indices, followed in found:
        holder = module
        if not isinstance(module, TrainableTokens):
            holder = kind(module, None if followed is None else holders[id(followed)]).train(module.training)
        holders[id(module)] = holder
        if followed is None:
            holder.add_adapter(adapter_name, indices, fp32=fp32, init=init)
        if holder is not module:
            replace_module(model, module, holder)
