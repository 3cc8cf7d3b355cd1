"""What a paged step does, kept from one step to the next: which pieces of which tensors are stepped on which page."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch

from pyfastpeft.ops import adamw as op
from pyfastpeft.optim.page_space import PagedState, PageSpace


class Call:
    """Parameters that are stepped alike: of one group, on one device, with states of one kind."""

    def __init__(self, number: int, index: int, state: PagedState) -> None:
        self.group_number, self.first_state = number, state
        self.index = index  # of the call in its step
        self.params: list[torch.Tensor] = []
        self.states: list[PagedState] = []
        self.grads: list[torch.Tensor] = []

    def close(self) -> None:
        self.numels = array("q", map(op._numel, self.params))
        self.param_dtypes = list(map(op._dtype, self.params))
        self.grad_dtypes = list(map(op._dtype, self.grads))
        self.device = self.params[0].device
        self.contiguous = all(map(op._is_contiguous, self.params)) and all(map(op._is_contiguous, self.grads))

    def renew(self, state: Any) -> bool:
        """Takes the gradients of now; False where anything is not as it was when the call was planned."""
        params = self.params
        grads = [p.grad for p in params]
        if not self.contiguous or not all(map(is_, map(state.get, params), self.states)):
            return False
        try:
            alike = (
                list(map(op._dtype, grads)) == self.grad_dtypes
                and list(map(op._dtype, params)) == self.param_dtypes
                and array("q", map(op._numel, grads)) == self.numels
                and array("q", map(op._numel, params)) == self.numels
                and all(map(op._is_contiguous, grads))
                and all(map(op._is_contiguous, params))
                and {*map(op._device, params), *map(op._device, grads)} == {self.device}
            )
        except (RuntimeError, TypeError):  # a gradient is None, or sparse
            return False
        if alike:
            self.grads = grads
        return alike

    def locate(self) -> None:
        """Where everything lies now."""
        self.param_addresses, self.grad_addresses = op._addresses(self.params), op._addresses(self.grads)


class StepPlan:
    """The calls of a step, by page; used again as long as the parameters, gradients and states are alike."""

    def __init__(self, groups: Sequence[dict[str, Any]], calls: list[Call]) -> None:
        self.group_params = [list(group["params"]) for group in groups]
        with_grad = {id(p) for call in calls for p in call.params}
        self.idle = [p for params in self.group_params for p in params if id(p) not in with_grad]
        self.calls = calls
        rows: dict[PageSpace, dict[int, dict[int, array]]] = defaultdict(lambda: defaultdict(dict))
        for call in calls:
            call.close()
            for tensor, state in enumerate(call.states):
                for piece in state.pieces:
                    table = rows[state.space][piece.page].setdefault(call.index, array("q"))
                    table.extend(call.row(tensor, state, piece))
        # of each space, the pages in the order of their visits, with the calls' pieces there
        self.passes = [
            (space, sorted(of), [(page, [(calls[i], table) for i, table in of[page].items()]) for page in sorted(of)])
            for space, of in rows.items()
        ]

    def fits(self, groups: Sequence[dict[str, Any]], state: Any) -> bool:
        if len(groups) != len(self.group_params):
            return False
        for group, params in zip(groups, self.group_params, strict=True):
            if len(group["params"]) != len(params) or not all(map(is_, group["params"], params)):
                return False
        return all(p.grad is None for p in self.idle) and all(call.renew(state) for call in self.calls)


class Pace:
    """How many threads step a page that has just arrived: one, or (0) all of torch's.

    While the disk is what a step waits for, more than one would only meet at barriers and take the cores from the
    threads that move pages. Where one is what it waits for, all are tried, and kept while steps are quicker with them.
    """

    RETRY = 64  # steps until what was slower is tried again

    def __init__(self) -> None:
        self.threads, self.steps, self.taken = 1, 0, {}

    def note(self, nanoseconds: int, waited: int) -> None:
        self.steps += 1
        self.taken[self.threads] = nanoseconds
        if self.threads == 1:
            computing = waited < nanoseconds // 4
            untried = 0 not in self.taken or self.steps % self.RETRY == 0
            self.threads = 0 if computing and (untried or self.taken[0] < nanoseconds) else 1
        elif self.taken[1] < nanoseconds:
            self.threads = 1
