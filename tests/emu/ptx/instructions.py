"""What each PTX instruction does, in numpy over the threads of a batch. Source: the PTX ISA.

`decode` knows those that calculate (arithmetic.py) and those that move data (here); the others are control.py's. A form
of an instruction that is not written down is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from emu.ptx import arithmetic
from emu.ptx.memory import LOCAL_WINDOW, SHARED_WINDOW, UNSIGNED
from emu.ptx.ptx_types import DTYPES, Unknown
from emu.ptx.text import PtxError, split_operands

WINDOWS = {"global": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW}
ADDRESS = re.compile(r"\[([^\]+]+?)(?:\+(-?\w+))?\]$")
CACHE_HINTS = {"nc", "cs", "cg", "ca", "lu", "cv", "wb", "wt", "relaxed", "volatile", "weak", "L1::no_allocate"}


def decode(batch, instruction) -> Callable:
    """A function (mask) that carries the instruction out; mask None: in every thread."""
    operation = instruction.name[0]
    if operation in arithmetic.FAMILIES:
        operands = arithmetic.FAMILIES[operation](batch, instruction)
        function, sources, destination = operands
        write = batch.writer(destination)
        return lambda mask: write(function(*[source() for source in sources]), mask)
    if operation not in MOVES:
        raise Unknown(instruction)
    return MOVES[operation](batch, instruction)


def address_of(batch, operand: str, kind: str) -> Callable[[], np.ndarray]:
    """Addresses as signed 64-bit numbers; kind: the type of a register that holds one."""
    base, offset = ADDRESS.match(operand).groups()
    offset = int(offset or "0", 0)
    if base.startswith("%"):
        kind = batch.code.type_of(base)
        kind = f"u{DTYPES[kind].itemsize * 8}"
    else:
        kind = "u64"
    read = batch.reader(base, kind)

    def addresses():
        return np.broadcast_to(read().astype(np.int64) + offset, (batch.size,))

    return addresses


def call_parameter(batch, name: str) -> np.ndarray:
    """[threads, 8] bytes of a function's parameter."""
    if name not in batch.call_parameters:
        batch.call_parameters[name] = np.zeros((batch.size, 8), np.uint8)
    return batch.call_parameters[name]


def _form(i) -> tuple[str, int, str]:
    """(space, values, type) of a load or store."""
    space, count = "generic", 1
    for part in i.name[1:-1]:
        if part in ("global", "shared", "local", "param", "const"):
            space = "global" if part == "const" else part
        elif part in ("v2", "v4"):
            count = int(part[1])
        elif part not in CACHE_HINTS:
            raise Unknown(i)
    if i.name[-1] not in DTYPES or i.name[-1] == "pred":
        raise Unknown(i)
    return space, count, i.name[-1]


def _registers(operand: str) -> list[str]:
    return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]


def _load(batch, i):
    space, count, kind = _form(i)
    dtype = DTYPES[kind]
    writers = [batch.writer(r) for r in _registers(i.operands[0])]
    if len(writers) != count:
        raise Unknown(i)
    if space == "param":
        return _load_parameter(batch, i, writers, dtype)
    addresses = address_of(batch, i.operands[1], kind)

    def run(mask):
        threads = batch.all if mask is None else np.flatnonzero(mask)
        values = batch.memory.read(space, addresses()[threads], dtype.itemsize, count, threads, i)
        for j, write in enumerate(writers):
            if mask is None:
                write(values[:, j].view(dtype) if count == 1 else np.ascontiguousarray(values[:, j]).view(dtype), None)
            else:
                full = np.zeros(batch.size, values.dtype)
                full[threads] = values[:, j]
                write(full.view(dtype), mask)

    return run


