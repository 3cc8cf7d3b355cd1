"""What the 32 threads of a warp do together. Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16"."""

from __future__ import annotations

import numpy as np
from emu.ptx.arithmetic import bf16_to_f32
from emu.ptx.instructions import address_of
from emu.ptx.ptx_types import Unknown
from emu.ptx.text import PtxError, split_operands

LANES = 32
LANE = np.arange(LANES)
ROW, COLUMN = LANE // 4, LANE % 4 * 2  # of the values a lane holds in an 8x8 matrix


def syncwarp(batch, i):
    members = batch.reader(i.operands[0], "u32")
    return lambda mask, address: batch.meet(mask, address, members()) is None


def shuffle(batch, i):
    if i.name[:2] != ("shfl", "sync") or i.name[2:] not in ((m, "b32") for m in ("idx", "bfly", "up", "down")):
        raise Unknown(i)
    mode = i.name[2]
    to, _, inside = i.operands[0].partition("|")
    write, write_inside = batch.writer(to), batch.writer(inside or "_")
    value, distance, clamp, members = (batch.reader(o, "u32") for o in i.operands[1:])

    def act(mask, address):
        go = batch.meet(mask, address, members())
        if not go.any():
            return
        lane, b = batch.lane, distance().astype(np.int64) & 31
        c = clamp().astype(np.int64)
        segment, last = (c >> 8) & 31, c & 31
        first, maximum = lane & segment, (lane & segment) | (last & ~segment)
        source = {
            "idx": first | (b & ~segment & 31),
            "bfly": lane ^ b,
            "up": lane - b,
            "down": lane + b,
        }[mode]
        within = source >= maximum if mode == "up" else source <= maximum
        source = np.where(within, source, lane)
        source = np.broadcast_to(batch.warp * LANES + source, (batch.size,))
        if not go[source[go]].all():
            bad = int(np.flatnonzero(go & ~go[source])[0])
            raise PtxError(f"{batch.code.name}: {batch.who(bad)} reads, at {i}, a lane that takes no part")
        write(np.broadcast_to(value(), (batch.size,))[source], go)
        write_inside(np.broadcast_to(within, (batch.size,)), go)

    return act


def vote(batch, i):
    if i.name not in (
        ("vote", "sync", "ballot", "b32"),
        ("vote", "sync", "any", "pred"),
        ("vote", "sync", "all", "pred"),
    ):
        raise Unknown(i)
    write, predicate, members = (
        batch.writer(i.operands[0]),
        batch.reader(i.operands[1], "pred"),
        batch.reader(i.operands[2], "u32"),
    )

    def act(mask, address):
        go = batch.meet(mask, address, members())
        if not go.any():
            return
        takes_part = batch.packed(go)[batch.warp] & members()
        votes = batch.packed(predicate() & go)[batch.warp] & takes_part
        result = {"ballot": votes, "any": votes != 0, "all": votes == takes_part}[i.name[2]]
        write(result, go)

    return act


def _whole_warps(batch, i, mask, address) -> np.ndarray | None:
    """The warps whose 32 lanes are all at a tensor-core instruction; None while some are still to come."""
    go = batch.meet(mask, address, None)
    if not go.any():
        return None
    warps = go.reshape(-1, LANES)
    if (warps.any(1) != warps.all(1)).any():
        raise PtxError(f"{batch.code.name}: {i} by a warp of which some threads have ended")
    return warps.all(1)


def _fragment(batch, reader) -> np.ndarray:
    """[warps, 32] of a register."""
    return np.broadcast_to(reader(), (batch.size,)).reshape(-1, LANES)


def ldmatrix(batch, i):
    plain = ("ldmatrix", "sync", "aligned", "m8n8", "x4", "shared", "b16")
    transposed = (*plain[:5], "trans", *plain[5:])
    if i.name not in (plain, transposed):
        raise Unknown(i)
    addresses = address_of(batch, i.operands[1], "u32")
    writers = [batch.writer(r) for r in split_operands(i.operands[0][1:-1])]

    def act(mask, address):
        warps = _whole_warps(batch, i, mask, address)
        if warps is None:
            return
        threads = np.flatnonzero(np.repeat(warps, LANES))
        rows = batch.memory.read("shared", addresses()[threads], 8, 2, threads, i)
        tiles = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, 4, 8, 8)
        if i.name == transposed:
            tiles = tiles.swapaxes(2, 3)
        for m, write in enumerate(writers):
            low, high = tiles[:, m, ROW, COLUMN].astype(np.uint32), tiles[:, m, ROW, COLUMN + 1].astype(np.uint32)
            full = np.zeros(batch.size, np.uint32)
            full[threads] = (low | high << np.uint32(16)).reshape(-1)
            write(full, np.repeat(warps, LANES))

    return act


def mma(batch, i):
    shape = ("mma", "sync", "aligned", "m16n8k16", "row", "col", "f32")
    widen = {
        (*shape, "bf16", "bf16", "f32"): lambda u: bf16_to_f32(u.astype(np.uint16)),
        (*shape, "f16", "f16", "f32"): lambda u: u.astype(np.uint16).view(np.float16),
    }.get(i.name)
    if widen is None:
        raise Unknown(i)
    d, a, b, c = (split_operands(o[1:-1]) for o in i.operands)
    writers = [batch.writer(r) for r in d]
    a, b = ([batch.reader(r, "u32") for r in registers] for registers in (a, b))
    c = [batch.reader(r, "f32") for r in c]
    if (len(a), len(b), len(c), len(writers)) != (4, 2, 4, 4):
        raise Unknown(i)

    def act(mask, address):
        warps = _whole_warps(batch, i, mask, address)
        if warps is None:
            return
        left, right = np.zeros((batch.warps, 16, 16)), np.zeros((batch.warps, 16, 8))
        for n, reader in enumerate(a):
            values, row, column = _fragment(batch, reader), ROW + n % 2 * 8, COLUMN + n // 2 * 8
            left[:, row, column], left[:, row, column + 1] = widen(values), widen(values >> np.uint32(16))
        for n, reader in enumerate(b):
            values, row = _fragment(batch, reader), COLUMN + n * 8
            right[:, row, ROW], right[:, row + 1, ROW] = widen(values), widen(values >> np.uint32(16))
        product = left @ right
        chosen = np.repeat(warps, LANES)
        sums = [product[:, ROW + n // 2 * 8, COLUMN + n % 2] + _fragment(batch, reader) for n, reader in enumerate(c)]
        for write, values in zip(writers, sums, strict=True):  # C may be the same registers as D
            write(values.astype(np.float32).reshape(-1), chosen)

    return act
