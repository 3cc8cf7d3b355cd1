"""BitFitLayer: a module whose biases (and, for a norm, scale) are the adapter's instead of its own.

    y = x Wᵀ + b_adapter           a linear layer; likewise norms, convolutions, packed attention projections

The module computes as it always does, with the adapter's values in the places of its own: no extra operation, and on a
4-bit base the bias stays part of the matmul. The values are kept in fp32 and rounded to what the module stores. Files
hold them under the names that the module's own have: `<path>.bias`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pyfastpeft.methods.base import MethodLayer
from pyfastpeft.nn import as_base_linear


class BitFitLayer(MethodLayer):
    """A module with adapters that are values of some of its parameters: `bitfit[adapter][name]`, dots written "/".

    base_layer   any module; a linear one without a bias gets one from the adapter
    """

    merges_weight = False

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.bitfit = nn.ModuleDict()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "bitfit"):
                raise
            return self._read(name)

    @property
    def weight(self) -> torch.Tensor:
        return self._read("weight")

    @property
    def bias(self) -> torch.Tensor | None:
        return self._read("bias")

    def _read(self, name: str) -> Any:
        """What the model's code finds in the module: the adapter's value of what it changes, else the module's own."""
        if self.active and self.enabled and not self.merged_adapters and name in self.bitfit[self.active[0]]:
            return self._values(self.active)[name]
        return getattr(self.base_layer, name)

    def add_adapter(self, name: str, parameters: Iterable[str], *, fp32: bool) -> None:
        """Adds an adapter that begins at the module's own values, 0 where it has none; frozen until it is activated.

        parameters   names inside base_layer: "bias", "in_proj_bias", "out_proj.bias", a norm's "weight"
        """
        values = nn.ParameterDict()
        for parameter in parameters:
            own, like = self._own(parameter), self._like(parameter)
            wide = torch.promote_types(like.dtype, torch.float32) if fp32 else like.dtype
            start = torch.zeros(like.shape, dtype=wide, device=like.device) if own is None else own.detach()
            value = start.to(wide, copy=True)
            values[parameter.replace(".", "/")] = nn.Parameter(value, requires_grad=False)
        self.bitfit[name] = values
        if any("/" in parameter for parameter in values) and not self._forward_pre_hooks:
            # torch's fused TransformerEncoderLayer reads inner biases past this layer, unless there is a hook
            self.register_forward_pre_hook(_no_change)

    def _place(self, parameter: str) -> tuple[dict, str]:
        """(the dict of parameters it lies in, its key there)."""
        path, _, name = parameter.rpartition(".")
        return self.base_layer.get_submodule(path)._parameters, name

    def _own(self, parameter: str) -> torch.Tensor | None:
        slots, name = self._place(parameter)
        return slots.get(name)

    def _like(self, parameter: str) -> torch.Tensor:
        """An (empty) tensor with the shape, dtype and device that the module's own value has, or would have."""
        own = self._own(parameter)
        if own is not None:
            return own
        base = as_base_linear(self.base_layer)
        return torch.empty(base.out_features, dtype=base.weight_dtype, device=base.device)

    def held_adapters(self) -> list[str]:
        return list(self.bitfit)

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.bitfit:
            return {}
        return {parameter.replace("/", "."): value for parameter, value in self.bitfit[name].items()}

    def remove_adapter(self, name: str) -> None:
        if name in self.merged_adapters:
            self.unmerge()
        if name in self.bitfit:
            del self.bitfit[name]
        self.active = tuple(other for other in self.active if other != name)

    def forward(self, *args, **kwargs):
        if not self.active or not self.enabled or self.merged_adapters:
            return self.base_layer(*args, **kwargs)
        # the module's own forward and hooks run; only what it reads from these places differs
        places = []
        try:
            for parameter, value in self._values(self.active).items():
                slots, name = self._place(parameter)
                places.append((slots, name, slots.get(name)))
                slots[name] = value
            return self.base_layer(*args, **kwargs)
        finally:
            for slots, name, own in places:
                slots[name] = own

    def _values(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """What the module reads: the adapter's values; of several adapters the sum of their differences to its own."""
        first, *others = names
        values = dict(self.adapter_tensors(first))
        for name in others:
            for parameter, value in self.adapter_tensors(name).items():
                own = self._own(parameter)
                change = value if own is None else value - own.to(value.dtype)
                values[parameter] = values[parameter] + change if parameter in values else value
        return {parameter: value.to(self._like(parameter).dtype) for parameter, value in values.items()}

    @torch.no_grad()
    def merge(self, names: Iterable[str], keep_snapshot: bool, dtype: torch.dtype | None = None) -> float:
        """Makes the adapters' values the module's own. Loses nothing beyond the rounding that forward does too."""
        names = self.mergeable(names)
        if not names:
            return 0.0
        names = (*self.merged_adapters, *names)
        if self._snapshot:
            self.unmerge()
        values, self._snapshot = self._values(names), {}
        for parameter, value in values.items():
            slots, name = self._place(parameter)
            if keep_snapshot:
                self._snapshot[parameter] = slots.get(name)
            slots[name] = nn.Parameter(value.detach().clone(), requires_grad=False)
        self.merged_adapters = names
        return 0.0

    @torch.no_grad()
    def unmerge(self) -> None:
        if not self.merged_adapters:
            return
        if not self._snapshot:
            raise RuntimeError("BitFitLayer: the adapters were merged for good; load the base model again")
        for parameter, own in self._snapshot.items():
            slots, name = self._place(parameter)
            slots[name] = own
        self._snapshot, self.merged_adapters = None, ()

    def check_merge(self, names: Iterable[str], safe: bool) -> None:
        for name in self.mergeable(names):
            for parameter, value in self.adapter_tensors(name).items():
                if not torch.isfinite(value.to(self._like(parameter).dtype)).all():
                    raise ValueError(f"adapter {name!r} has NaN or infinities in {parameter}; not merged")

    def extra_repr(self) -> str:
        return f"active={self.active}"


def _no_change(module: nn.Module, args: tuple) -> None:
    """A forward pre-hook that does nothing."""
