"""What every paged optimizer shares: its pages, one pass over them a step, state dicts, reports. No update rule."""

from __future__ import annotations

import contextlib
import functools
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pyfastpeft.optim.cuda_device import CudaDevice
from pyfastpeft.optim.device_pages import TRANSFERS, DevicePages
from pyfastpeft.optim.page_space import Field, PagedState, PageSpace
from pyfastpeft.optim.step_plan import Call, Pace, StepPlan
from pyfastpeft.paged_memory import (
    FEWEST_PAGES,
    SMALLEST_PAGE,
    PagedMemory,
    available_memory,
    mapped_tensor,
    parse_bytes,
    spill_folder,
    write_chrome_trace,
)

_MANY = 8  # pages in a call that are worth all threads


class PagedOptimizer:
    """Beside a torch.optim.Optimizer in the bases of a class: its state lives in pages.

    A SpillError from step() (the disk failed) leaves every page either stepped or not; calling it again with the same
    gradients steps the others.

    A subclass says what state a parameter has (`_fields`, `_first_values`), which of them share a call (`_call`) and how
    a page is stepped (`_launch`).
    """

    def _open_pages(
        self,
        resident_bytes: int | str | None,
        spill_dir: str | os.PathLike | None,
        host_bytes: int | str | None = None,
        transfer: str = "auto",
        unified_memory: bool = False,
    ) -> None:
        if transfer not in TRANSFERS:
            raise ValueError(f"{type(self).__name__}: transfer is {transfer!r}, expected one of {', '.join(TRANSFERS)}")
        self._on_device = {"transfer": transfer, "unified": unified_memory}
        self._host_bytes = None if host_bytes is None else parse_bytes(host_bytes)
        self._requested = None if resident_bytes is None else parse_bytes(resident_bytes)
        self._spill_dir = None if spill_dir is None else os.path.abspath(os.fspath(spill_dir))
        if self._spill_dir is not None:
            spill_folder(self._spill_dir)  # an unusable one is an error now, not hours later
        smallest = FEWEST_PAGES * SMALLEST_PAGE
        if self._requested is not None and self._requested < smallest:
            warnings.warn(
                f"{type(self).__name__}: resident_bytes={self._requested} is less than the minimum working set; "
                f"{smallest} bytes are used",
                RuntimeWarning,
                stacklevel=4,
            )
        self._no_pages()

    def _no_pages(self) -> None:
        self._spaces: dict[torch.device, PageSpace] = {}
        self._plans: dict[Any, Any] = {}
        self._done: set[tuple[PageSpace, int]] = set()  # pages of a step that failed on its way
        self._kept_options: list[dict[str, Any]] = []
        self._computed: list[tuple[int, int, int, int]] | None = None
        self._pace = Pace()
        # of steps inside backward: whether one is under way, the pages visited so far, and in which order the last one did
        self._in_bucket = False
        self._visited: dict[PageSpace, dict[int, None]] = {}
        self._cycles: dict[PageSpace, list[int]] = {}

    @property
    def pages(self) -> list[PagedMemory | DevicePages]:
        """The memory of the state, one for each device; none before there is any state."""
        return [space.memory for space in self._spaces.values()]

    def _pages_for(self, owners: Sequence[tuple[torch.Tensor, dict[str, Any]]], fields: Sequence[tuple[Field, ...]],
                   constants: Sequence[dict[str, Any]]) -> list[PagedState]:  # fmt: skip
        """New states of zeros; all of them, or an error and none."""
        devices = dict.fromkeys(p.device for p, _ in owners)
        for device in devices:
            if device not in self._spaces:
                self._spaces[device] = PageSpace(self._memory_for(device))
        rows = list(zip(owners, fields, constants, strict=True))
        found: dict[int, PagedState] = {}
        for device in devices:
            space = self._spaces[device]
            chosen = [(i, p, f, c) for i, ((p, _), f, c) in enumerate(rows) if p.device == device]
            places = space.place([(p.numel(), f) for _, p, f, _ in chosen])
            for (i, p, f, c), place in zip(chosen, places, strict=True):
                found[i] = PagedState(space, p, f, place, c)
        return [found[i] for i in range(len(rows))]

    def _memory_for(self, device: torch.device) -> PagedMemory | DevicePages:
        if device.type == "cuda":
            return DevicePages(
                CudaDevice(device), self._requested, self._host_bytes, self._spill_dir, **self._on_device
            )
        budget = self._requested
        if budget is None:
            budget = max(available_memory() // 2, FEWEST_PAGES * SMALLEST_PAGE)
        return PagedMemory(budget, self._spill_dir)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def _step_groups(self, groups: Sequence[dict[str, Any]], plans: dict) -> None:
        plan = plans.pop("plan", None)
        if plan is None or not plan.fits(groups, self.state):
            plan = self._make_plan(groups)
        self._run(plan)
        plans["plan"] = plan

    def _step_bucket(self, groups: Sequence[dict[str, Any]], plans: dict) -> None:
        self._in_bucket = True
        try:
            self._step_groups(groups, plans)
        finally:
            self._in_bucket = False

    def _end_of_buckets(self) -> None:
        """The pages' order in backward, for reading ahead in the next one."""
        for space, pages in self._visited.items():
            if list(pages) != self._cycles.get(space):
                self._cycles[space] = list(pages)
        self._visited = {}

    def _make_plan(self, groups: Sequence[dict[str, Any]]) -> StepPlan:
        self._new_states(groups)
        calls: dict[tuple, Call] = {}
        for number, group in enumerate(groups):
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not isinstance(state, PagedState):
                    raise TypeError(
                        f"{type(self).__name__}: the state of a parameter is a {type(state).__name__}, expected pages; "
                        "set states by load_state_dict"
                    )
                grad = p.grad
                if p.device != state.device:
                    raise ValueError(
                        f"{type(self).__name__}: a parameter is on {p.device} and its state on {state.device}; move the "
                        "model first, then make the optimizer and load the former one's state_dict into it"
                    )
                if p.shape != state.shape or not (
                    p.stride() == state.stride or (p.is_contiguous() and p.numel() == state.numel)
                ):
                    raise ValueError(
                        f"{type(self).__name__}: a parameter has shape {tuple(p.shape)} and strides {p.stride()}, its "
                        f"state was made for {tuple(state.shape)} and {state.stride}; delete optimizer.state[p] to "
                        "begin anew"
                    )
                if not (grad.is_contiguous() and p.is_contiguous()) and grad.stride() != p.stride():
                    grad = torch.empty_like(p, dtype=grad.dtype).copy_(grad)
                key = (number, p.device, *self._kind(p, state))
                call = calls.get(key)
                if call is None:
                    call = calls[key] = self._call(number, len(calls), state)
                call.params.append(p)
                call.states.append(state)
                call.grads.append(grad)
        return StepPlan(groups, list(calls.values()))

    def _new_states(self, groups: Sequence[dict[str, Any]]) -> None:
        """States for parameters that have their first gradient; an error changes nothing."""
        new = []
        for number, group in enumerate(groups):
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                self._check_gradient(p, f"parameter {i} of group {number}")
                if not self.state.get(p):
                    new.append((p, group))
        if not new:
            return
        if self._done:  # the pages that a step cut short has behind it would not be visited for them
            for space in self._spaces.values():
                space.close_page()
        described = [self._fields(p, group) for p, group in new]
        states = self._pages_for(new, [f for f, _ in described], [c for _, c in described])
        for (p, group), state in zip(new, states, strict=True):
            first = self._first_values(p, group)
            if first:
                state.write(first)
        for (p, _), state in zip(new, states, strict=True):
            self.state[p] = state

    def _check_gradient(self, p: torch.Tensor, name: str) -> None:
        title = type(self).__name__
        if p.grad.layout is not torch.strided:
            raise RuntimeError(
                f"{title}: the gradient of {name} is sparse ({p.grad.layout}), expected a dense one; use "
                "nn.Embedding(sparse=False), or torch.optim.SparseAdam for that parameter"
            )
        if p.grad.dtype not in (p.dtype, torch.float32):
            raise TypeError(
                f"{title}: the gradient of {name} is {p.grad.dtype}, expected float32 or the parameter's {p.dtype}"
            )
        if p.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{title}: {name} is on {p.device}, expected the CPU or a GPU; move it with .to()")
        if not torch.ops.aten.is_non_overlapping_and_dense(p):
            raise ValueError(
                f"{title}: {name} has shape {tuple(p.shape)} and strides {p.stride()}, which leave gaps or overlap; "
                "make it contiguous: nn.Parameter(p.contiguous())"
            )

    def _run(self, plan: StepPlan) -> None:
        # A step that failed goes on with its options, so that the bits are those of one that did not.
        options, self._kept_options = self._kept_options, []
        if not self._done or len(options) != len(plan.calls):
            options = [self._options(call) for call in plan.calls]
        if not plan.calls or any(o is None for o in options):
            return  # GradScaler found an infinity
        for call in plan.calls:
            call.locate()
            torch.autograd.graph.increment_version(call.params)
        done = self._done
        try:
            for space, order, visits in plan.passes:
                self._set_order(space, order)
                left = [visit for visit in visits if (space, visit[0]) not in done] if done else visits
                self._pass(space, left, options)
        except BaseException:
            self._kept_options = options
            raise
        done.clear()

    def _set_order(self, space: PageSpace, order: list[int]) -> None:
        if self._in_bucket:
            self._visited.setdefault(space, {}).update(dict.fromkeys(order))
            order = self._cycles.get(space)
        if order is not None:
            space.memory.set_order(order)

    def _pass(self, space: PageSpace, visits: list, options: list) -> None:
        """Steps the pages in order: as many at once as are in memory, the others one by one as they arrive."""
        memory, fits = space.memory, space.memory.everything_fits
        most = len(visits) if fits else memory.at_once
        begin, waited, at = time.monotonic_ns(), 0, 0
        while at < len(visits):
            before = time.monotonic_ns()
            held = [(visits[at][0], memory.acquire(visits[at][0]))]
            start = time.monotonic_ns()
            waited += start - before
            try:
                for page, _ in visits[at + 1 : at + most]:
                    base = memory.try_acquire(page)
                    if not base:
                        break
                    held.append((page, base))
                together: dict[int, tuple[Call, list, list]] = {}
                for (_, base), (_, parts) in zip(held, visits[at : at + len(held)], strict=True):
                    for call, table in parts:
                        _, tables, bases = together.setdefault(call.index, (call, [], []))
                        tables.append(table)
                        bases.append(base)
                threads = 0 if fits or len(held) >= _MANY else self._pace.threads
                for call, tables, bases in together.values():
                    self._launch(call, tables, bases, memory.page_bytes, threads, options[call.index])
                if self._computed is not None:
                    self._computed.append((held[0][0], len(held), start, time.monotonic_ns()))
            finally:
                for page, _ in held:
                    memory.release(page, True)
            self._done.update((space, page) for page, _ in held)
            at += len(held)
        if not fits:
            self._pace.note(time.monotonic_ns() - begin, waited)

    # ---- state dicts -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As the unpaged optimizer's, with copies of the state.

        Where the state exceeds its budget, the copies are mapped files without a name in spill_dir, which the system
        drops from memory when it needs it: a state larger than memory can be saved. Raises SpillError where the disk
        has no room for them.
        """
        paged = self.state
        spilling = [memory.spill_dir for memory in self.pages if memory.stats()["spill_file_bytes"] > 0]
        new = functools.partial(mapped_tensor, spilling[0]) if spilling else torch.empty
        self.state = defaultdict(dict)
        try:
            for p, state in paged.items():
                self.state[p] = state.read(new=new) if isinstance(state, PagedState) else state
            return super().state_dict()
        finally:
            self.state = paged

    def _adopt(self, saved: list[tuple[torch.Tensor, dict[str, Any], Any, dict[str, Any]]]) -> dict[Any, Any]:
        """Loads a state dict's states into pages, one at a time; the old ones stay until all are there."""
        state: dict[Any, Any] = defaultdict(dict)
        for p, group, key, value in saved:
            values = self._converted(p, group, key, value)
            if values:
                state[p] = self._paged(p, group, values)
        return state

    def _paged(self, p: torch.Tensor, group: dict[str, Any], values: dict[str, Any]) -> PagedState:
        fields, constants = self._fields(p, group)
        constants = {key: values[key] for key in constants}
        (state,) = self._pages_for([(p, group)], [fields], [constants])
        state.write({field.key: values[field.key] for field in fields})
        return state

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()
        plain = {p: s.read() if isinstance(s, PagedState) else s for p, s in self.state.items()}
        return {**kept, "state": plain, "paging": (self._requested, self._spill_dir, self._host_bytes, self._on_device)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "paging" in state:  # a copy, or from a pickle: pages of its own
            state = dict(state)
            self._requested, self._spill_dir, self._host_bytes, self._on_device = state.pop("paging")
            self._no_pages()
            groups = {p: group for group in state["param_groups"] for p in group["params"]}
            plain, state["state"] = state["state"], defaultdict(dict)
            super().__setstate__(state)
            for p, values in plain.items():
                self.state[p] = self._paged(p, groups[p], values) if values and p in groups else values
            return
        super().__setstate__(state)
        self._plans = {}
        self._done.clear()

    # ---- what one can look at ----------------------------------------------------------------------------------------

    def memory_report(self) -> dict[str, Any]:
        """Where the state is and what moving it has cost. resident + host + spilled = state.

        Of several devices, the sums; budgets are each device's.

        state_bytes       all of it (the two 1 KiB maps that 8-bit states share are not counted)
        resident_bytes    of it in memory now, a GPU's where the parameters are on one
        host_bytes        for parameters on a GPU: in the host's memory
        spilled_bytes     of it on the disk alone
        budget_bytes      what resident pages may take: whole pages, `requested_bytes` (resident_bytes=; None: half of the
                          free memory) rounded down to them, or up to `minimum_bytes`
        pages_in, pages_out, seconds_waited, …    since the beginning: pages read and written, time step() stood still
        transfer, unified    on a GPU: how its kernels reach the host's pages, and whether its own are unified memory
        """
        report: dict[str, Any] = {
            "state_bytes": 0, "resident_bytes": 0, "host_bytes": 0, "spilled_bytes": 0,
            "budget_bytes": self._requested, "requested_bytes": self._requested, "pages_in": 0, "pages_out": 0,
            "seconds_waited": 0.0,
        }  # fmt: skip
        if not self._spaces:
            return report
        counted = (
            "pages", "resident_pages", "pages_in", "pages_out", "waits", "seconds_waited", "seconds_reading",
            "seconds_writing", "spill_file_bytes",
        )  # fmt: skip
        summed = ("budget_bytes", "minimum_bytes", "peak_resident_bytes", "pinned_bytes", "bytes_in", "bytes_out")
        report |= dict.fromkeys((*counted, *summed), 0)
        for space in self._spaces.values():
            memory, stats, places = space.memory, space.memory.stats(), space.bytes_by_place()
            for place, nbytes in places.items():
                report[f"{place}_bytes"] += nbytes
                report["state_bytes"] += nbytes
            for key in counted:
                report[key] += stats[key]
            report["budget_bytes"] += memory.budget_bytes
            report["minimum_bytes"] += memory.minimum_bytes
            report["peak_resident_bytes"] += stats["peak_resident_pages"] * memory.page_bytes
            report["bytes_in"] += stats["pages_in"] * memory.page_bytes
            report["bytes_out"] += stats["pages_out"] * memory.page_bytes
            report["pinned_bytes"] += stats.get("pinned_bytes", 0)
            report |= {key: stats[key] for key in ("transfer", "unified") if key in stats}
            report |= {"page_bytes": memory.page_bytes, "spill_dir": memory.spill_dir, "direct_io": stats["direct_io"]}
        return report

    @contextlib.contextmanager
    def trace(self, path: str | os.PathLike) -> Iterator[None]:
        """Writes what moved and what was computed, when, inside the block: a file for chrome://tracing or Perfetto."""
        self._computed = []
        for memory in self.pages:
            memory.record_events(True)
        try:
            yield
        finally:
            computed, self._computed = self._computed, None
            events = []
            for memory in self.pages:
                memory.record_events(False)
                events += memory.events()
            write_chrome_trace(path, events, computed)
