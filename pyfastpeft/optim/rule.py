"""Optimizers with one fp32 tensor of state: `update` in torch is the rule, csrc/momentum the same operations in the same
order for many tensors or pieces at once, and their bits are the same.

A rule may use only operations whose result for a value does not depend on its neighbours or its place (no fused
multiply-add behind `alpha=`): then paged and unpaged steps give the same bits.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pyfastpeft._native import _C
from pyfastpeft.ops import adamw as op
from pyfastpeft.ops._library import DTYPE_CODES
from pyfastpeft.optim.adamw_plan import Part, Plan, are_plain, run_plans, somebody_listens
from pyfastpeft.optim.device_pages import DevicePages
from pyfastpeft.optim.in_backward import Steps
from pyfastpeft.optim.loading import LoadsStates
from pyfastpeft.optim.page_space import STEP, Field, PagedState, Piece
from pyfastpeft.optim.paged import PagedOptimizer
from pyfastpeft.optim.step_plan import Call
from pyfastpeft.paged_memory import PagedMemory

_CHUNK = 1 << 20  # values stepped together: temporaries stay small


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a dense tensor in the order of memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


class _NativeCall:
    """Whole tensors that csrc/momentum steps in one call; what a Plan keeps of them."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.params: list[torch.Tensor] = []
        self.grads: list[torch.Tensor] = []
        self.momenta: list[torch.Tensor] = []
        self.steps: list[torch.Tensor] = []
        self.states: list[dict] = []

    def takes(self, p: torch.Tensor, grad: torch.Tensor, state: dict[str, Any]) -> bool:
        """Adds a parameter, unless its kind is not the compiled code's."""
        momentum, step = state[self.key], state["step"]
        tensors = (p, grad, momentum, step)
        if not (
            all(t.device.type == "cpu" for t in tensors)
            and p.dtype in DTYPE_CODES
            and grad.dtype in (p.dtype, torch.float32)
            and momentum.dtype == step.dtype == torch.float32
            and momentum.shape == p.shape
            and all(t.stride() == p.stride() or (t.is_contiguous() and p.is_contiguous()) for t in (grad, momentum))
        ):
            return False
        for each, t in zip((self.params, self.grads, self.momenta, self.steps), tensors, strict=True):
            each.append(t)
        self.states.append(state)
        return True

    def tables(self) -> tuple | None:
        """The binding's first arguments; None where two parameters are the same memory."""
        params = op._addresses(self.params)
        if len(set(params)) < len(params) and len({*params} - {0}) < sum(map(bool, params)):  # 0: without values
            return None
        pairs = zip(self.params, self.grads, strict=True)
        kinds = bytes(DTYPE_CODES[p.dtype] | DTYPE_CODES[grad.dtype] << 2 for p, grad in pairs)
        lists = (params, *map(op._addresses, (self.grads, self.momenta, self.steps)))
        return *lists, array("q", map(op._numel, self.params)), kinds

    def keep(self, tables: tuple) -> None:
        self.kept, lists = tables, (self.params, self.grads, self.momenta, self.steps)
        cuts = [slice(i, i + Part.SIZE) for i in range(0, len(self.states), Part.SIZE)]
        places = {self.key: 2, "step": 3}
        self.parts = [Part([each[cut] for each in lists], self.states[cut], places) for cut in cuts]
        self.grads, self.momenta, self.steps = [], [], []  # the states and parameters have them

    def current(self, state: Mapping) -> tuple | None:
        """The tables with the gradients of now, or None where something else has changed."""
        grads = array("Q")
        for part in self.parts:
            addresses = part.grads(state)
            if addresses is None:
                return None
            grads += addresses
        return self.kept[0], grads, *self.kept[2:]

    def launch(self, tables: tuple, scalars: tuple) -> None:
        _C.momentum_cpu(*tables, *scalars)
        torch.autograd.graph.increment_version(self.params)


