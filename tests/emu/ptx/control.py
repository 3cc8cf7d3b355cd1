"""PTX instructions that change where threads go on: branches, calls, barriers, and those of a whole warp (collective.py)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from emu.ptx import collective
from emu.ptx.instructions import call_parameter
from emu.ptx.ptx_types import Unknown
from emu.ptx.text import PtxError, split_operands


def control(batch, instruction) -> Callable | None:
    """A function (mask, address) for an instruction that changes where threads go on; None for any other."""
    make = CONTROL.get(instruction.name[0])
    if make is None:
        return None
    act = make(batch, instruction)
    guard = batch.register(instruction.guard) if instruction.guard else None

    def run(mask, address):
        batch.at[mask] = address + 1
        if guard is not None:
            mask = mask & (~guard if instruction.negated else guard)
        if mask.any():
            act(mask, address)

    return run


def _branch(batch, i):
    if i.name not in (("bra",), ("bra", "uni")):
        raise Unknown(i)
    target = batch.code.labels[i.operands[0]]

    def act(mask, address):
        batch.at[mask] = target

    return act


def _leave(batch, i):
    if i.name not in (("ret",), ("exit",), ("ret", "uni")):
        raise Unknown(i)
    return lambda mask, address: batch.leave(mask)


def _call(batch, i):
    if i.name not in (("call",), ("call", "uni")):
        raise Unknown(i)
    results, name, arguments = ([], *i.operands) if len(i.operands) == 2 else i.operands
    results = split_operands(results.strip("()")) if results else []
    arguments = split_operands(arguments.strip("()"))
    if name not in batch.code.functions:
        raise Unknown(i)
    entry, inner_results, inner_arguments = batch.code.functions[name]

    def act(mask, address):
        if batch.in_call[mask].any():
            raise PtxError(f"{batch.code.name}: {i} inside of a function")
        for outer, inner in zip(arguments, inner_arguments, strict=True):
            call_parameter(batch, inner)[mask] = call_parameter(batch, outer)[mask]
        # where the caller looks for the result: the same memory, so that nothing is to be done at `ret`
        for outer, inner in zip(results, inner_results, strict=True):
            batch.call_parameters[outer] = call_parameter(batch, inner)
        batch.return_to[mask] = address + 1
        batch.in_call[mask] = True
        batch.at[mask] = entry

    return act


def _bar(batch, i):
    if i.name == ("bar", "warp", "sync"):
        return collective.syncwarp(batch, i)
    plain = i.name in (("bar", "sync"), ("barrier", "sync", "aligned")) and i.operands == ("0",)
    reducing = i.name[:2] == ("bar", "red") and i.name[2:] in (("and", "pred"), ("or", "pred"), ("popc", "u32"))
    if not plain and not (reducing and len(i.operands) == 3 and i.operands[1] == "0"):
        raise Unknown(i)
    return lambda mask, address: batch.wait(mask, address)


def end_of_barrier(batch, i, mask) -> None:
    """All threads of their blocks have come to barrier `i`."""
    if i.name[1] != "red":
        return
    votes = (batch.reader(i.operands[2], "pred")() & mask).reshape(batch.blocks, -1)
    voters = mask.reshape(batch.blocks, -1)
    if i.name[2] == "popc":
        result = votes.sum(1).astype(np.uint32)
    else:
        result = votes.any(1) if i.name[2] == "or" else (votes | ~voters).all(1)
    batch.writer(i.operands[0])(np.repeat(result, batch.padded), mask)


CONTROL: dict[str, Callable] = {
    "bra": _branch, "ret": _leave, "exit": _leave, "call": _call, "bar": _bar, "barrier": _bar,
    "shfl": collective.shuffle, "vote": collective.vote, "ldmatrix": collective.ldmatrix, "mma": collective.mma,
}  # fmt: skip
