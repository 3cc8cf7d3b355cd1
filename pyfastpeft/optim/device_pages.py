"""Pages for a GPU: as many as its budget allows in its own memory, the others in pinned memory of the host, or on disk.

An optimizer goes over its state once a step, in one order. On such a cycle the best that a cache can do is to keep a part
for good and let the rest pass (PageOrder says the same on the host); so the first pages live on the GPU, and nothing ever
replaces them. Every other byte of state crosses the link once in each direction, in one of host_link.py's ways. What has to
be ordered is the host: a page may be written to disk, or handed to another use, only when the kernels or copies that were
given it are done. An event behind them says so.

The GPU's own pages may be in unified memory: the driver then moves them to the host while a model needs their room, where
plain ones would let its allocation fail; a step brings them back ahead of their use.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from pyfastpeft.optim.cuda_device import CudaDevice, host_bytes
from pyfastpeft.optim.host_link import Copied, InPlace, OneAtATime
from pyfastpeft.paged_memory import PagedMemory, available_memory, page_size_for

TRANSFERS = ("auto", "copied", "in_place")
_GROUP_BYTES, _LARGEST_GROUP = 8 << 20, 8  # pages stepped by one launch, where they are copied
_FEWEST_FOR_COPIES = 8  # pages of budget from which on some of them may be slots


class _PlainPage:
    """In memory of the device's own."""

    def __init__(self, device: CudaDevice, nbytes: int) -> None:
        self.device, self.tensor = device, device.allocate(nbytes)
        self.address = self.tensor.data_ptr()

    def ahead(self) -> None:
        """It is there."""

    def read(self, offset: int, address: int, nbytes: int) -> None:
        self.device.copy(host_bytes(address, nbytes), self.tensor[offset : offset + nbytes])

    def write(self, offset: int, address: int, nbytes: int) -> None:
        self.device.copy(self.tensor[offset : offset + nbytes], host_bytes(address, nbytes))

    def clear(self) -> None:
        self.tensor.zero_()


class _ManagedPage:
    """In unified memory, a part of `block`."""

    def __init__(self, device: CudaDevice, stream: Any, block: Any, offset: int, nbytes: int) -> None:
        self.device, self.stream, self.block, self.offset, self.nbytes = device, stream, block, offset, nbytes
        self.address = block.address() + offset

    def ahead(self) -> None:
        """Brings it to the device on a stream beside the kernels', which wait for it: they would fault page by page."""
        self.device.begin_prefetch(self.stream, self.block, self.offset, self.nbytes)
        self.device.wait(self.device.current_stream(), self.device.record(self.stream))

    def _bytes(self, offset: int, nbytes: int) -> torch.Tensor:
        self.device.record().synchronize()  # the host may touch it, but not while kernels write it
        return host_bytes(self.address + offset, nbytes)

    def read(self, offset: int, address: int, nbytes: int) -> None:
        host_bytes(address, nbytes).copy_(self._bytes(offset, nbytes))

    def write(self, offset: int, address: int, nbytes: int) -> None:
        self._bytes(offset, nbytes).copy_(host_bytes(address, nbytes))

    def clear(self) -> None:
        self._bytes(0, self.nbytes).zero_()


