"""Runs a kernel's PTX: all threads of several blocks side by side, each instruction one numpy operation over them.

The threads at the lowest address go first, so that those that parted meet again; those that reach an instruction of the
whole warp wait there for the others it names. Blocks run together as far as memory allows, so nothing may depend on
their order. Not here: textures, and races, which are the host executor's to find.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from emu.ptx import control, instructions
from emu.ptx.memory import Buffer, Global, Memory
from emu.ptx.ptx_types import DTYPES
from emu.ptx.text import Code, Module, PtxError

LANES = 32
TOGETHER = 4096  # threads of a batch of blocks, unless one block has more
NOWHERE = np.iinfo(np.int64).max  # the address of a thread that waits or has ended


class Batch:
    """The threads of some blocks: their registers, where each stands, their shared memory."""

    def __init__(self, code: Code, memory: Callable, grid, block, blocks: int, parameters: dict[str, bytes]):
        self.code, self.grid, self.block, self.blocks = code, grid, block, blocks
        self.threads_of_block = block[0] * block[1] * block[2]
        self.padded = -(-self.threads_of_block // LANES) * LANES
        self.size = blocks * self.padded
        self.warps = self.size // LANES
        self.lane = np.tile(np.arange(LANES), self.warps)
        self.warp = np.repeat(np.arange(self.warps), LANES)
        self.all = np.arange(self.size)
        self.memory: Memory = memory(blocks, self.padded, self.who)
        self.parameters: dict[str, tuple[int, int]] = {}  # name → (first byte, bytes) in parameter_bytes
        self.parameter_bytes = np.zeros(0, np.uint8)
        for name, value in parameters.items():
            begin = -(-len(self.parameter_bytes) // 16) * 16
            self.parameters[name] = (begin, len(value))
            padding = np.zeros(begin - len(self.parameter_bytes), np.uint8)
            self.parameter_bytes = np.concatenate([self.parameter_bytes, padding, np.frombuffer(value, np.uint8)])
        self.call_parameters: dict[str, np.ndarray] = {}  # of functions: [threads, 8] bytes
        self.registers: dict[str, np.ndarray] = {}
        index = np.tile(np.arange(self.padded), blocks)
        self.special = {
            "%laneid": self.lane,
            "%tid.x": index % block[0],
            "%tid.y": index // block[0] % block[1],
            "%tid.z": index // (block[0] * block[1]),
        }
        for i, axis in enumerate("xyz"):
            self.special[f"%ntid.{axis}"] = np.full(self.size, block[i])
            self.special[f"%nctaid.{axis}"] = np.full(self.size, grid[i])
            self.special[f"%ctaid.{axis}"] = np.zeros(self.size, np.int64)
        self.special = {name: values.astype(np.uint32) for name, values in self.special.items()}
        self.at = np.zeros(self.size, np.int64)  # the address of each thread that can go on
        self.resume = np.zeros(self.size, np.int64)  # of each that waits at a barrier or a collective
        self.alive = np.zeros(self.size, bool)
        self.barrier = np.zeros(self.size, bool)
        self.parked = np.zeros(self.size, bool)
        self.return_to = np.zeros(self.size, np.int64)
        self.in_call = np.zeros(self.size, bool)
        self.committed = np.zeros(self.size, np.int64)  # cp.async groups
        self.copies: list[list] = []  # [threads, group of each, first byte in shared memory, contents]
        self.executed = 0

    def reset(self, first_block: int, count: int) -> None:
        """Sets the threads at the kernel's beginning, as those of `count` blocks from `first_block` on."""
        self.first_block = first_block
        b = first_block + np.repeat(np.arange(self.blocks), self.padded)
        x, y, _ = self.grid
        for name, values in (("x", b % x), ("y", b // x % y), ("z", b // (x * y))):
            self.special[f"%ctaid.{name}"][:] = values.astype(np.uint32)
        real = (self.all % self.padded < self.threads_of_block) & (self.all // self.padded < count)
        self.alive[:] = real
        self.at[:] = np.where(real, self.code.entry, NOWHERE)
        for flags in (self.barrier, self.parked, self.in_call):
            flags[:] = False
        for values in (self.committed, *self.registers.values()):
            values[:] = 0
        self.copies.clear()
        self.memory.reset()

    def who(self, thread: int) -> str:
        block, index = self.first_block + thread // self.padded, thread % self.padded
        x, y, _ = self.grid
        place = (block % x, block // x % y, block // (x * y))
        thread_place = (
            index % self.block[0],
            index // self.block[0] % self.block[1],
            index // (self.block[0] * self.block[1]),
        )
        return f"block {place}, thread {thread_place}"

    # ---- operands --------------------------------------------------------------------------------------------------
    def register(self, name: str) -> np.ndarray:
        if name not in self.registers:
            dtype = DTYPES[self.code.type_of(name)]
            self.registers[name] = np.zeros(self.size, dtype if dtype.kind == "b" else f"u{dtype.itemsize}")
        return self.registers[name]

    def constant(self, operand: str, dtype: np.dtype) -> np.ndarray | None:
        """The value of a literal or of a symbol's address; None for a register."""
        memory = self.memory
        if operand in memory.globals.symbols:
            value = memory.globals.symbols[operand]
        elif operand in memory.shared_symbols:
            value = memory.shared_symbols[operand]
        elif operand in memory.local_symbols:
            value = memory.local_symbols[operand]
        elif operand in self.parameters:
            value = self.parameters[operand][0]
        elif operand[:2] in ("0f", "0F") or operand[:2] in ("0d", "0D"):
            bits = np.array(int(operand[2:], 16), f"u{4 if operand[1] in 'fF' else 8}")
            value = bits.view(f"f{bits.itemsize}")
            return value.astype(dtype) if dtype.kind == "f" else bits.astype(f"u{dtype.itemsize}").view(dtype)
        elif operand[0] == "-" or operand[0].isdigit():
            value = int(operand.rstrip("U"), 0)
            if dtype.kind == "b":
                return np.array(value != 0)
        else:
            return None
        width = dtype.itemsize
        return np.array(value & ((1 << (8 * width)) - 1), f"u{width}").view(dtype)

    def reader(self, operand: str, kind: str) -> Callable[[], np.ndarray]:
        """A function that returns the operand's value in every thread, as `kind`."""
        dtype = DTYPES[kind]
        if operand.startswith("!"):
            inner = self.reader(operand[1:], kind)
            return lambda: ~inner()
        value = self.constant(operand, dtype)
        if value is None:
            value = self.special[operand] if operand in self.special else self.register(operand)
            if "b" in (value.dtype.kind, dtype.kind):
                if value.dtype != dtype:
                    raise PtxError(f"{operand} is used as {kind}")
            elif value.itemsize > dtype.itemsize:
                narrow = f"u{dtype.itemsize}"
                return lambda: value.astype(narrow).view(dtype)
            elif value.itemsize < dtype.itemsize:
                raise PtxError(f"{operand}, of {value.itemsize * 8} bits, is read as {kind}")
            else:
                value = value.view(dtype)
        return lambda: value

    def writer(self, operand: str) -> Callable[[np.ndarray, np.ndarray | None], None]:
        """A function (value, mask) that sets a register where the mask says; None: in every thread."""
        if operand == "_":
            return lambda value, mask: None
        register = self.register(operand)

        def write(value, mask):
            value = np.asarray(value)
            if value.dtype != register.dtype:
                if value.dtype == bool or register.dtype == bool:
                    raise PtxError(f"{operand} receives a value of type {value.dtype}")
                if value.itemsize < register.itemsize:  # as its sign says
                    kind = "i" if value.dtype.kind == "i" else "u"
                    value = value.view(f"{kind}{value.itemsize}").astype(f"{kind}{register.itemsize}")
                value = value.view(f"u{value.itemsize}").astype(register.dtype)
            if mask is None:
                register[:] = value
            else:
                np.copyto(register, value, where=mask)

        return write

    # ---- control ---------------------------------------------------------------------------------------------------
    def packed(self, flags: np.ndarray) -> np.ndarray:
        """One word a warp, bit l for lane l."""
        return np.packbits(flags.reshape(-1, LANES), axis=1, bitorder="little").view(np.uint32)[:, 0]

    def meet(self, mask: np.ndarray, address: int, members: np.ndarray | None) -> np.ndarray:
        """Of the threads at a warp's instruction those whose fellows have all come; the others wait.

        members: the lanes it takes, in each thread; None: all that are alive
        """
        present = mask | (self.parked & (self.resume == address))
        alive = self.packed(self.alive)
        needed = alive[self.warp] if members is None else np.asarray(members, np.uint32) & alive[self.warp]
        go = present & ((needed & ~self.packed(present)[self.warp]) == 0)
        self.parked[present] = True
        self.resume[present] = address
        self.at[present] = NOWHERE
        self.parked[go] = False
        self.at[go] = address + 1
        return go

    def wait(self, mask: np.ndarray, address: int) -> None:
        """At a barrier of the block."""
        self.barrier[mask] = True
        self.resume[mask] = address
        self.at[mask] = NOWHERE

    def leave(self, mask: np.ndarray) -> None:
        """`ret`: back to the caller, or the thread's end."""
        back = mask & self.in_call
        self.at[back] = self.return_to[back]
        self.in_call[back] = False
        end = mask & ~back
        self.at[end] = NOWHERE
        self.alive[end] = False

    def release(self) -> bool:
        """When no thread can go on: opens the barriers where whole blocks wait. False: all threads have ended."""
        if not self.alive.any():
            return False
        waiting = self.barrier.reshape(self.blocks, -1)
        complete = (waiting == self.alive.reshape(self.blocks, -1)).all(1) & waiting.any(1)
        if not complete.any():
            stuck = int(np.flatnonzero(self.alive & (self.parked | self.barrier))[0])
            raise PtxError(
                f"{self.code.name}: deadlock; {self.who(stuck)} waits at "
                f"{self.code.instructions[int(self.resume[stuck])]} for others that never come"
            )
        for b in np.flatnonzero(complete):
            threads = np.flatnonzero(self.barrier & (self.all // self.padded == b))
            addresses = np.unique(self.resume[threads])
            if len(addresses) > 1:
                raise PtxError(
                    f"{self.code.name}: threads of {self.who(int(threads[0]))}'s block wait at different barriers"
                )
        open_ = np.repeat(complete, self.padded) & self.barrier
        for address in np.unique(self.resume[open_]):
            control.end_of_barrier(self, self.code.instructions[address], open_ & (self.resume == address))
        self.at[open_] = self.resume[open_] + 1
        self.barrier[open_] = False
        return True

    def run(self) -> None:
        program = self.program
        while True:
            address = int(self.at.min())
            if address == NOWHERE:
                if not self.release():
                    return
                continue
            if address >= len(self.code.instructions):
                raise PtxError(f"{self.code.name}: runs beyond its end")
            mask = self.at == address
            if address not in program:
                program[address] = self.decode(address)
            steps, end, last = program[address]
            where = None if mask.all() else mask
            for step in steps:
                step(where)
            self.executed += len(steps) + 1
            if last is None:
                self.at[mask] = end
            else:
                last(mask, end)

    def decode(self, address: int):
        """(the steps from an address on that neither branch nor wait, the address after them, what stands there)"""
        steps, labels = [], self.targets
        while True:
            if address >= len(self.code.instructions):
                return steps, address, None
            instruction = self.code.instructions[address]
            changes = control.control(self, instruction)
            if changes is not None:
                return steps, address, changes
            steps.append(guarded(self, instruction, instructions.decode(self, instruction)))
            address += 1
            if address in labels:
                return steps, address, None


def guarded(batch: Batch, instruction, step: Callable) -> Callable:
    if instruction.guard is None:
        return step
    predicate, negated = batch.register(instruction.guard), instruction.negated

    def run(mask):
        chosen = ~predicate if negated else predicate
        chosen = chosen & mask if mask is not None else chosen.copy()
        if chosen.any():
            step(chosen)

    return run


def launch(module: Module, name: str, grid, block, dynamic_bytes: int, arguments: list[bytes], buffers) -> int:
    """Runs kernel `name`; returns how many instructions that took. Arguments as the launch's bytes, one a parameter;
    buffers (begin, end, read_only, name) are addresses in this process."""
    code = module.code(name)
    if len(arguments) != len(code.parameters):
        raise PtxError(f"{name} has {len(code.parameters)} parameters, got {len(arguments)} arguments")
    parameters = {}
    for (parameter, size), value in zip(code.parameters, arguments, strict=True):
        if len(value) != size:
            raise PtxError(f"{name}: parameter {parameter} has {size} bytes, got {len(value)}")
        parameters[parameter] = bytes(value)
    globals_ = Global([Buffer(*b) for b in buffers], module)
    count = grid[0] * grid[1] * grid[2]
    together = max(1, min(count, TOGETHER // max(LANES, block[0] * block[1] * block[2])))

    def memory(blocks, threads, who):
        return Memory(code, globals_, dynamic_bytes, blocks, threads, who)

    batch = Batch(code, memory, grid, block, together, parameters)
    batch.program = {}
    batch.targets = set(code.labels.values()) | {code.entry}
    with np.errstate(all="ignore"):
        for first in range(0, count, together):
            batch.reset(first, min(together, count - first))
            batch.run()
    return batch.executed
