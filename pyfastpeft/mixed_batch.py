"""A mixed batch: `model(..., adapter_names=[...])` and `model.generate(..., adapter_names=[...])`, each sample with an
adapter of its own.

Every adapted layer is told the batch's names for the length of the call. LoRA on linear layers adds all adapters' updates to
the base's one product by one kernel (ops.segmented_lora); layers of other kinds, and DoRA, answer for the samples of each
adapter apart, whatever the adapter's method.

In training mode each adapter in the batch that requires gradients (`model.base_model.set_requires_grad(names)`) gets those of
its own samples, so several train in one batch as each would alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pyfastpeft import ops

BASE = "__base__"  # PEFT's name for no adapter


class MixedBatch:
    """The names of a call's samples. `expansion`: how many neighbouring rows generate() makes of each (beams)."""

    def __init__(self, names: Sequence[str], expansion: int = 1) -> None:
        self.names = tuple(names)
        self.adapters = tuple(dict.fromkeys(name for name in names if name != BASE))
        self.expansion = expansion
        self._segments: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def repeats(self, x: torch.Tensor) -> int:
        """How often each name stands for neighbouring samples of x: an encoder sees the samples, a decoder their beams."""
        samples = x.shape[0]
        for repeats in (1, self.expansion):
            if samples == repeats * len(self.names):
                return repeats
        beams = f" or {self.expansion * len(self.names)} (with beams)" if self.expansion > 1 else ""
        raise ValueError(
            f"adapter_names has {len(self.names)} names and a layer got a batch of {samples}; expected "
            f"{len(self.names)}{beams}: one name for each sample, in a layer whose input begins with the batch"
        )

    def segments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(order, starts) of ops.segments for x's samples; made once for each device."""
        key = self.repeats(x), x.device
        if key not in self._segments:
            number = {name: i for i, name in enumerate(self.adapters)}
            adapters = [number.get(name, -1) for name in self.names for _ in range(key[0])]
            self._segments[key] = ops.segments(torch.tensor(adapters, device=x.device), len(self.adapters))
        return self._segments[key]

    def groups(self, x: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """(name, the numbers of its samples) for every name in the batch, the base's too."""
        repeats = self.repeats(x)
        names = [name for name in self.names for _ in range(repeats)]
        return [
            (name, torch.tensor([i for i, other in enumerate(names) if other == name], device=x.device))
            for name in dict.fromkeys(names)
        ]


def check_names(adapted: nn.Module, adapter_names: Any) -> None:
    """Raises TypeError / ValueError, with nothing changed, for what cannot be a mixed batch of this model."""
    if isinstance(adapter_names, str) or not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"adapter_names is {adapter_names!r}, expected a list with an adapter's name for each sample")
    strange = [name for name in adapter_names if not isinstance(name, str)]
    if strange:
        raise TypeError(f"adapter_names holds {strange[0]!r}, expected strings ('__base__' for no adapter)")
    if not adapter_names:
        raise ValueError("adapter_names is empty, expected a name for each sample of the batch")
    unknown = sorted(set(adapter_names) - set(adapted.peft_config) - {BASE})
    if unknown:
        raise ValueError(
            f"adapter_names: there are no adapters {unknown}, expected some of {sorted(adapted.peft_config)} or '{BASE}'"
        )
    virtual = [name for name in adapted.active_adapters if adapted.peft_config[name].is_prompt_learning]
    if virtual:
        raise ValueError(
            f"adapter_names: the active adapter {virtual[0]!r} puts virtual tokens before every sample; set_adapter() another"
        )
    for path, holder in adapted.holders():
        merged = getattr(holder, "merged_adapters", ())
        if merged:
            raise ValueError(
                f"adapter_names: adapters {sorted(merged)} are merged into the weights ({path}); unmerge_adapter()"
            )
        for name in dict.fromkeys(adapter_names):
            if name in holder.held_adapters():
                holder.check_mixed(name, path)


@contextlib.contextmanager
def mixed(adapted: nn.Module, adapter_names: Sequence[str] | None, expansion: int = 1) -> Iterator[None]:
    """Within it, the layers of an AdaptedModel answer each sample with its own adapter."""
    if adapter_names is None:
        yield
        return
    check_names(adapted, adapter_names)
    batch = MixedBatch(adapter_names, expansion)
    holders = [holder for _, holder in adapted.holders()]
    with _told(holders, batch), _checkpoints_told(adapted, set(holders), batch):
        yield


@contextlib.contextmanager
def _told(holders: Sequence[nn.Module], batch: MixedBatch) -> Iterator[None]:
    former = [holder.mixed for holder in holders]
    try:
        for holder in holders:
            holder.mixed = batch
        yield
    finally:
        for holder, batch_before in zip(holders, former, strict=True):
            holder.mixed = batch_before


@contextlib.contextmanager
def _checkpoints_told(adapted: nn.Module, holders: set[nn.Module], batch: MixedBatch) -> Iterator[None]:
    """Gradient checkpointing as transformers' models do it runs a block again in the backward, when the call is long over:
    what is handed to it here tells the block's layers the batch once more."""
    blocks = [m for m in adapted.modules() if getattr(m, "gradient_checkpointing", False) is True and m.training]
    former = {block: block.__dict__.get("_gradient_checkpointing_func") for block in blocks}
    former = {block: function for block, function in former.items() if function is not None}

    def telling(checkpoint: Callable, mine: list[nn.Module]) -> Callable:
        def checkpointed(function: Callable, *args: Any, **kwargs: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                with _told(mine, batch):
                    return function(*args, **kwargs)

            return checkpoint(run, *args, **kwargs)

        return checkpointed

    try:
        for block, function in former.items():
            block._gradient_checkpointing_func = telling(function, [m for m in block.modules() if m in holders])
        yield
    finally:
        for block, function in former.items():
            block._gradient_checkpointing_func = function


def expansion(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> int:
    """How many rows generate(*args, **kwargs) makes of each sample: its beams, or its sequences."""
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    settings = given or getattr(model, "generation_config", None)
    counts = [1]
    for name in ("num_beams", "num_return_sequences"):
        value = kwargs.get(name, getattr(settings, name, None))
        counts.append(value if isinstance(value, int) else 1)
    return max(counts)


def by_adapter(holder: nn.Module, batch: MixedBatch, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """The holder's own answer for each adapter's samples, put together: one pass of the base for each name."""
    y, active = None, holder.active
    holder.mixed = None
    try:
        for name, samples in batch.groups(x):
            holder.active = (name,) if name in holder.held_adapters() else ()
            part = holder(x.index_select(0, samples), *args, **kwargs)
            if not isinstance(part, torch.Tensor) or part.shape[0] != len(samples):
                raise ValueError(
                    f"adapter_names: a {type(holder).__name__} of {type(holder.bare_module()).__name__} does not give a row "
                    "for each sample; use these adapters one at a time (set_adapter)"
                )
            y = part.new_empty(x.shape[0], *part.shape[1:]) if y is None else y
            y = y.index_copy(0, samples, part)
    finally:
        holder.mixed, holder.active = batch, active
    return y
