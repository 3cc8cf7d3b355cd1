"""What AdamW (and, by the same means, Lion and SGD) keeps of a group from one step to the next, so that ten thousand small
tensors are not looked at one by one.

Checking the lists of a call and taking their addresses costs some 6 µs a tensor, many times the update of a small one.
A plan holds a call's addresses and kinds as ops.adamw made them, with the lists they came from. Before it is used again,
everything that a training loop may have changed is compared, by passes over whole lists in C (60 ns a tensor each): the
group's parameters, which of them have a gradient, the gradients' dtypes, sizes and layouts, and where the parameters and
their state lie in memory. What differs in anything is no longer this plan's: the step then goes the long way and makes
a new one.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any

import torch

from pyfastpeft.ops import adamw as op

_TYPES = {torch.Tensor, torch.nn.Parameter}
# key of a parameter's state: which of the op's lists it is in
_STATE_32 = {"exp_avg": 2, "exp_avg_sq": 3, "step": 4}
_STATE_8 = {"state1": 2, "state2": 3, "step": 4, "absmax1": 5, "absmax2": 6}


class Part:
    """Some hundreds of a call's parameters: what one pass has brought into the processor's cache the next finds there."""

    SIZE = 256

    def __init__(self, lists: Sequence[list], states: list[dict], places: Mapping[str, int]) -> None:
        self.params, self.states = lists[0], states
        self.addresses, self.numels = op._addresses(lists[0]), array("q", map(op._numel, lists[0]))
        self.grad_dtypes = list(map(op._dtype, lists[1]))
        self.state_addresses = [(itemgetter(key), op._addresses(lists[place])) for key, place in places.items()]

    def grads(self, state: Mapping) -> array | None:
        """The gradients' addresses, or None where something else has changed."""
        params, states = self.params, self.states
        if not all(map(is_, map(state.get, params), states)):
            return None
        if op._addresses(params) != self.addresses or not all(map(op._is_contiguous, params)):
            return None
        for item, addresses in self.state_addresses:
            if array("Q", map(op._data_ptr, map(item, states))) != addresses:
                return None
        grads = [p.grad for p in params]
        found = op._addresses(grads)
        if list(map(op._dtype, grads)) != self.grad_dtypes or array("q", map(op._numel, grads)) != self.numels:
            return None
        return found if all(map(op._is_contiguous, grads)) else None


class _Call:
    """One call of adamw_: parameters whose states are of one kind."""

    def __init__(self, lists: Sequence[list], states: list[dict], qmaps: tuple) -> None:
        self.params, self.states, self.qmaps = lists[0], states, qmaps
        self.tables = op.tables_of(lists)
        places = dict(_STATE_32 if qmaps[0] is None else _STATE_8)
        if lists[7]:
            places["master"] = 7
        cuts = [slice(i, i + Part.SIZE) for i in range(0, len(states), Part.SIZE)]
        self.parts = [Part([each[cut] for each in lists], states[cut], places) for cut in cuts]

    def current(self, state: Mapping) -> tuple | None:
        """The tables with the gradients of now, or None where something else has changed."""
        if self.qmaps[0] is not None:
            for key, qmap in zip(("qmap1", "qmap2"), self.qmaps, strict=True):
                if not all(s[key] is qmap for s in self.states):
                    return None
        grads = array("Q")
        for part in self.parts:
            addresses = part.grads(state)
            if addresses is None:
                return None
            grads += addresses
        return (*self.tables[:2], grads, *self.tables[3:])

    def launch(self, tables: tuple, scalars: dict[str, Any]) -> None:
        op.launch(tables, [self.params], *self.qmaps, **scalars)


class Plan:
    """The calls of one group's step."""

    def __init__(self, group: Mapping[str, Any], calls: Sequence[Any]) -> None:
        self.group_params = list(group["params"])
        with_grad = {id(p) for call in calls for p in call.params}
        self.idle = [p for p in self.group_params if id(p) not in with_grad]
        self.calls = calls

    def run(self, group: Mapping[str, Any], state: Mapping, scalars) -> bool:
        """Steps the group, with the options scalars(device) gives; False, and nothing done, where the plan does not fit."""
        if somebody_listens() or len(group["params"]) != len(self.group_params):
            return False
        if not all(map(is_, group["params"], self.group_params)) or not all(p.grad is None for p in self.idle):
            return False
        try:
            tables = [call.current(state) for call in self.calls]
        except (AttributeError, KeyError, RuntimeError, TypeError):
            return False  # a gradient is None or sparse, a state lacks a key: the long way says what is wrong with it
        if any(t is None for t in tables):
            return False
        for call, each in zip(self.calls, tables, strict=True):
            call.launch(each, scalars(call.params[0].device))
        return True


def run_plans(
    plans: dict[int, Plan],
    groups: Sequence[dict[str, Any]],
    state: Mapping,
    step_and_plan: Callable[[int, dict[str, Any]], Plan | None],
    scalars: Callable[[dict[str, Any], torch.device], Any],
) -> None:
    """Steps the groups by their plans of the last time, where those still fit, and the long way where not."""
    for number, group in enumerate(groups):
        if not group["params"]:
            continue
        plan = plans.pop(number, None)
        if plan is None or not plan.run(group, state, lambda device, group=group: scalars(group, device)):
            plan = step_and_plan(number, group)
        if plan is not None:
            plans[number] = plan


def somebody_listens() -> bool:
    """Whether ops must be seen by the dispatcher: a mode, a tracer or the profiler looks on."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
    )


def make_plan(group: Mapping[str, Any], calls: Sequence[tuple[Sequence[list], list[dict], tuple]]) -> Plan | None:
    """The plan of a step that has just been made; None where a tensor is not a plain, contiguous one."""
    if not all(are_plain(tensors) for lists, _, _ in calls for tensors in lists):
        return None
    return Plan(group, [_Call(*call) for call in calls])


def are_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all of them are contiguous, and no subclass's."""
    return set(map(type, tensors)) <= _TYPES and all(map(op._is_contiguous, tensors))
