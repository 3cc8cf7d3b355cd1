"""Optimizers whose rule is a few lines of torch on flat fp32 tensors; the same lines step pages and whole tensors.

A rule may use only operations whose result for a value does not depend on its neighbours or its place (no fused
multiply-add behind `alpha=`): then paged and unpaged steps give the same bits.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from typing import Any

import torch

from pyfastpeft.optim.device_pages import DevicePages
from pyfastpeft.optim.loading import LoadsStates
from pyfastpeft.optim.page_space import STEP, Field, PagedState, Piece
from pyfastpeft.optim.paged import PagedOptimizer
from pyfastpeft.optim.step_plan import Call
from pyfastpeft.paged_memory import PagedMemory

_CHUNK = 1 << 20  # values stepped together: temporaries stay small


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a dense tensor in the order of memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


class Rule(LoadsStates, torch.optim.Optimizer):
    """A subclass has `state_keys` (fp32 tensors like the parameter), `_check_options` and `update`."""

    state_keys: tuple[str, ...] = ()

    @staticmethod
    def update(p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor], step: int, group: dict) -> None:
        """Steps flat fp32 p and state in place; g may be overwritten. `step` counts from 1."""
        raise NotImplementedError

    @staticmethod
    def _check_options(group: dict[str, Any]) -> None:
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_options(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what `closure`, if given, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state.update({key: torch.zeros_like(p, dtype=torch.float32) for key in self.state_keys})
                grad = _like_parameter(p, p.grad)
                state["step"] += 1
                parts = {key: _flat(state[key]) for key in self.state_keys}
                for first in range(0, p.numel(), _CHUNK):
                    cut = slice(first, first + _CHUNK)
                    own = {key: value[cut] for key, value in parts.items()}
                    self._update(_flat(p)[cut], _flat(grad)[cut], own, int(state["step"]), group)
        return loss

    def _update(self, p: torch.Tensor, g: torch.Tensor, state: dict, step: int, group: dict[str, Any]) -> None:
        g = -g.float() if group["maximize"] else g.float().clone()
        exact = p.float()  # p itself where it is fp32
        self.update(exact, g, state, step, group)
        if exact is not p:
            p.copy_(exact)

    def _converted(self, p: torch.Tensor, group: dict[str, Any], key: Any, value: dict[str, Any]) -> dict[str, Any]:
        found = {k: value[k] for k in self.state_keys if value.get(k) is not None}
        title = type(self).__name__
        if not value or (self.state_keys and not found):
            return {}
        if len(found) != len(self.state_keys) or any(t.shape != p.shape for t in found.values()):
            shapes = {k: tuple(t.shape) for k, t in found.items()}
            raise ValueError(
                f"{title}.load_state_dict: state {key} has {shapes}, expected {', '.join(self.state_keys)} of the "
                f"parameter's shape {tuple(p.shape)}"
            )
        state = {"step": torch.as_tensor(value.get("step", 1.0), dtype=torch.float32).detach().clone().reshape(())}
        for k, tensor in found.items():
            state[k] = torch.empty_like(p, dtype=torch.float32).copy_(tensor)
        return state


def _like_parameter(p: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient, its values in memory in the parameter's order."""
    if grad.layout is not torch.strided:
        raise RuntimeError(f"a gradient is sparse ({grad.layout}), expected a dense one; use torch.optim.SGD")
    if not torch.ops.aten.is_non_overlapping_and_dense(p):
        raise ValueError(f"a parameter has strides {p.stride()}, which leave gaps or overlap; make it contiguous")
    if grad.stride() == p.stride() or (grad.is_contiguous() and p.is_contiguous()):
        return grad
    return torch.empty_like(p, dtype=grad.dtype).copy_(grad)


class _RuleCall(Call):
    def row(self, tensor: int, state: PagedState, piece: Piece) -> tuple[int, ...]:
        return (tensor, piece.first, piece.n, *piece.offsets)


class PagedRule(PagedOptimizer):
    """Put before a Rule in the bases of a class: the same optimizer with its state in pages, on the CPU."""

    def _memory_for(self, device: torch.device) -> PagedMemory | DevicePages:
        if device.type != "cpu":
            raise ValueError(
                f"{type(self).__name__}: a parameter is on {device}, expected the CPU; PagedAdamW pages a GPU's state"
            )
        return super()._memory_for(device)

    def _fields(self, p: torch.Tensor, group: dict[str, Any]) -> tuple[tuple[Field, ...], dict[str, Any]]:
        return (STEP, *(Field(key, torch.float32) for key in self.state_keys)), {}

    def _first_values(self, p: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {}

    def _kind(self, p: torch.Tensor, state: PagedState) -> tuple:
        return ()

    def _call(self, number: int, index: int, state: PagedState) -> _RuleCall:
        return _RuleCall(number, index, state)

    def _options(self, call: Call) -> dict[str, Any]:
        return dict(self.param_groups[call.group_number])

    def _launch(
        self, call: Call, tables: list[array], pages: list[int], page_bytes: int, threads: int, options: dict[str, Any]
    ) -> None:
        width = 4 + len(self.state_keys)
        for table, base in zip(tables, pages, strict=True):
            page = torch.frombuffer((ctypes.c_char * page_bytes).from_address(base), dtype=torch.float32)
            for at in range(0, len(table), width):
                tensor, first, n, counter, *offsets = table[at : at + width]
                page[counter // 4] += 1
                own = {k: page[o // 4 : o // 4 + n] for k, o in zip(self.state_keys, offsets, strict=True)}
                p, g = _flat(call.params[tensor])[first : first + n], _flat(call.grads[tensor])[first : first + n]
                self._update(p, g, own, int(page[counter // 4]), options)


def check_numbers(title: str, group: dict[str, Any], *names: str) -> None:
    """ValueError unless these options are numbers of at least 0."""
    for name in names:
        if not group[name] >= 0:
            raise ValueError(f"{title}: {name} is {group[name]}, expected a number >= 0")
