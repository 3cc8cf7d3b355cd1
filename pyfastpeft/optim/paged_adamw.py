"""AdamW with its state in pages: RAM for a budget, a spill file for the rest."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pyfastpeft._native import _C
from pyfastpeft.ops import _cuda
from pyfastpeft.ops._library import DTYPE_CODES
from pyfastpeft.ops.adamw import on_device, standard_maps
from pyfastpeft.optim.adamw import AdamW
from pyfastpeft.optim.page_space import SCALE, STEP, Field, PagedState, Piece
from pyfastpeft.optim.paged import PagedOptimizer
from pyfastpeft.optim.step_plan import Call, StepPlan

_FP32 = (STEP, Field("exp_avg", torch.float32), Field("exp_avg_sq", torch.float32))
_8BIT = (
    STEP,
    Field("state1", torch.uint8),
    Field("absmax1", torch.float32, SCALE),
    Field("state2", torch.uint8),
    Field("absmax2", torch.float32, SCALE),
)
_MASTER = Field("master", torch.float32)
_ROW = 11  # words of a piece
_BITS8, _HAS_MASTER = 16, 32  # csrc/adamw/adamw_bind.cpp: kinds


class _Call(Call):
    def close(self) -> None:
        super().close()
        kind = (_BITS8 if "state1" in self.first_state else 0) | (_HAS_MASTER if "master" in self.first_state else 0)
        self.kinds = [
            DTYPE_CODES[p] | DTYPE_CODES[g] << 2 | kind
            for p, g in zip(self.param_dtypes, self.grad_dtypes, strict=True)
        ]

    def row(self, tensor: int, state: PagedState, piece: Piece) -> tuple[int, ...]:
        """adamw_bind.cpp: struct Piece."""
        at = state.offset
        return (
            tensor, self.kinds[tensor], piece.first, piece.n, tensor, at(piece, "step"), at(piece, "exp_avg", "state1"),
            at(piece, "exp_avg_sq", "state2"), at(piece, "absmax1"), at(piece, "absmax2"), at(piece, "master"),
        )  # fmt: skip


class PagedAdamW(PagedOptimizer, AdamW):
    """AdamW whose state may be larger than memory; the bits are pyfastpeft.optim.AdamW's, whatever the budget.

    params, lr, … state_bits, and the other options   as AdamW's
    resident_bytes  memory for the state: a number of bytes, or a text such as "2GB"; None: half of what is free when the
                    first state is made. Less than the minimum working set (two pages of 64 KiB) is rounded up to it,
                    with a warning; memory_report() has what is used
    spill_dir       folder of the spill file; None: $TMPDIR or /var/tmp. The file has no name and mode 0600: nothing of
                    it is left behind, however the process ends. Its space is taken when states are made, so that a full
                    disk is a SpillError (an OSError) there, with nothing changed, and not in the middle of training

    host_bytes      for parameters on a GPU, where resident_bytes is the GPU's memory: pinned memory of the host for what
                    does not fit there, before anything goes to the disk; None: half of what is free
    transfer        how the GPU's kernels reach pages in the host's memory: "copied" (to the GPU and back, by two streams
                    beside the kernels', in slots that are a part of resident_bytes), "in_place" (over the link), or "auto":
                    copied where resident_bytes has room for the slots. memory_report() has which
    unified_memory  the GPU's pages are CUDA unified memory: the driver moves them to the host while a model needs their
                    room. A warning, and plain memory, where the GPU has no concurrentManagedAccess. Never more than is
                    free when the states are made

    A step is one pass over the pages in a fixed order: pages are read ahead and changed ones written back by threads of
    their own while others are computed; those that fit stay in memory for good. Tensors of any size are paged, small ones
    side by side. `state[p]` is a mapping that reads and writes the pages: `state[p]["exp_avg"]` is a copy.

    On a GPU stochastic_rounding is refused, since its random numbers count from the beginning of a tensor.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_bits: int = 32,
        *,
        resident_bytes: int | str | None = None,
        spill_dir: str | os.PathLike | None = None,
        host_bytes: int | str | None = None,
        transfer: str = "auto",
        unified_memory: bool = False,
        **options: Any,
    ) -> None:
        self._open_pages(resident_bytes, spill_dir, host_bytes, transfer, unified_memory)
        self._device_tables: dict[tuple[int, int], tuple] = {}
        super().__init__(params, lr, betas, eps, weight_decay, state_bits, **options)

    def _make_plan(self, groups: Sequence[dict[str, Any]]) -> StepPlan:
        self._device_tables = {}  # they are of the former plan's pages
        return super()._make_plan(groups)

    def _fields(self, p: torch.Tensor, group: dict[str, Any]) -> tuple[tuple[Field, ...], dict[str, Any]]:
        bits8 = self._is_8bit(p, group)
        fields = (_8BIT if bits8 else _FP32) + ((_MASTER,) if self._has_master(p, group) else ())
        return fields, dict(zip(("qmap1", "qmap2"), standard_maps(p.device), strict=True)) if bits8 else {}

    def _first_values(self, p: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"master": p.detach()} if self._has_master(p, group) else {}

    def _kind(self, p: torch.Tensor, state: PagedState) -> tuple:
        return id(state.constants.get("qmap1")), id(state.constants.get("qmap2")), "master" in state

    def _call(self, number: int, index: int, state: PagedState) -> _Call:
        return _Call(number, index, state)

    def _options(self, call: Call) -> tuple | None:
        """The binding's last arguments; None where GradScaler found an infinity."""
        group = self.param_groups[call.group_number]
        device = call.params[0].device
        scalars = self._scalars(group, device)
        if device.type == "cuda":
            return self._options_on_cuda(call, scalars)
        if scalars["found_inf"] is not None and scalars["found_inf"].item() != 0:
            return None
        lr, scale, seed = scalars["lr"], scalars["grad_scale"], scalars["rounding_seed"]
        maps = [call.first_state.constants.get(key) for key in ("qmap1", "qmap2")]
        return (
            _numbers(scalars, lr.item() if isinstance(lr, torch.Tensor) else lr), *maps, seed,
            1.0 if scale is None else scale.item(),
        )  # fmt: skip

    def _launch(
        self, call: Call, tables: list[array], pages: list[int], page_bytes: int, threads: int, options: tuple
    ) -> None:
        if isinstance(options, dict):
            self._launch_on_cuda(call, tables, pages, page_bytes, options)
            return
        numbers, map1, map2, seed, scale = options
        addresses = (0 if t is None else t.data_ptr() for t in (map1, map2, seed))
        _C.adamw_pages_cpu(
            tables, pages, page_bytes, threads, call.param_addresses, call.grad_addresses, call.numels, numbers,
            *addresses, scale,
        )  # fmt: skip

    def _options_on_cuda(self, call: Call, scalars: dict[str, Any]) -> dict[str, Any]:
        if scalars["rounding_seed"] is not None:
            raise ValueError(
                "PagedAdamW: stochastic_rounding is True for parameters on a GPU, where parts of tensors are stepped; use "
                "master_weights=True, or pyfastpeft.optim.AdamW"
            )
        maps = {f"map{i}": call.first_state.constants.get(f"qmap{i}") for i in (1, 2)}
        return {**scalars, **maps}

    def _launch_on_cuda(
        self, call: Call, tables: list[array], pages: list[int], page_bytes: int, options: dict[str, Any]
    ) -> None:
        param = call.params[0]
        target = _cuda.target(param, "adamw_")
        words = target.module.adamw_table_words(sum(len(table) for table in tables) // _ROW)
        key = (call.index, id(tables[0]), words)
        table, content = self._device_tables.get(key) or (
            torch.empty(words, dtype=torch.int64, device=param.device),
            target.module.AdamwTable(),
        )
        self._device_tables[key] = table, content
        lr = options["lr"]
        lr, lr_tensor = (0.0, lr) if isinstance(lr, torch.Tensor) else (lr, None)
        if lr_tensor is not None and lr_tensor.device != param.device:
            lr, lr_tensor = lr_tensor.item(), None
        there = on_device(
            target, options["map1"], options["map2"], None, lr_tensor, options["grad_scale"], options["found_inf"]
        )
        target.module.adamw_pages_cuda(
            tables, pages, page_bytes, call.param_addresses, call.grad_addresses, call.numels, _numbers(options, lr),
            there, content, table.data_ptr(), words, _cuda.multiprocessors(param), target.device, target.stream,
        )  # fmt: skip


def _numbers(scalars: dict[str, Any], lr: float) -> tuple:
    return (lr, *(scalars[key] for key in ("beta1", "beta2", "eps", "weight_decay", "decoupled", "maximize")))
