"""Where each parameter's state lies in paged memory: tensors cut into pieces that each lie inside one page.

A piece holds everything a kernel needs to step its values: both moments, their scales, the master copy and a step
counter of its own. A page is therefore stepped alone, and one pass over the pages in order is one pass over the disk.
Small tensors lie side by side in one page, whatever their sizes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch

from pyfastpeft.optim.device_pages import DevicePages
from pyfastpeft.paged_memory import PagedMemory

BLOCK = 256  # values between two places where a tensor may be cut: a block of the 8-bit state
_ALIGN = 64  # bytes, of each field
VALUE, SCALE, COUNTER = "value", "scale", "counter"  # one for each value; for each block; for each piece


class Field(NamedTuple):
    """A tensor of the state: its key, dtype, and what there is one of it for."""

    key: str
    dtype: torch.dtype
    per: str = VALUE


STEP = Field("step", torch.float32, COUNTER)


class Piece(NamedTuple):
    """Values [first, first + n) of a tensor, in the order of memory, and where each field of theirs begins."""

    page: int
    first: int
    n: int
    offsets: tuple[int, ...]
    nbytes: int


def _count(field: Field, n: int) -> int:
    return n if field.per == VALUE else -(n // -BLOCK) if field.per == SCALE else 1


def _aligned(n: int) -> int:
    return -(n // -_ALIGN) * _ALIGN


class PageSpace:
    """Hands out room on the pages of one PagedMemory; pages that hold nothing any more are given back."""

    def __init__(self, memory: PagedMemory | DevicePages) -> None:
        self.memory = memory
        self.live: list[int] = []  # bytes of state on each page
        self.free: list[int] = []  # pages without any
        self._cursor: tuple[int, int] | None = None  # the page that is being filled, and how far
        self._process = os.getpid()

    def place(self, requests: Sequence[tuple[int, tuple[Field, ...]]]) -> list[list[Piece]]:
        """Pieces for states of (values, fields). All of them or, where the disk has no room (SpillError), none."""
        free, made, cursor = sorted(self.free, reverse=True), 0, self._cursor
        size, result = self.memory.page_bytes, []
        for numel, fields in requests:
            block = sum(_count(f, BLOCK) * f.dtype.itemsize for f in fields if f.per != COUNTER)
            slack = _ALIGN * len(fields)
            pieces, first = [], 0
            while first < numel or not pieces:
                page, used = cursor if cursor is not None else (-1, size)
                room, rest = size - used, numel - first
                n = min(max((room - slack) // block, 0) * BLOCK, rest)
                whole = -(rest // -BLOCK) * block + slack <= room
                if not whole and (n == 0 or room < size // 16):
                    page = free.pop() if free else len(self.live) + made
                    made += page >= len(self.live)
                    cursor = (page, 0)
                    continue
                n = rest if whole else n
                offsets, at = [], used
                for field in fields:
                    offsets.append(at)
                    at += _aligned(_count(field, n) * field.dtype.itemsize)
                nbytes = sum(_count(f, n) * f.dtype.itemsize for f in fields)
                pieces.append(Piece(page, first, n, tuple(offsets), nbytes))
                cursor, first = (page, at), first + n
            result.append(pieces)
        if made:
            self.memory.add_pages(made)  # may raise; nothing has been changed so far
            self.live += [0] * made
        self._cursor, self.free = cursor, free
        for pieces in result:
            for piece in pieces:
                self.live[piece.page] += piece.nbytes
        return result

    def close_page(self) -> None:
        """New states begin on another page than the last ones."""
        self._cursor = None

    def give_back(self, pieces: Sequence[Piece]) -> None:
        """A page whose last state goes is discarded without being written, and used again."""
        if os.getpid() != self._process:
            return  # a forked child lets go of its copies of Python objects; the pages are the parent's
        for piece in pieces:
            self.live[piece.page] -= piece.nbytes
        for page in {piece.page for piece in pieces}:
            if self.live[page] == 0 and page not in self.free:
                self.memory.discard(page)
                self.free.append(page)
                if self._cursor is not None and self._cursor[0] == page:
                    self._cursor = None

    def bytes_by_place(self) -> dict[str, int]:
        """Bytes of state that are "resident", in "host" memory beside a device's, and "spilled"."""
        found = {"resident": 0, "host": 0, "spilled": 0}
        for live, place in zip(self.live, self.memory.locations(), strict=True):
            found[place] += live
        return found


