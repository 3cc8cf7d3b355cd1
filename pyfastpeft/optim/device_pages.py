"""Pages for a GPU: as many as its budget allows in its own memory, the others in pinned memory of the host, or on disk.

An optimizer goes over its state once a step, in one order. On such a cycle the best that a cache can do is to keep a part
for good and let the rest pass (PageOrder says the same on the host); so the first pages live on the GPU, and nothing ever
replaces them. Every other byte of state crosses the link once in each direction, and a kernel that reads and writes
pinned memory in place does just that: loads of a page overlap the stores of the one before, in both directions at once,
without a copy, a staging buffer or a stream of its own. What has to be ordered is the host: a page may be written to disk,
or handed to another use, only when the kernels that were given it are done. An event behind each launch says so.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from pyfastpeft.paged_memory import PagedMemory, available_memory, page_size_for


class CudaDevice:
    """What is asked of a GPU; tests put another in its place."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 zeros; torch.OutOfMemoryError where there is no room."""
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)

    def pin(self, address: int, nbytes: int) -> bool:
        """Makes host memory one that kernels can reach at the same address."""
        portable_mapped = 3
        with torch.cuda.device(self.device):
            return int(torch.cuda.cudart().cudaHostRegister(address, nbytes, portable_mapped)) == 0

    def unpin(self, address: int) -> None:
        with torch.cuda.device(self.device):
            torch.cuda.cudart().cudaHostUnregister(address)

    def record(self) -> Any:
        """An event behind all that the current stream was given: query() and synchronize()."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """In the order of the current stream; done on return."""
        target.copy_(source)


def _host_bytes(address: int, nbytes: int) -> torch.Tensor:
    """A tensor over memory of the host."""
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)


class DevicePages:
    """Has the methods of PagedMemory that optimizers use; acquire's addresses are for kernels on the device.

    resident_bytes  memory on the device; None: half of what is free there. May be less than a page: then nothing is there
    host_bytes      pinned memory of the host for the others; None: half of what is free. The rest spills to spill_dir
    """

    def __init__(
        self,
        device: CudaDevice,
        resident_bytes: int | None,
        host_bytes: int | None,
        spill_dir: str | os.PathLike | None,
        *,
        page_bytes: int | None = None,
    ) -> None:
        self.device = device
        budget = device.free_bytes() // 2 if resident_bytes is None else resident_bytes
        host = available_memory() // 2 if host_bytes is None else host_bytes
        size = page_bytes or min(page_size_for(host), page_size_for(4 * budget))
        self.host = PagedMemory(host, spill_dir, page_bytes=size)
        self.page_bytes, self.spill_dir = size, self.host.spill_dir
        self.budget_bytes = budget // size * size
        self.minimum_bytes = 0  # on the device
        self._own: list[torch.Tensor] = []  # pages on the device
        self._where: list[int] = []  # by page: its number on the host, or -1 - its number on the device
        self._busy: deque[tuple[Any, int, bool]] = deque()  # (event behind the kernels that hold it, host page, dirty)
        self._pinned: list[tuple[int, int]] = []  # ranges of host memory
        self._order: Sequence[int] | None = None
        self._staging: torch.Tensor | None = None  # where pinning failed: pages pass through here, one at a time
        self._process = os.getpid()

    def __del__(self) -> None:
        if getattr(self, "_process", None) == os.getpid():
            self._settle(everything=True)
            for address, _ in self._pinned:
                self.device.unpin(address)

    # ---- what exists -------------------------------------------------------------------------------------------------

    def add_pages(self, count: int) -> range:
        """On the device while its budget lasts, then on the host. All or (SpillError, no memory) none of them."""
        own = []
        for _ in range(min(count, self.budget_bytes // self.page_bytes - len(self._own))):
            try:
                own.append(self.device.allocate(self.page_bytes))
            except torch.OutOfMemoryError:
                warnings.warn(
                    f"paged memory: {self.device.device} has no room for its budget of {self.budget_bytes} bytes; "
                    f"{(len(self._own) + len(own)) * self.page_bytes} are used, the rest is in host memory",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self.budget_bytes = (len(self._own) + len(own)) * self.page_bytes
                break
        first = len(self._where)
        host = self.host.add_pages(count - len(own))
        self._where += [-1 - len(self._own) - i for i in range(len(own))] + list(host)
        self._own += own
        self._pin()
        return range(first, len(self._where))

    def _pin(self) -> None:
        """Pins the host's frames that its pages will use, as they become more."""
        frames = min(self.host.stats()["pages"], self.host.budget_bytes // self.page_bytes)
        done = sum(nbytes for _, nbytes in self._pinned)
        address, nbytes = self.host.frames() + done, frames * self.page_bytes - done
        if nbytes <= 0 or self._staging is not None:
            return
        if self.device.pin(address, nbytes):
            self._pinned.append((address, nbytes))
            return
        self._settle(everything=True)
        self._staging = self.device.allocate(self.page_bytes)
        warnings.warn(
            f"paged memory: {nbytes} bytes of host memory could not be pinned; pages are copied one at a time, slowly. "
            "Free host memory, or choose a smaller host_bytes=",
            RuntimeWarning,
            stacklevel=3,
        )

    @property
    def at_once(self) -> int:
        """Pages that may be held together while the host's others go on moving."""
        return 1 if self._staging is not None else self.host.at_once

    @property
    def everything_fits(self) -> bool:
        return len(self._own) == len(self._where)

    def set_order(self, pages: Sequence[int]) -> None:
        if self._order is not pages:
            self._settle(everything=True)
            self.host.set_order([self._where[page] for page in pages if self._where[page] >= 0])
            self._order = pages

    # ---- use by kernels ----------------------------------------------------------------------------------------------

    def _settle(self, everything: bool = False) -> None:
        """Lets go of host pages whose kernels are done; everything: waits for them."""
        while self._busy:
            event, page, dirty = held = self._busy.popleft()  # first: what runs while it waits may come here too
            if everything:
                event.synchronize()
            elif not event.query():
                self._busy.appendleft(held)
                return
            self.host.release(page, dirty)

    def acquire(self, page: int) -> int:
        address = self.try_acquire(page)
        while not address and self._busy:  # its frame may be one that a kernel still holds: the oldest goes first
            self._busy[0][0].synchronize()
            address = self.try_acquire(page)
        return address or self._through_staging(self._where[page], self.host.acquire(self._where[page]))

    def try_acquire(self, page: int) -> int:
        """0 where it would wait."""
        self._settle()
        where = self._where[page]
        if where < 0:
            return self._own[-1 - where].data_ptr()
        address = self.host.try_acquire(where)
        return self._through_staging(where, address) if address else 0

    def _through_staging(self, where: int, address: int) -> int:
        if self._staging is None:
            return address
        self.device.copy(self._staging, _host_bytes(address, self.page_bytes))
        return self._staging.data_ptr()

    def release(self, page: int, dirty: bool) -> None:
        """After the launches that use the page; it stays held until they are done."""
        where = self._where[page]
        if where < 0:
            return
        if self._staging is not None:
            address = self.host.acquire(where)  # held already: the same address
            self.device.copy(_host_bytes(address, self.page_bytes), self._staging)
            self.host.release(where, dirty)
            self.host.release(where, dirty)
        else:
            self._busy.append((self.device.record(), where, dirty))

    # ---- use by the host ---------------------------------------------------------------------------------------------

    def read(self, page: int, offset: int, address: int, nbytes: int) -> None:
        where = self._where[page]
        if where < 0:
            self.device.copy(_host_bytes(address, nbytes), self._own[-1 - where][offset : offset + nbytes])
            return
        self._settle(everything=True)
        self.host.read(where, offset, address, nbytes)

    def write(self, page: int, offset: int, address: int, nbytes: int) -> None:
        where = self._where[page]
        if where < 0:
            self.device.copy(self._own[-1 - where][offset : offset + nbytes], _host_bytes(address, nbytes))
            return
        self._settle(everything=True)
        self.host.write(where, offset, address, nbytes)

    def discard(self, page: int) -> None:
        where = self._where[page]
        if where < 0:
            self._own[-1 - where].zero_()
            return
        self._settle(everything=True)
        self.host.discard(where)

    def locations(self) -> list[str]:
        """Of each page: "resident", "host" or "spilled"."""
        there = self.host.resident()
        return ["resident" if w < 0 else "host" if there[w] else "spilled" for w in self._where]

    def stats(self) -> dict[str, Any]:
        stats = self.host.stats()
        return {
            **stats, "pages": len(self._where), "resident_pages": len(self._own), "peak_resident_pages": len(self._own),
            "pinned_bytes": sum(nbytes for _, nbytes in self._pinned),
        }  # fmt: skip

    def events(self) -> list:
        return self.host.events()

    def record_events(self, on: bool) -> None:
        self.host.record_events(on)
