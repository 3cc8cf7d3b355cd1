"""What every method is made of: its config (peft_config.py), its modules that hold adapters, its entry points.

A method is one folder with a config, a layer and one line in registry.py. Nothing outside the folder asks which method
it is dealing with: the model class, the files and the merging speak to AdapterHolder and Method alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pyfastpeft.methods.peft_config import PEFT_VERSION, PeftConfig, PeftType, TaskType
from pyfastpeft.mixed_batch import MixedBatch, by_adapter
from pyfastpeft.nn import BaseLinear, as_base_layer

__all__ = [
    "KEY_PREFIX",
    "PEFT_VERSION",
    "AdapterHolder",
    "Method",
    "MethodLayer",
    "PeftConfig",
    "PeftType",
    "TaskType",
    "adapter_holders",
    "bare_modules",
    "named_by",
    "replace_module",
]
KEY_PREFIX = "base_model.model."


class AdapterHolder(nn.Module):
    """A module that holds something per adapter and knows which adapters are active: a LoRA layer, a saved head, ….

    A subclass fills in the methods that raise here. Its place in the model gives the keys of the files:
    `base_model.model.<path>.<suffix>` with the suffixes of adapter_tensors().
    """

    mixed: MixedBatch | None = None  # each sample's adapter, for the length of a call with adapter_names

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.enabled = True

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            cls.forward = _serving_mixed_batches(cls.__dict__["forward"])

    def forward_mixed(self, batch: MixedBatch, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """forward() where each sample of x has its own adapter of the batch, in place of the active ones."""
        return by_adapter(self, batch, x, *args, **kwargs)

    def check_mixed(self, name: str, path: str) -> None:
        """Raises ValueError where this adapter, which is here, cannot be one of several in a batch."""
        raise ValueError(
            f"adapter_names: adapter {name!r} cannot share a batch with others, because of what it has at {path} "
            f"({type(self).__name__}); use it alone (set_adapter)"
        )

    def held_adapters(self) -> list[str]:
        """The adapters present here, oldest first."""
        raise NotImplementedError

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The live tensors of an adapter under the suffix they have in the files; empty when it is not here."""
        raise NotImplementedError

    def adapter_parameters(self, name: str) -> Iterable[nn.Parameter]:
        """What training the adapter trains."""
        return (t for t in self.adapter_tensors(name).values() if isinstance(t, nn.Parameter))

    def remove_adapter(self, name: str) -> None:
        """Drops an adapter; nothing happens when it is not here."""
        raise NotImplementedError

    def bare_module(self) -> nn.Module:
        """The module that was here before the first adapter."""
        raise NotImplementedError

    def result_module(self) -> nn.Module:
        """The module to keep once adapters are merged: bare_module(), unless an active adapter replaces it."""
        return self.bare_module()

    def leave(self, model: nn.Module, merged: bool = False) -> None:
        """Takes itself out of the model: bare_module(), or result_module() once adapters are merged, takes its place."""
        replace_module(model, self, self.result_module() if merged else self.bare_module())

    def check_together(self, names: list[str], path: str) -> None:
        """Raises ValueError if these adapters, which are here, cannot be active at once."""
        if len(names) > 1:
            raise ValueError(f"adapters {names} each have a copy of {path}: only one of them can be active")

    def check_mergeable(self, names: Iterable[str]) -> None:
        """Raises ValueError if one of the adapters is here and cannot become part of the weights."""

    def activate(self, names: Iterable[str], trainable: bool) -> None:
        """Makes those of `names` that are here the active ones; requires_grad for them alone, and only if trainable."""
        held = self.held_adapters()
        self.active = tuple(name for name in names if name in held)
        for name in held:
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(trainable and name in self.active)


