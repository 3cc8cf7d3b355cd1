"""trainable_token_indices: some rows of an embedding trained beside an adapter, in place of the whole matrix.

    y[t] = D[i] where token t is the i-th index, else W[t]          W [V, d], D [n, d], n indices

D starts as the rows it replaces. An output head that shares W with the embedding (tied weights: one Parameter) follows: the
logits of those tokens are h Dᵀ + bias. Neither builds a second W: PEFT copies all of it in every forward, and leaves out the
head's bias. The files hold D alone, under PEFT's key: `<path>.token_adapter.trainable_tokens_delta`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from pyfastpeft.methods.base import (
    AdapterHolder,
    MethodLayer,
    PeftConfig,
    bare_modules,
    named_by,
    replace_module,
)
from pyfastpeft.nn import as_base_linear


class TrainableTokens(MethodLayer):
    """An embedding or an output head with trainable rows for some tokens.

    base_layer   an nn.Embedding, or an nn.Linear
    source       the TrainableTokens of the embedding whose weight this module shares: its rows are this one's too
    """

    base_key = "token_adapter.base_layer"

    def __init__(self, base_layer: nn.Module, source: TrainableTokens | None = None) -> None:
        AdapterHolder.__init__(self)
        self.token_adapter = _TokenAdapter(base_layer)
        self._source = [] if source is None else [source]  # in a list: its parameters are not this module's
        # an embedding's weight is written in place, and those who share it follow; a head gets one of its own first
        self.merges_weight = not isinstance(base_layer, nn.Embedding) and source is None
        self.merged_adapters = ()
        self.base_changed = False
        self._snapshot: dict[str, torch.Tensor] | None = None

    @property
    def source(self) -> TrainableTokens | None:
        return self._source[0] if self._source else None

    @property
    def base_layer(self) -> nn.Module:
        return self.token_adapter.base_layer

    @property
    def base(self):
        return as_base_linear(self.base_layer)

    @property
    def rows(self) -> nn.ParameterDict:
        """{adapter: D [n, d]}."""
        return (self.source or self).token_adapter.trainable_tokens_delta

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
            if name == "token_adapter":
                raise
            return getattr(self.token_adapter.base_layer, name)

    def indices(self, name: str) -> torch.Tensor:
        """The tokens of D's rows [n]."""
        return (self.source or self).token_adapter.lookup[name].indices

    def add_adapter(self, name: str, indices: list[int], *, fp32: bool) -> None:
        """Rows for these tokens, as the base has them (as merged adapters left them, where these share a token)."""
        weight = self.base_layer.weight
        wide = torch.promote_types(weight.dtype, torch.float32) if fp32 else weight.dtype
        index = torch.tensor(indices, device=weight.device)
        rows = weight.detach()[index].to(wide, copy=True)
        self.token_adapter.lookup[name] = _Lookup(index)
        self.rows[name] = nn.Parameter(rows, requires_grad=False)

    def held_adapters(self) -> list[str]:
        return list(self.rows)

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        if self.source is not None or name not in self.rows:
            return {}
        return {"token_adapter.trainable_tokens_delta": self.rows[name]}

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
        for held in (self.token_adapter.lookup, self.token_adapter.trainable_tokens_delta):
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
        base, lookup = self.base_layer, (self.source or self).token_adapter.lookup[name]
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
                raise RuntimeError("TrainableTokens: the rows were merged for good; load the base model again")
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
        place = torch.searchsorted(ordered, tokens.to(ordered.dtype)).clamp(max=len(ordered) - 1)
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
        right = isinstance(indices, (list, tuple)) and all(type(index) is int for index in indices)
        if not right:
            raise TypeError(f"{owner}: {field} is {indices!r}, expected a list of integers")
        if not indices or min(indices) < 0:
            raise ValueError(f"{owner}: {field} is {indices!r}, expected at least one token, none of them negative")
        if len(set(indices)) < len(indices):
            raise ValueError(f"{owner}: {field} names a token more than once: {sorted(indices)}")