class Rule(LoadsStates, Steps, torch.optim.Optimizer):
    """A subclass has `state_keys` (one fp32 tensor like the parameter), `_check_options`, `update` and `_scalars`."""

    state_keys: tuple[str, ...] = ()

    @staticmethod
    def _scalars(group: dict[str, Any]) -> tuple:
        """The options as csrc/momentum takes them: rule, lr, weight_decay, its two numbers, nesterov, maximize."""
        raise NotImplementedError

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._plans: dict[int, Plan] = {}  # by the group's number
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}

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

    def _step_groups(self, groups: Sequence[dict[str, Any]], plans: dict) -> None:
        run_plans(plans, groups, self.state, self._step_and_plan, lambda group, _: self._scalars(group))

    def _step_and_plan(self, _: int, group: dict[str, Any]) -> Plan | None:
        """The step from the group's parameters as they are; the plan for the next, where compiled code takes all of them."""
        call, others, listened = _NativeCall(self.state_keys[0]), [], somebody_listens()
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                small = self._small_states
                state["step"] = small.step(torch.device("cpu"))
                state.update({key: small.zeros_like(p, torch.float32) for key in self.state_keys})
            grad = _like_parameter(p, p.grad)
            if listened or not call.takes(p, grad, state):
                others.append((p, grad, state))
        tables = call.tables() if call.params else None
        if tables is not None:
            call.launch(tables, self._scalars(group))
        else:
            others += zip(call.params, call.grads, call.states, strict=True)
        for p, grad, state in others:
            self._step_one(p, grad, state, group)
        if others or not all(map(are_plain, (call.params, call.grads, call.momenta, call.steps))):
            return None
        if tables is not None:
            call.keep(tables)
        return Plan(group, [call] if tables is not None else [])

    def _step_one(self, p: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] += 1
        parts = {key: _flat(state[key]) for key in self.state_keys}
        for first in range(0, p.numel(), _CHUNK):
            cut = slice(first, first + _CHUNK)
            own = {key: value[cut] for key, value in parts.items()}
            self._update(_flat(p)[cut], _flat(grad)[cut], own, int(state["step"]), group)

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
    def close(self) -> None:
        super().close()
        pairs = zip(self.param_dtypes, self.grad_dtypes, strict=True)
        self.kinds = [DTYPE_CODES[p] | DTYPE_CODES[g] << 2 for p, g in pairs]

    def row(self, tensor: int, state: PagedState, piece: Piece) -> tuple[int, ...]:
        """momentum_bind.cpp: struct Row."""
        return (tensor, self.kinds[tensor], piece.first, piece.n, *piece.offsets)


class PagedRule(PagedOptimizer):
    """Put before a Rule in the bases of a class: the same optimizer with its state in pages, on the CPU.

    resident_bytes, spill_dir   as PagedAdamW's; the others are the Rule's
    """

    def __init__(
        self,
        params: Any,
        *args: Any,
        resident_bytes: int | str | None = None,
        spill_dir: str | os.PathLike | None = None,
        **options: Any,
    ) -> None:
        self._open_pages(resident_bytes, spill_dir)
        super().__init__(params, *args, **options)

    def _memory_for(self, device: torch.device) -> PagedMemory | DevicePages:
        if device.type != "cpu":
            raise ValueError(
                f"{type(self).__name__}: a parameter is on {device}, expected the CPU; PagedAdamW pages a GPU's state"
            )
        return super()._memory_for(device)

    def _fields(self, p: torch.Tensor, group: dict[str, Any]) -> tuple[tuple[Field, ...], dict[str, Any]]:
        if p.dtype not in DTYPE_CODES:
            raise TypeError(f"{type(self).__name__}: a parameter is {p.dtype}, expected float32, bfloat16 or float16")
        return (STEP, *(Field(key, torch.float32) for key in self.state_keys)), {}

    def _first_values(self, p: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {}

    def _kind(self, p: torch.Tensor, state: PagedState) -> tuple:
        return ()

    def _call(self, number: int, index: int, state: PagedState) -> _RuleCall:
        return _RuleCall(number, index, state)

    def _options(self, call: Call) -> tuple:
        return self._scalars(self.param_groups[call.group_number])

    def _launch(
        self, call: Call, tables: list[array], pages: list[int], page_bytes: int, threads: int, options: tuple
    ) -> None:
        _C.momentum_pages_cpu(
            tables, pages, page_bytes, threads, call.param_addresses, call.grad_addresses, call.numels, *options
        )


def check_numbers(title: str, group: dict[str, Any], *names: str) -> None:
    """ValueError unless these options are numbers of at least 0."""
    for name in names:
        if not group[name] >= 0:
            raise ValueError(f"{title}: {name} is {group[name]}, expected a number >= 0")
