"""Three ways in which a kernel on a GPU reaches a page of the host's memory; csrc/paged_memory/README.md counts their costs.

enter(where, address) returns the address for kernels that the current stream is given from then on; leave(where, dirty)
comes after those launches and returns the event behind which the host may use the page's memory, or None: it may at once.
"""

from __future__ import annotations

from typing import Any

import torch

from pyfastpeft.optim.cuda_device import CudaDevice, host_bytes


class InPlace:
    """The kernel reads and writes pinned memory over the link: no staging, no copies."""

    name, staging = "in place", 0

    def __init__(self, device: CudaDevice) -> None:
        self.device = device

    def enter(self, where: int, address: int) -> int:
        return address

    def leave(self, where: int, dirty: bool) -> Any:
        return self.device.record()


class _Slot:
    """Room for a page on the device, and the event behind its last use."""

    def __init__(self, tensor: torch.Tensor, free: Any) -> None:
        self.tensor, self.free = tensor, free


class Copied:
    """Pages are copied to slots on the device and back by two streams beside the kernels'.

    While a kernel steps one slot, the next page is on its way into another and the one before on its way back: both
    directions of the link are busy at once, and the host waits for nothing. What orders them are events:

        in:      [slot free] [page last written back] copy to slot · event
        kernels:                                        [event] step · event
        out:                                                          [event] copy to the host · event = slot free
    """

    name = "copied"

    def __init__(self, device: CudaDevice, page_bytes: int, slots: int) -> None:
        """As many of `slots` as there is room for; torch.OutOfMemoryError where that is less than two."""
        self.device, self.page_bytes = device, page_bytes
        self._in, self._out = device.new_stream(), device.new_stream()
        tensors: list[torch.Tensor] = []
        while len(tensors) < slots:
            try:
                tensors.append(device.allocate(page_bytes))
            except torch.OutOfMemoryError:
                if len(tensors) < 2:
                    raise
                break
        self.staging = len(tensors)
        ready = device.record()  # the slots' memory may still be in use by what the current stream was given
        self._slots = [_Slot(tensor, ready) for tensor in tensors]
        self._open: dict[int, tuple[_Slot, torch.Tensor]] = {}  # by page
        self._written: dict[int, Any] = {}  # by page: the event behind its last copy back

    def enter(self, where: int, address: int) -> int:
        if not self._slots:
            raise RuntimeError(f"paged memory: {self.staging} pages are on their way; release one before the next")
        slot, device = self._slots.pop(0), self.device
        host = host_bytes(address, self.page_bytes)
        device.wait(self._in, slot.free)
        if where in self._written:
            device.wait(self._in, self._written[where])
        device.begin_copy(self._in, slot.tensor, host)
        device.wait(device.current_stream(), device.record(self._in))
        self._open[where] = slot, host
        return slot.tensor.data_ptr()

    def leave(self, where: int, dirty: bool) -> Any:
        slot, host = self._open.pop(where)
        event = self.device.record()
        if dirty:
            self.device.wait(self._out, event)
            self.device.begin_copy(self._out, host, slot.tensor)
            event = self._written[where] = self.device.record(self._out)
        slot.free = event
        self._slots.append(slot)
        return event


class OneAtATime:
    """Where host memory could not be pinned: each page is copied to the device and back while the host waits."""

    name, staging = "one at a time", 1

    def __init__(self, device: CudaDevice, page_bytes: int) -> None:
        self.device, self.page_bytes = device, page_bytes
        self._slot = device.allocate(page_bytes)
        self._open: dict[int, torch.Tensor] = {}

    def enter(self, where: int, address: int) -> int:
        self._open[where] = host = host_bytes(address, self.page_bytes)
        self.device.copy(self._slot, host)
        return self._slot.data_ptr()

    def leave(self, where: int, dirty: bool) -> None:
        host = self._open.pop(where)
        if dirty:
            self.device.copy(host, self._slot)