def _load_parameter(batch, i, writers, dtype):
    name, offset = ADDRESS.match(i.operands[1]).groups()
    offset = int(offset or "0", 0)
    size = dtype.itemsize
    if name in batch.parameters:
        begin, length = batch.parameters[name]
        if offset < 0 or offset + len(writers) * size > length:
            raise PtxError(f"{batch.code.name}: {i} reads beyond the parameter")
        begin += offset

        def run(mask):
            for j, write in enumerate(writers):
                write(batch.parameter_bytes[begin + j * size : begin + (j + 1) * size].copy().view(dtype), mask)

    elif name.startswith("%"):  # an array in a parameter, at an index
        addresses = address_of(batch, i.operands[1], "u64")

        def run(mask):
            chosen = slice(None) if mask is None else mask
            first = np.where(True if mask is None else mask, addresses(), 0)
            begins = np.array([begin for begin, _ in batch.parameters.values()])
            ends = begins + np.array([length for _, length in batch.parameters.values()])
            holder = np.maximum(np.searchsorted(begins, first, "right") - 1, 0)
            if ((first < 0) | (first + len(writers) * size > ends[holder]))[chosen].any():
                raise PtxError(f"{batch.code.name}: {i} reads beyond a parameter")
            for j, write in enumerate(writers):
                value = batch.parameter_bytes[np.minimum((first + j * size)[:, None] + np.arange(size), ends[-1] - 1)]
                write(np.ascontiguousarray(value).view(dtype)[:, 0], mask)
    else:

        def run(mask):
            slot = batch.call_parameters.get(name)
            if slot is None:
                slot = call_parameter(batch, name)
            writers[0](np.ascontiguousarray(slot[:, : dtype.itemsize]).view(dtype)[:, 0], mask)

        if len(writers) != 1 or offset:
            raise Unknown(i)
    return run


def _store(batch, i):
    space, count, kind = _form(i)
    if space == "const":
        raise Unknown(i)
    sources = [batch.reader(r, kind) for r in _registers(i.operands[1])]
    if len(sources) != count:
        raise Unknown(i)
    size = DTYPES[kind].itemsize
    if space == "param":
        name, offset = ADDRESS.match(i.operands[0]).groups()
        if int(offset or 0) or count != 1:
            raise Unknown(i)

        def run_parameter(mask):
            value = np.ascontiguousarray(np.broadcast_to(sources[0](), (batch.size,))).view(np.uint8)
            chosen = slice(None) if mask is None else mask
            call_parameter(batch, name)[chosen, :size] = value.reshape(batch.size, size)[chosen]

        return run_parameter
    addresses = address_of(batch, i.operands[0], kind)

    def run(mask):
        threads = batch.all if mask is None else np.flatnonzero(mask)
        values = np.empty((len(threads), count), UNSIGNED[size])
        for j, source in enumerate(sources):
            value = source()
            values[:, j] = (value[threads] if value.ndim else value).view(UNSIGNED[size])
        batch.memory.write(space, addresses()[threads], values, threads, i)

    return run


def _atomic(batch, i):
    spaces, (operation, kind) = i.name[1:-2], i.name[-2:]
    space = "generic"
    for part in spaces:
        if part in ("global", "shared"):
            space = part
        elif part not in ("relaxed", "gpu", "acq_rel", "cta"):
            raise Unknown(i)
    if operation not in ATOMIC or kind not in DTYPES:
        raise Unknown(i)
    dtype = DTYPES[kind]
    reduction = i.name[0] == "red"  # no result
    operands = i.operands if reduction else i.operands[1:]
    write = (lambda value, mask: None) if reduction else batch.writer(i.operands[0])
    addresses = address_of(batch, operands[0], kind)
    sources = [batch.reader(operand, kind) for operand in operands[1:]]
    if len(sources) != (2 if operation == "cas" else 1):
        raise Unknown(i)

    def run(mask):
        threads = batch.all if mask is None else np.flatnonzero(mask)
        where = addresses()
        old = np.zeros(batch.size, dtype)
        values = [np.broadcast_to(source(), (batch.size,)) for source in sources]
        for t in threads:
            one = np.array([t])
            before = batch.memory.read(space, where[one], dtype.itemsize, 1, one, i).view(dtype)[0, 0]
            old[t] = before
            after = np.array([[ATOMIC[operation](before, *[v[t] for v in values])]], dtype)
            batch.memory.write(space, where[one], after.view(UNSIGNED[dtype.itemsize]), one, i)
        write(old, mask)

    return run


ATOMIC: dict[str, Callable] = {
    "add": lambda old, v: old + v,
    "min": min,
    "max": max,
    "and": lambda old, v: old & v,
    "or": lambda old, v: old | v,
    "exch": lambda old, v: v,
    "cas": lambda old, expected, v: v if old == expected else old,
    "inc": lambda old, last: 0 if old >= last else old + 1,
}