class MethodLayer(AdapterHolder):
    """An AdapterHolder around `base_layer` whose adapters can be folded into its weight (LoRA, (IA)³, …)."""

    base_key = "base_layer"  # where the files have the base's tensors
    merges_weight = True  # False: merging leaves the weight as it is, so a quantised one loses nothing

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._view = as_base_layer(base_layer)
        self.merged_adapters: tuple[str, ...] = ()
        self.base_changed = False  # by ReLoRA: the adapter's file alone does not make this layer any more
        self._snapshot: Any = None

    def check_mixed(self, name: str, path: str) -> None:
        """Any adapter of a layer can."""

    def check_together(self, names: list[str], path: str) -> None:
        """Any adapters of a layer can: their updates add up."""

    def follows(self, names: Iterable[str]) -> bool:
        """Whether another layer, which shares this one's weight, writes into it when these adapters are merged."""
        return False

    @property
    def base(self) -> BaseLinear:
        """The view of base_layer; kept, because torch.compile cannot trace how one is found."""
        if self._view.module is not self.base_layer:
            self._view = as_base_layer(self.base_layer)
        return self._view

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight; model code that looks at `layer.weight.dtype` finds what it expects."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def bare_module(self) -> nn.Module:
        return self.base_layer

    def merged_weights(self, names: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What merging these adapters stores: W [N, K] in fp32 or wider, and the bias [N] (None: it stays as it is)."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, names: Iterable[str], keep_snapshot: bool, dtype: torch.dtype | None = None) -> float:
        """Folds adapters into the base's weight. Returns the relative error this cost (0.0 where nothing is lost).

        keep_snapshot   keep the former weight, so that unmerge() restores it bit for bit
        dtype           replace a quantised base by a dense one of this dtype instead of quantising again
        """
        names = self.mergeable(names)
        if not names:
            return 0.0
        base = self.base
        weight, bias = self.merged_weights(names)
        if keep_snapshot and self._snapshot is None:
            self._snapshot = base.snapshot_weight(), None if bias is None else base.bias.detach().clone()
        if dtype is not None and base.is_quantized:
            self.base_layer = base.to_dense(weight, dtype)
            error = 0.0
        else:
            error = base.set_weight(weight)
        if bias is not None:
            self.base.bias.detach().copy_(bias)
        self.merged_adapters += names
        return error

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes back merge(keep_snapshot=True), exactly."""
        if not self.merged_adapters:
            return
        if self._snapshot is None:
            raise RuntimeError(f"{type(self).__name__}: the adapters were merged for good; load the base model again")
        weight, bias = self._snapshot
        self.base.restore_weight(weight)
        if bias is not None:
            self.base.bias.detach().copy_(bias)
        self._snapshot, self.merged_adapters = None, ()

    @torch.no_grad()
    def check_merge(self, names: Iterable[str], safe: bool) -> None:
        """Raises ValueError where merging would give NaN or infinities; safe looks at the merged weight itself."""
        names = self.mergeable(names)
        for name in names:
            for tensor_name, tensor in self.adapter_tensors(name).items():
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"adapter {name!r} has NaN or infinities in {tensor_name}; not merged")
        if safe and names:
            for merged in self.merged_weights(names):
                if merged is not None and not torch.isfinite(merged.to(self.base.weight_dtype)).all():
                    raise ValueError(
                        f"merging {list(names)} gives NaN or infinities in {self.base.weight_dtype}; not merged. Merge "
                        "into a wider dtype (model.float())"
                    )

    def mergeable(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the adapters that are here and not merged yet."""
        held = self.held_adapters()
        return tuple(name for name in names if name in held and name not in self.merged_adapters)


class Method:
    """The entry points of a method. inject() must make every check before it changes the model."""

    peft_type: PeftType
    config_class: type[PeftConfig]
    resume_name: str | None = None  # the file of resume_tensors()

    def inject(
        self, model: nn.Module, config: PeftConfig, adapter_name: str, *, fp32: bool, init: bool, strict: bool
    ) -> PeftConfig:
        """Adds an adapter to the model (not activated); returns the config with what was found out filled in.

        model    the base model itself, perhaps with adapters in it already
        config   the caller's; not changed
        fp32     store adapter weights in fp32; otherwise in the dtype the base computes in
        init     draw initial values (False: whatever memory holds; the values come from a file)
        strict   an entry of target_modules that matches nothing is an error rather than a warning
        """
        raise NotImplementedError

    def penalty(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> torch.Tensor | None:
        """What the method adds to the loss in training, or None."""
        return None

    def update_and_allocate(self, model: nn.Module, adapter_name: str, step: int) -> None:
        """What the method does by hand after optimizer step `step`, before the gradients are dropped."""

    def add_weighted_adapter(self, adapted: Any, adapters: list[str], weights: list[float], name: str, *how) -> None:
        """Adds an adapter made of others; see AdaptedModel.add_weighted_adapter."""
        raise ValueError(f"adapters of {self.peft_type.value} cannot be combined")

    def to_file(self, tensors: Mapping[str, torch.Tensor], config: PeftConfig) -> Mapping[str, torch.Tensor]:
        """What a file holds of tensors(); config is the one that goes into the file and may be changed."""
        return tensors

    def from_file(
        self, found: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor], config: PeftConfig
    ) -> Mapping[str, torch.Tensor]:
        """A file's tensors in the shapes of tensors(), where the file may hold a part of them; not checked yet."""
        return found

    def tensors(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> dict[str, torch.Tensor]:
        """The adapter's live tensors by their keys in the file: saving reads them, loading writes into them."""
        return {
            f"{KEY_PREFIX}{path}.{suffix}": tensor
            for path, holder in adapter_holders(model)
            for suffix, tensor in holder.adapter_tensors(adapter_name).items()
        }

    def file_tensors(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> dict[str, torch.Tensor]:
        """What adapter_model.safetensors holds, where that is not tensors() (virtual tokens as an encoder gives them)."""
        return self.tensors(model, config, adapter_name)

    def resume_tensors(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> dict[str, torch.Tensor]:
        """What training needs to go on and PEFT's file has no place for; written to a file of its own."""
        return {}

    def merged(self, model: nn.Module, config: PeftConfig) -> None:
        """Called with the plain model, once its adapter of this config is merged into it for good."""

    def loading_tensors(
        self, model: nn.Module, config: PeftConfig, adapter_name: str, resume: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Where the values of a file go, by its keys. Raises ValueError if `resume`, a resume_tensors(), does not fit."""
        return self.tensors(model, config, adapter_name)

    def finish_loading(
        self,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        live: dict[str, torch.Tensor],
        resume: dict[str, torch.Tensor],
    ) -> None:
        """Called when the values are in loading_tensors()."""


def _serving_mixed_batches(forward: Callable) -> Callable:
    """A holder's forward, which hands a mixed batch to forward_mixed."""

    @functools.wraps(forward)
    def serving(self, *args, **kwargs):
        if self.mixed is None or not self.enabled:
            return forward(self, *args, **kwargs)
        return self.forward_mixed(self.mixed, *args, **kwargs)

    return serving


def adapter_holders(model: nn.Module) -> Iterator[tuple[str, AdapterHolder]]:
    """(path, holder) of every AdapterHolder in the model, outermost ones only."""
    return ((path, module) for path, module in bare_modules(model) if isinstance(module, AdapterHolder))


def bare_modules(model: nn.Module, prefix: str = "", seen: set | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Like named_modules() of the model before any adapter: holders are given, what is inside them is not."""
    seen = set() if seen is None else seen
    if model in seen:
        return
    seen.add(model)
    yield prefix, model
    if isinstance(model, AdapterHolder):
        return
    for name, child in model.named_children():
        yield from bare_modules(child, f"{prefix}.{name}" if prefix else name, seen)


def named_by(path: str, names: Iterable[str]) -> bool:
    """Whether the path is one of the names or ends in one after a dot."""
    return path in names or any(path.endswith(f".{name}") for name in names)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever `old` is a child in the model (a shared module has several places), inside holders as well."""
    for parent in list(model.modules()):
        if parent is new:
            continue
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
