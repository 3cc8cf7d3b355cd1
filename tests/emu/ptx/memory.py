"""The memory a kernel sees: buffers of this process at their own addresses, and the blocks' shared memory."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
from emu.ptx.text import REDZONE, Code, Instruction, Module, PtxError

# where shared memory and that of each thread lie among generic addresses
SHARED_WINDOW, LOCAL_WINDOW, WINDOW_BYTES = 1 << 60, 1 << 61, 1 << 32
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Buffer(NamedTuple):
    begin: int
    end: int
    read_only: bool
    name: str


class Ranges:
    """Sorted intervals [begin, end) and the question which of them holds an access."""

    def __init__(self, intervals: list[tuple[int, int]]):
        self.begins = np.array([begin for begin, _ in intervals], np.int64)
        self.ends = np.array([end for _, end in intervals], np.int64)

    def find(self, addresses: np.ndarray, size: int) -> int | np.ndarray:
        """The interval of each access, -1 where none holds it; a single number where it is one for all."""
        low, high = int(addresses.min()), int(addresses.max())
        i = int(np.searchsorted(self.begins, low, "right")) - 1
        if i >= 0 and high + size <= self.ends[i]:
            return i
        all_of = np.searchsorted(self.begins, addresses, "right") - 1
        return np.where((all_of >= 0) & (addresses + size <= self.ends[np.maximum(all_of, 0)]), all_of, -1)


class Global:
    def __init__(self, buffers: list[Buffer], module: Module):
        self.symbols: dict[str, int] = {}
        self._keep = []
        buffers = [b for b in buffers if b.end > b.begin]
        for variable in module.variables:
            table = np.zeros(len(variable.contents) + 256, np.uint8)
            begin = -(-table.ctypes.data // 256) * 256
            offset = begin - table.ctypes.data
            table[offset : offset + len(variable.contents)] = np.frombuffer(variable.contents, np.uint8)
            self._keep.append(table)
            self.symbols[variable.name] = begin
            buffers.append(Buffer(begin, begin + len(variable.contents), variable.constant, variable.name))
        self.buffers = sorted(buffers)
        self.ranges = Ranges([(b.begin, b.end) for b in self.buffers])
        self._views: dict[tuple[int, int, int], tuple[np.ndarray, int]] = {}

    def rows(self, i: int, item: int, count: int) -> tuple[np.ndarray, int]:
        """Buffer i as rows of `count` values of `item` bytes, and the address of the first: the first aligned one."""
        if (i, item, count) not in self._views:
            b = self.buffers[i]
            row = item * count
            begin = -(-b.begin // row) * row
            size = max(0, b.end - begin) // row * row
            flat = np.ctypeslib.as_array((ctypes.c_uint8 * max(1, size)).from_address(begin))[:size]
            self._views[i, item, count] = (flat.view(UNSIGNED[item]).reshape(-1, count), begin)
        return self._views[i, item, count]

    def where(self, address: int) -> str:
        if not self.buffers:
            return "the kernel was given no buffer"
        nearest = min(self.buffers, key=lambda b: max(b.begin - address, address - b.end, 0))
        return (
            f"byte {address - nearest.begin} of {nearest.name or 'a buffer'}, which has {nearest.end - nearest.begin}"
        )


class Memory:
    """Global memory, and the shared memory of the blocks that run together: one row a block."""

    def __init__(self, code: Code, globals_: Global, dynamic_bytes: int, blocks: int, threads: int, who):
        self.globals = globals_
        self.who = who  # names a thread
        variables = list(code.shared.values())
        dynamic = -(-code.shared_bytes // 128) * 128
        if dynamic_bytes:
            variables.append((dynamic, dynamic_bytes))
        self.shared_symbols = {name: offset for name, (offset, _) in code.shared.items()}
        self.shared_symbols.update(dict.fromkeys(code.dynamic, dynamic))
        self.names = {offset: name for name, offset in self.shared_symbols.items()}
        self.stride = -(-(dynamic + dynamic_bytes + REDZONE) // 128) * 128
        self.shared = np.empty(blocks * self.stride, np.uint8)
        self.shared_ranges = Ranges(sorted((begin, begin + size) for begin, size in variables))
        self.base = np.repeat(np.arange(blocks, dtype=np.int64) * self.stride, threads)  # of each thread's block
        self.local_symbols = {name: offset for name, (offset, _) in code.local.items()}
        self.local_stride = -(-code.local_bytes // 128) * 128
        self.local = np.empty(blocks * threads * self.local_stride, np.uint8)
        self.local_base = np.arange(blocks * threads, dtype=np.int64) * self.local_stride
        self.local_ranges = Ranges(sorted((begin, begin + size) for begin, size in code.local.values()))
        self.reset()

    def reset(self) -> None:
        self.shared[:] = 0xFF
        self.local[:] = 0xFF

    def _fail(self, what: str, bad: np.ndarray, threads: np.ndarray, instruction: Instruction, place: str) -> None:
        raise PtxError(f"{what} at {instruction} by {self.who(int(threads[bad][0]))}: {place}")

    def _check(self, ranges: Ranges, space: str, addresses, size: int, threads, instruction):
        if (addresses & (size - 1)).any():
            bad = (addresses & (size - 1)) != 0
            self._fail(f"misaligned {size}-byte access", bad, threads, instruction, hex(int(addresses[bad][0])))
        found = ranges.find(addresses, size) if len(ranges.begins) else np.full(len(addresses), -1)
        bad = np.broadcast_to(np.asarray(found) < 0, addresses.shape)
        if bad.any():
            first = int(addresses[bad][0])
            place = self.globals.where(first) if space == "global" else f"byte {first} of {space} memory"
            self._fail(f"out-of-bounds access of {size} bytes in {space} memory", bad, threads, instruction, place)
        return found

    def _parts(self, addresses: np.ndarray) -> list[tuple[np.ndarray, str, int]]:
        """Generic addresses by the memory they lie in: (which, space, its first address)."""
        shared = (addresses >= SHARED_WINDOW) & (addresses < SHARED_WINDOW + WINDOW_BYTES)
        local = (addresses >= LOCAL_WINDOW) & (addresses < LOCAL_WINDOW + WINDOW_BYTES)
        parts = [(shared, "shared", SHARED_WINDOW), (local, "local", LOCAL_WINDOW), (~shared & ~local, "global", 0)]
        return [part for part in parts if part[0].any()]

    def _own(self, space: str, addresses: np.ndarray, item: int, count: int, threads, instruction):
        """(shared or local memory as rows of an access, the row of each thread)"""
        ranges, memory, base = {
            "shared": (self.shared_ranges, self.shared, self.base),
            "local": (self.local_ranges, self.local, self.local_base),
        }[space]
        self._check(ranges, space, addresses, item * count, threads, instruction)
        return memory.view(UNSIGNED[item]).reshape(-1, count), (base[threads] + addresses) // (item * count)

    def read(self, space: str, addresses: np.ndarray, item: int, count: int, threads, instruction) -> np.ndarray:
        """[threads, count] values of `item` bytes."""
        size = item * count
        if space == "generic":
            result = np.empty((len(addresses), count), UNSIGNED[item])
            for part, kind, base in self._parts(addresses):
                result[part] = self.read(kind, addresses[part] - base, item, count, threads[part], instruction)
            return result
        if space != "global":
            rows, which = self._own(space, addresses, item, count, threads, instruction)
            return rows[which]
        found = self._check(self.globals.ranges, space, addresses, size, threads, instruction)
        if isinstance(found, int):
            rows, begin = self.globals.rows(found, item, count)
            return rows[(addresses - begin) // size]
        result = np.empty((len(addresses), count), UNSIGNED[item])
        for i in np.unique(found):
            part = found == i
            rows, begin = self.globals.rows(int(i), item, count)
            result[part] = rows[(addresses[part] - begin) // size]
        return result

    def write(self, space: str, addresses: np.ndarray, values: np.ndarray, threads, instruction) -> None:
        item, count = values.itemsize, values.shape[1]
        size = item * count
        if space == "generic":
            for part, kind, base in self._parts(addresses):
                self.write(kind, addresses[part] - base, values[part], threads[part], instruction)
            return
        if space != "global":
            rows, which = self._own(space, addresses, item, count, threads, instruction)
            rows[which] = values
            return
        found = np.broadcast_to(
            self._check(self.globals.ranges, space, addresses, size, threads, instruction), addresses.shape
        )
        for i in np.unique(found):
            part = found == i
            buffer = self.globals.buffers[i]
            if buffer.read_only:
                self._fail("write", part, threads, instruction, f"{buffer.name} is read-only")
            rows, begin = self.globals.rows(int(i), item, count)
            rows[(addresses[part] - begin) // size] = values[part]