def _move(batch, i):
    if len(i.name) != 2 or i.name[1] not in DTYPES:
        raise Unknown(i)
    kind = i.name[1]
    to, source = i.operands
    size = DTYPES[kind].itemsize
    if source.startswith("{"):
        parts = split_operands(source[1:-1])
        bits = size * 8 // len(parts)
        write, readers = batch.writer(to), [batch.reader(p, f"u{bits}") for p in parts]

        def pack(mask):
            value = np.zeros((), UNSIGNED[size])
            for j, read in enumerate(readers):
                value = value | (read().astype(UNSIGNED[size]) << UNSIGNED[size](j * bits))
            write(value, mask)

        return pack
    read = batch.reader(source, kind)
    if to.startswith("{"):
        writers = [batch.writer(p) for p in split_operands(to[1:-1])]
        bits = size * 8 // len(writers)

        def unpack(mask):
            value = read().view(UNSIGNED[size])
            for j, write in enumerate(writers):
                write((value >> UNSIGNED[size](j * bits)).astype(UNSIGNED[bits // 8]), mask)

        return unpack
    write = batch.writer(to)
    return lambda mask: write(read(), mask)


def _cvta(batch, i):
    write, read = batch.writer(i.operands[0]), batch.reader(i.operands[1], i.name[-1])
    space, to = i.name[-2], len(i.name) == 4
    if i.name != ("cvta", *(("to",) if to else ()), space, "u64") or space not in WINDOWS:
        raise Unknown(i)
    window = np.uint64(WINDOWS[space])
    return lambda mask: write(read() - window if to else read() + window, mask)


def _fence(batch, i):
    if i.name not in (("membar", "gl"), ("membar", "cta"), ("fence", "acq_rel", "gpu"), ("fence", "sc", "gpu")):
        raise Unknown(i)
    return lambda mask: None  # threads run in step, and see each other's stores at once


def _trap(batch, i):
    def run(mask):
        thread = 0 if mask is None else int(np.flatnonzero(mask)[0])
        raise PtxError(f"{batch.code.name}: {batch.who(thread)} runs into a trap")

    return run


def _copy_async(batch, i):
    """The copies land at their wait, as late as they may: until then the destination holds all ones."""
    memory = batch.memory
    if i.name == ("cp", "async", "commit_group"):

        def commit(mask):
            batch.committed[slice(None) if mask is None else mask] += 1

        return commit
    if i.name in (("cp", "async", "wait_group"), ("cp", "async", "wait_all")):
        pending = int(i.operands[0], 0) if i.name[2] == "wait_group" else 0

        def wait(mask):
            if i.name[2] == "wait_all":
                batch.committed[slice(None) if mask is None else mask] += 1
            left = []
            for threads, groups, to, contents in batch.copies:
                done = groups < batch.committed[threads] - pending
                if mask is not None:
                    done &= mask[threads]
                memory.shared.reshape(-1, 16)[to[done] // 16] = contents[done]
                if not done.all():
                    left.append([threads[~done], groups[~done], to[~done], contents[~done]])
            batch.copies = left

        return wait
    if i.name != ("cp", "async", "cg", "shared", "global") or i.operands[2] != "16" or len(i.operands) not in (3, 4):
        raise Unknown(i)
    to, source = address_of(batch, i.operands[0], "u32"), address_of(batch, i.operands[1], "u64")
    count = batch.reader(i.operands[3] if len(i.operands) == 4 else "16", "u32")

    def start(mask):
        threads = batch.all if mask is None else np.flatnonzero(mask)
        sizes = np.broadcast_to(count(), (batch.size,))[threads].astype(np.int64)
        if (sizes > 16).any():
            raise PtxError(f"{batch.code.name}: {i} of {int(sizes.max())} source bytes; 0 to 16")
        where, target = source()[threads], to()[threads]
        if (where & 15).any():
            raise PtxError(f"{batch.code.name}: {i} from an address that is no multiple of 16")
        contents = np.zeros((len(threads), 16), np.uint8)
        for size in np.unique(sizes[sizes > 0]):  # only the bytes asked for need be there
            part = np.flatnonzero(sizes == size)
            if size == 16:
                contents[part] = memory.read("global", where[part], 8, 2, threads[part], i).view(np.uint8)
                continue
            for b in range(int(size)):
                contents[part, b] = memory.read("global", where[part] + b, 1, 1, threads[part], i)[:, 0]
        ones = np.full((len(threads), 2), np.iinfo(np.uint64).max, np.uint64)
        memory.write("shared", target, ones, threads, i)
        batch.copies.append([threads, batch.committed[threads].copy(), memory.base[threads] + target, contents])

    return start


MOVES: dict[str, Callable] = {
    "ld": _load, "ldu": _load, "st": _store, "atom": _atomic, "red": _atomic, "mov": _move, "cvta": _cvta,
    "membar": _fence, "fence": _fence, "trap": _trap, "cp": _copy_async,
}  # fmt: skip