class PagedState(MutableMapping):
    """One parameter's state in pages, as a mapping: reading a key makes a tensor with a copy of it, assigning writes.

    `constants` are what is not paged: the maps of 8-bit codes.
    """

    def __init__(
        self,
        space: PageSpace,
        p: torch.Tensor,
        fields: tuple[Field, ...],
        pieces: list[Piece],
        constants: dict[str, Any],
    ) -> None:
        self.space, self.fields, self.pieces, self.constants = space, fields, pieces, constants
        self.shape, self.stride, self.device = p.shape, p.stride(), p.device
        self.numel = p.numel()
        self._index = {field.key: i for i, field in enumerate(fields)}

    def __del__(self) -> None:
        self.space.give_back(self.pieces)

    def __getitem__(self, key: str) -> Any:
        return self.constants[key] if key in self.constants else self.read([key])[key].to(self.device)

    def __setitem__(self, key: str, value: torch.Tensor) -> None:
        if key not in self._index:
            raise KeyError(f"{key}: this state has {', '.join(self)}; others cannot be added to it")
        self.write({key: value})

    def __delitem__(self, key: str) -> None:
        raise TypeError(
            f"{key} cannot be taken out of a paged state; delete the state as a whole: del optimizer.state[p]"
        )

    def __iter__(self) -> Iterator[str]:
        yield from self._index
        yield from self.constants

    def __contains__(self, key: object) -> bool:  # the inherited one would read it
        return key in self._index or key in self.constants

    def __len__(self) -> int:
        return len(self._index) + len(self.constants)

    def __repr__(self) -> str:
        return f"PagedState({', '.join(self)}; {self.nbytes} bytes in {len({p.page for p in self.pieces})} pages)"

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def offset(self, piece: Piece, *keys: str) -> int:
        """Where the first of `keys` that this state has begins in the piece; -1: it has none."""
        return next((piece.offsets[self._index[key]] for key in keys if key in self._index), -1)

    def read(self, keys: Sequence[str] | None = None, new: Any = torch.empty) -> dict[str, torch.Tensor]:
        """Copies on the CPU of these keys (all of them, and the constants), in one pass over the pages.

        new(n, dtype=) makes their memory.
        """
        wanted = [f for f in self.fields if keys is None or f.key in keys]
        if keys is not None and len(wanted) != len(keys):
            raise KeyError(next(key for key in keys if key not in self._index))
        found = {field.key: self._like(field, new) for field in wanted}
        # every piece counts the same steps: one of them knows
        pieces = self.pieces[:1] if all(f.per == COUNTER for f in wanted) else self.pieces
        self._move(found, pieces, self.space.memory.read)
        return found if keys is not None else {**found, **self.constants}

    def write(self, values: dict[str, torch.Tensor]) -> None:
        """The inverse of read, for some or all of the fields."""
        placed = {}
        for key, value in values.items():
            like = self._like(self.fields[self._index[key]])
            if not isinstance(value, torch.Tensor) or value.shape != like.shape:
                got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise ValueError(f"paged state: {key} is {got}, expected a tensor of shape {tuple(like.shape)}")
            placed[key] = like.copy_(value)
        self._move(placed, self.pieces, self.space.memory.write)

    def _like(self, field: Field, new: Any = torch.empty) -> torch.Tensor:
        if field.per == VALUE:
            return new(self.numel, dtype=field.dtype).as_strided(self.shape, self.stride)
        return torch.empty(() if field.per == COUNTER else (_count(field, self.numel),), dtype=field.dtype)

    def _move(self, tensors: dict[str, torch.Tensor], pieces: Sequence[Piece], move: Any) -> None:
        for piece in pieces:
            for key, tensor in tensors.items():
                i = self._index[key]
                field, size = self.fields[i], self.fields[i].dtype.itemsize
                begin = {VALUE: piece.first, SCALE: piece.first // BLOCK, COUNTER: 0}[field.per] * size
                move(piece.page, piece.offsets[i], tensor.data_ptr() + begin, _count(field, piece.n) * size)
