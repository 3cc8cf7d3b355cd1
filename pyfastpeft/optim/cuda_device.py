"""What paging asks of a GPU: memory, streams, events, copies. Tests put another in its place."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from pyfastpeft._native import _C


def host_bytes(address: int, nbytes: int) -> torch.Tensor:
    """A tensor over memory that the host can reach."""
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)


class CudaDevice:
    """One GPU. Streams are torch's; the current one is that of the thread that calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    # ---- memory ------------------------------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 zeros; torch.OutOfMemoryError where there is no room."""
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)

    def has_managed(self) -> bool:
        """Whether it has unified memory that the host may touch while kernels run (concurrentManagedAccess)."""
        return hasattr(_C, "ManagedMemory") and _C.ManagedMemory.available(self.device.index)

    def allocate_managed(self, nbytes: int) -> Any:
        """Zeros in unified memory that prefers this device: address() and prefetch(offset, nbytes, stream's number)."""
        return _C.ManagedMemory(nbytes, self.device.index)

    def pin(self, address: int, nbytes: int) -> bool:
        """Makes host memory one that kernels can reach at the same address, and copies without the host's help."""
        portable_mapped = 3
        with torch.cuda.device(self.device):
            return int(torch.cuda.cudart().cudaHostRegister(address, nbytes, portable_mapped)) == 0

    def unpin(self, address: int) -> None:
        with torch.cuda.device(self.device):
            torch.cuda.cudart().cudaHostUnregister(address)

    # ---- order -------------------------------------------------------------------------------------------------------

    def new_stream(self) -> Any:
        return torch.cuda.Stream(self.device)

    def current_stream(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def record(self, stream: Any = None) -> Any:
        """An event behind all that a stream (None: the current one) was given: query() and synchronize()."""
        event = torch.cuda.Event()
        event.record(self.current_stream() if stream is None else stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        """What the stream is given from now on begins after the event."""
        stream.wait_event(event)

    def begin_copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor) -> None:
        """In the order of that stream; of the two the host's is pinned."""
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """In the order of the current stream; done on return."""
        target.copy_(source)

    def begin_prefetch(self, stream: Any, managed: Any, offset: int, nbytes: int) -> None:
        managed.prefetch(offset, nbytes, stream.cuda_stream)
