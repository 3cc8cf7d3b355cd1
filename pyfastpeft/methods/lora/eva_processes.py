"""EVA's statistics over the processes of torch.distributed: each goes through batches of its own, the first decomposes the
inputs of all, and all are given what it found. With one process everything here is what it is called on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")


class Processes:
    """`together`: those of torch.distributed's default group, if it is initialised; else this one alone."""

    def __init__(self, together: bool) -> None:
        together = together and torch.distributed.is_available() and torch.distributed.is_initialized()
        self.count = torch.distributed.get_world_size() if together else 1
        self.rank = torch.distributed.get_rank() if together else 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def _all(self, value: Any) -> list:
        values = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def agreed(self, action: Callable[[], Value]) -> Value:
        """action() of each process. An error in one is an error in all: nobody waits for who has stopped."""
        if self.count == 1:
            return action()
        result, failure = None, None
        try:
            result = action()
        except Exception as error:
            failure = error
        failures = self._all(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, message in enumerate(failures):
            if message is not None:
                raise RuntimeError(f"EVA: process {rank} failed with {message}")
        return result

    def from_first(self, action: Callable[[], Value]) -> Value:
        """What action() gives in the first process, in all of them."""
        value = self.agreed(lambda: action() if self.leads else None)
        if self.count == 1:
            return value
        held = [value]
        torch.distributed.broadcast_object_list(held, src=0)
        return held[0]

    def batches(self, dataloader: Iterable) -> Iterator[Any]:
        """One pass: this process's batches, then None until those of all have come to their end."""
        batches = iter(dataloader)
        while True:
            batch = self.agreed(lambda: next(batches, None))
            if not (batch is not None if self.count == 1 else any(self._all(batch is not None))):
                return
            yield batch

    def gathered(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """In the first process the rows of all, in the order of their numbers; nothing in the others."""
        if self.count == 1:
            return inputs
        held = [None] * self.count if self.leads else None
        torch.distributed.gather_object({path: x.cpu() for path, x in inputs.items()}, held, dst=0)
        rows: dict[str, list[torch.Tensor]] = {}
        for each in held or ():
            for path, x in each.items():
                rows.setdefault(path, []).append(x)
        return {path: torch.cat(several) for path, several in rows.items()}