def find_token_modules(
    model: nn.Module, config: PeftConfig, targets: Iterable[str], saved: Iterable[str]
) -> list[tuple[nn.Module, list[int], nn.Module | None]]:
    """(module, its tokens, the module it follows or None) for what trainable_token_indices names, the followed ones first.

    targets, saved   paths that the same config adapts, or trains whole
    Raises ValueError for what cannot have trainable tokens, before anything is changed.
    """
    wanted = getattr(config, "trainable_token_indices", None)
    if wanted is None:
        return []
    targets, saved = set(targets), set(saved)
    modules = {path: module for path, module in bare_modules(model) if path}
    if not isinstance(wanted, dict):
        wanted = {_input_embedding(model, modules): wanted}
    tokens: dict[str, list[int]] = {}
    for name, indices in wanted.items():
        paths = [path for path in modules if named_by(path, [name])]
        if not paths:
            near = difflib.get_close_matches(name, sorted({path.rpartition(".")[2] for path in modules}), n=3)
            hint = f"; near misses: {', '.join(near)}" if near else ""
            raise ValueError(f"trainable_token_indices: {name!r} matches no module of the model{hint}")
        for path in paths:
            if tokens.setdefault(path, list(indices)) != list(indices):
                raise ValueError(f"trainable_token_indices: two of its names mean {path}, with different tokens")
    for path, indices in tokens.items():
        _check_module(path, modules[path], indices, targets, saved)
    found: dict[str, tuple] = {}
    for path in sorted(tokens, key=list(modules).index):
        if path in found:
            continue
        found[path] = modules[path], tokens[path], None
        if isinstance(_bare(modules[path]), nn.Embedding):
            for other in _sharing(path, modules, tokens, targets, saved):
                found[other] = modules[other], tokens[path], modules[path]
    for path, (module, _, followed) in found.items():
        former = module.source if isinstance(module, TrainableTokens) else None
        if isinstance(module, TrainableTokens) and former is not followed:
            raise ValueError(
                f"trainable_token_indices: {path} {'shares' if former else 'does not share'} its tokens with an embedding "
                "for an earlier adapter; name the same modules for both"
            )
    return list(found.values())


def add_trainable_tokens(model: nn.Module, found: list[tuple], adapter_name: str, *, fp32: bool) -> None:
    """Gives every module of find_token_modules() rows for the adapter."""
    holders: dict[int, TrainableTokens] = {}
    for module, indices, followed in found:
        holder = module
        if not isinstance(module, TrainableTokens):
            holder = TrainableTokens(module, None if followed is None else holders[id(followed)]).train(module.training)
        holders[id(module)] = holder
        if followed is None:
            holder.add_adapter(adapter_name, indices, fp32=fp32)
        if holder is not module:
            replace_module(model, module, holder)


def _bare(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, MethodLayer) else module


def _input_embedding(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    """The path of the model's input embedding; "embed_tokens" where it cannot say."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return "embed_tokens"
    return next((path for path, module in modules.items() if module is embedding), "embed_tokens")


def _check_module(path: str, module: nn.Module, indices: list[int], targets: set[str], saved: set[str]) -> None:
    if any(path == other or path.startswith(f"{other}.") for other in saved):
        raise ValueError(
            f"trainable_token_indices: {path} is in modules_to_save too, which trains all of it; choose one"
        )
    if path in targets or (isinstance(module, AdapterHolder) and not isinstance(module, TrainableTokens)):
        raise ValueError(
            f"trainable_token_indices: {path} is adapted or saved whole by another part of this or an earlier adapter; a "
            "module has one of them"
        )
    base = _bare(module)
    view = as_base_linear(base)
    usable = isinstance(base, nn.Embedding) or (isinstance(base, nn.Linear) and not (view and view.is_quantized))
    if not usable or not base.weight.is_floating_point():
        raise ValueError(
            f"trainable_token_indices: {path} is a {type(base).__name__}, expected an nn.Embedding or an nn.Linear that is "
            "not quantised"
        )
    if isinstance(base, nn.Embedding):
        scaled = type(base).forward is nn.Embedding.forward or hasattr(base, "embed_scale")
        if base.max_norm is not None or base.scale_grad_by_freq or base.sparse or not scaled:
            raise ValueError(
                f"trainable_token_indices: {path} ({type(base).__name__}) does more than look up and scale rows (max_norm, "
                "scale_grad_by_freq, sparse, or a forward of its own), which rows of its own would not take part in"
            )
    if max(indices) >= base.weight.shape[0]:
        raise ValueError(
            f"trainable_token_indices: token {max(indices)} of {path}, which has {base.weight.shape[0]} rows; resize the "
            "embedding first (resize_token_embeddings)"
        )


def _sharing(path: str, modules: dict, tokens: dict[str, list[int]], targets: set[str], saved: set[str]) -> list[str]:
    """The modules with the same weight Parameter, which follow; one that is trained whole has a copy of its own."""
    weight, found = _bare(modules[path]).weight, []
    for other, module in modules.items():
        bare = module.bare_module() if isinstance(module, AdapterHolder) else module
        if other == path or bare._parameters.get("weight") is not weight or other in saved:
            continue
        if other in tokens and tokens[other] != tokens[path]:
            raise ValueError(
                f"trainable_token_indices: {path} and {other} share one weight and have different tokens; name {path} alone, "
                f"{other} follows it"
            )
        _check_module(other, module, tokens[path], targets, saved)
        found.append(other)
    return found