class DevicePages:
    """Has the methods of PagedMemory that optimizers use; acquire's addresses are for kernels on the device.

    resident_bytes  memory on the device; None: half of what is free there. May be less than a page: then nothing is there
    host_bytes      pinned memory of the host for the others; None: half of what is free. The rest spills to spill_dir
    transfer        how kernels reach the host's pages: "copied" by streams beside theirs, "in_place" over the link, or
                    "auto": copied where the budget has room for the slots, which are a part of it
    unified         the device's pages are unified memory; a warning and plain memory where the device cannot. Never more
                    than is free when they are made
    """

    def __init__(
        self,
        device: CudaDevice,
        resident_bytes: int | None,
        host_bytes: int | None,
        spill_dir: str | os.PathLike | None,
        *,
        page_bytes: int | None = None,
        transfer: str = "auto",
        unified: bool = False,
    ) -> None:
        self.device = device
        budget = device.free_bytes() // 2 if resident_bytes is None else resident_bytes
        host = available_memory() // 2 if host_bytes is None else host_bytes
        size = page_bytes or min(page_size_for(host), page_size_for(4 * budget))
        self.host = PagedMemory(host, spill_dir, page_bytes=size)
        self.page_bytes, self.spill_dir = size, self.host.spill_dir
        pages = budget // size
        self._slots = 0  # of the budget's pages, those that others pass through
        if transfer == "copied" or (transfer == "auto" and pages >= _FEWEST_FOR_COPIES):
            group = max(min(_GROUP_BYTES // size, _LARGEST_GROUP), 1)
            self._slots = max(min(4 * group, pages // 2), 2)  # coming, stepped, going, and one to spare
        self.budget_bytes = max(pages, self._slots) * size
        self.minimum_bytes = self._slots * size  # on the device
        self.unified = unified and self._unified_or_say()
        self._ahead = device.new_stream() if self.unified else None
        self._own: list[_PlainPage | _ManagedPage] = []  # pages on the device
        self._where: list[int] = []  # by page: its number on the host, or -1 - its number on the device
        self._busy: deque[tuple[Any, int, bool]] = deque()  # (event behind the last that uses it, host page, dirty)
        self._pinned: list[tuple[int, int]] = []  # ranges of host memory
        self._order: Sequence[int] | None = None
        self._link: InPlace | Copied | OneAtATime | None = None  # made with the first host page
        self._process = os.getpid()

    def _unified_or_say(self) -> bool:
        if self.device.has_managed():
            return True
        warnings.warn(
            f"paged memory: {self.device.device} has no unified memory that host and device may touch at the same time "
            "(concurrentManagedAccess); plain memory is used",
            RuntimeWarning,
            stacklevel=4,
        )
        return False

    def __del__(self) -> None:
        if getattr(self, "_process", None) == os.getpid():
            self._settle(everything=True)
            for address, _ in self._pinned:
                self.device.unpin(address)

    # ---- what exists -------------------------------------------------------------------------------------------------

    def add_pages(self, count: int) -> range:
        """On the device while its budget lasts, then on the host. All or (SpillError, no memory) none of them."""
        most = self.budget_bytes // self.page_bytes - self._slots - len(self._own)
        own = self._new_own(min(count, most))
        first = len(self._where)
        host = self.host.add_pages(count - len(own))
        self._where += [-1 - len(self._own) - i for i in range(len(own))] + list(host)
        self._own += own
        if host:
            self._open_link()
        return range(first, len(self._where))

    def _new_own(self, count: int) -> list:
        """As many of `count` pages as the device has room for; where that is less, the budget shrinks, and it says so."""
        if count <= 0:
            return []
        own: list[Any] = []
        if self.unified:  # asked first: the driver would give more than there is, and move all of it at every step
            later = self._slots if self._link is None else 0
            room = min(self.device.free_bytes() // self.page_bytes - later, count)
            if room > 0:
                block = self.device.allocate_managed(room * self.page_bytes)
                pages = range(0, room * self.page_bytes, self.page_bytes)
                own = [_ManagedPage(self.device, self._ahead, block, at, self.page_bytes) for at in pages]
        else:
            try:
                while len(own) < count:
                    own.append(_PlainPage(self.device, self.page_bytes))
            except torch.OutOfMemoryError:
                pass  # said below
        if len(own) < count:
            if self._link is None and len(own) >= 2 * self._slots and not self.unified:
                del own[len(own) - self._slots :]  # the slots take their room
            elif self._link is None and not self.unified:
                self._slots = 0
            used = (len(self._own) + len(own) + self._slots) * self.page_bytes
            warnings.warn(
                f"paged memory: {self.device.device} has no room for its budget of {self.budget_bytes} bytes; {used} are "
                "used, the rest is in host memory",
                RuntimeWarning,
                stacklevel=3,
            )
            self.budget_bytes = used
        return own

    def _open_link(self) -> None:
        """Pins the host's frames that its pages will use, as they become more, and chooses how kernels reach them."""
        frames = min(self.host.stats()["pages"], self.host.budget_bytes // self.page_bytes)
        done = sum(nbytes for _, nbytes in self._pinned)
        address, nbytes = self.host.frames() + done, frames * self.page_bytes - done
        if isinstance(self._link, OneAtATime):
            return
        if nbytes > 0 and not self.device.pin(address, nbytes):
            self._settle(everything=True)
            self._link = OneAtATime(self.device, self.page_bytes)
            warnings.warn(
                f"paged memory: {nbytes} bytes of host memory could not be pinned; pages are copied one at a time, slowly. "
                "Free host memory, or choose a smaller host_bytes=",
                RuntimeWarning,
                stacklevel=3,
            )
            return
        if nbytes > 0:
            self._pinned.append((address, nbytes))
        if self._link is None and self._slots:
            try:
                self._link = Copied(self.device, self.page_bytes, self._slots)
            except torch.OutOfMemoryError:
                warnings.warn(
                    f"paged memory: {self.device.device} has no room for {self._slots} pages that others pass through; "
                    "kernels reach them in place",
                    RuntimeWarning,
                    stacklevel=3,
                )
        if self._link is None:
            self._link = InPlace(self.device)

    @property
    def at_once(self) -> int:
        """Pages that may be held together while the host's others go on moving."""
        if isinstance(self._link, OneAtATime):
            return 1
        return (
            min(self.host.at_once, max(self._link.staging // 4, 1))
            if isinstance(self._link, Copied)
            else self.host.at_once
        )

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
        return address or self._link.enter(self._where[page], self.host.acquire(self._where[page]))

    def try_acquire(self, page: int) -> int:
        """0 where it would wait."""
        self._settle()
        where = self._where[page]
        if where < 0:
            own = self._own[-1 - where]
            own.ahead()
            return own.address
        address = self.host.try_acquire(where)
        return self._link.enter(where, address) if address else 0

    def release(self, page: int, dirty: bool) -> None:
        """After the launches that use the page; it stays held until they are done."""
        where = self._where[page]
        if where < 0:
            return
        event = self._link.leave(where, dirty)
        if event is None:
            self.host.release(where, dirty)
        else:
            self._busy.append((event, where, dirty))

    # ---- use by the host ---------------------------------------------------------------------------------------------

    def read(self, page: int, offset: int, address: int, nbytes: int) -> None:
        where = self._where[page]
        if where < 0:
            self._own[-1 - where].read(offset, address, nbytes)
            return
        self._settle(everything=True)
        self.host.read(where, offset, address, nbytes)

    def write(self, page: int, offset: int, address: int, nbytes: int) -> None:
        where = self._where[page]
        if where < 0:
            self._own[-1 - where].write(offset, address, nbytes)
            return
        self._settle(everything=True)
        self.host.write(where, offset, address, nbytes)

    def discard(self, page: int) -> None:
        where = self._where[page]
        if where < 0:
            self._own[-1 - where].clear()
            return
        self._settle(everything=True)
        self.host.discard(where)

    def locations(self) -> list[str]:
        """Of each page: "resident", "host" or "spilled"."""
        there = self.host.resident()
        return ["resident" if w < 0 else "host" if there[w] else "spilled" for w in self._where]

    def stats(self) -> dict[str, Any]:
        stats, staging = self.host.stats(), 0 if self._link is None else self._link.staging
        return {
            **stats, "pages": len(self._where), "resident_pages": len(self._own),
            "peak_resident_pages": len(self._own) + staging, "pinned_bytes": sum(nbytes for _, nbytes in self._pinned),
            "transfer": None if self._link is None else self._link.name, "unified": self.unified,
        }  # fmt: skip

    def events(self) -> list:
        return self.host.events()

    def record_events(self, on: bool) -> None:
        self.host.record_events(on)
