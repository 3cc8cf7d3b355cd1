"""Memory in pages of which a budget's worth is in RAM and the rest in a spill file. The moving is csrc/paged_memory."""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from pyfastpeft._native import _C

SpillError = _C.SpillError

ALIGNMENT = 4096
SMALLEST_PAGE, LARGEST_PAGE = 64 << 10, 8 << 20
FEWEST_PAGES = 2  # in memory: the one in use, and one on its way
_SMALLEST_MAPPED = 1 << 20
_UNITS = {"": 1, "B": 1}
for _i, _letter in enumerate("KMGT", 1):
    _UNITS |= {_letter: 1024**_i, f"{_letter}B": 1000**_i, f"{_letter}IB": 1024**_i}


def parse_bytes(text: int | float | str) -> int:
    """A number of bytes from a number or a text: "512MB" (10⁶), "1.5GiB" or "1.5G" (2³⁰), "65536".

    Raises ValueError for anything else, or less than 1.
    """
    if isinstance(text, str):
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
        unit = _UNITS.get(found.group(2).upper()) if found else None
        value = float(found.group(1)) * unit if unit is not None else 0
    else:
        value = 0 if isinstance(text, bool) else text
    if not 1 <= value < 2**62:
        raise ValueError(f"a size of {text!r}, expected a number of bytes of 1 or more, such as 2GB, 512MiB or 1.5G")
    return int(value)


def available_memory() -> int:
    """Bytes the system would still give to this process, the limit of its control group included."""
    free = []
    meminfo = _read("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    free.append(int(found.group(1)) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        values = [_read(limit).strip(), _read(used).strip()]
        if all(v.isdigit() for v in values):
            free.append(max(int(values[0]) - int(values[1]), 0))
    return min(free)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""


def spill_folder(folder: str | os.PathLike | None) -> str:
    """The folder for a spill file, checked: as given; or $TMPDIR; or /var/tmp, which is on a disk where /tmp may not be.

    Raises SpillError where nothing can be written there; warns where its files are in memory (tmpfs).
    """
    chosen = folder
    if chosen is None:
        usual = os.environ.get("TMPDIR") or "/var/tmp"
        chosen = usual if os.access(usual, os.W_OK | os.X_OK) else tempfile.gettempdir()
    chosen = os.path.abspath(os.fspath(chosen))
    for code, text, bad in (
        (2, "there is no such folder; make it first", not os.path.exists(chosen)),
        (20, "it is no folder", not os.path.isdir(chosen)),
        (13, "no permission to write there", not os.access(chosen, os.W_OK | os.X_OK)),
    ):
        if bad:
            raise SpillError(code, f"paged memory: spill_dir is {chosen}: {text}")
    if _C.is_in_memory(chosen):
        warnings.warn(
            f"paged memory: spill_dir {chosen} is a file system in memory: what is spilled there stays in RAM; "
            "name a folder on a disk",
            RuntimeWarning,
            stacklevel=3,
        )
    return chosen


def page_size_for(resident_bytes: int) -> int:
    """Large pages keep a disk at its sequential rate; a small budget still has sixteen, to read ahead and write behind."""
    return min(max(1 << max(resident_bytes // 16, 1).bit_length() - 1, SMALLEST_PAGE), LARGEST_PAGE)


class PagedMemory:
    """Pages of bytes under a budget; every page reads as zeros until something is written to it.

    resident_bytes  the budget; rounded down to whole pages, and up to two of them (`budget_bytes` says to what)
    spill_dir       folder of the spill file, which never has a name and whose space is taken before it is needed;
                    None: $TMPDIR or /var/tmp. No file is made while the budget suffices
    page_bytes      a multiple of 4096; None: chosen by the budget, 64 KiB to 8 MiB
    look_ahead      pages read before they are asked for; None: chosen by the budget
    direct_io       past the system's page cache where the file system can, so that nothing is in memory twice

    acquire(page) returns the address of a page and keeps it there until release(page, dirty). Threads may share one;
    a forked child may not use it (RuntimeError). SpillError (an OSError with its errno) where the disk fails: contents
    are then what they were, and the call can be made again.
    """

    def __init__(
        self,
        resident_bytes: int,
        spill_dir: str | os.PathLike | None = None,
        *,
        page_bytes: int | None = None,
        look_ahead: int | None = None,
        io_threads: int = 4,
        direct_io: bool = True,
    ) -> None:
        self.requested_bytes = parse_bytes(resident_bytes)
        self.page_bytes = page_size_for(self.requested_bytes) if page_bytes is None else page_bytes
        frames = max(self.requested_bytes // max(self.page_bytes, 1), FEWEST_PAGES)
        self.budget_bytes = frames * self.page_bytes
        self.spill_dir = spill_folder(spill_dir)
        if look_ahead is None:
            look_ahead = min(max(frames // 4, 1), 8)
        self._memory = _C.PagedMemory(
            page_bytes=self.page_bytes, resident_bytes=self.budget_bytes, spill_folder=self.spill_dir,
            look_ahead=look_ahead, io_threads=io_threads, direct_io=direct_io,
        )  # fmt: skip
        # pages that may be held together while others go on moving
        self.at_once = max(min(frames // 4, 8), 1)
        self.minimum_bytes = FEWEST_PAGES * self.page_bytes
        self._frames = frames
        for name in (
            "acquire",
            "try_acquire",
            "release",
            "discard",
            "prefetch",
            "read",
            "write",
            "stats",
            "resident",
            "events",
            "frames",
        ):
            setattr(self, name, getattr(self._memory, name))
        self._order: Sequence[int] | None = None

    def add_pages(self, count: int) -> range:
        """The numbers of `count` more pages. SpillError, and nothing has changed, where the disk has no room."""
        first = self._memory.add_pages(count)
        return range(first, first + count)

    def set_order(self, pages: Sequence[int]) -> None:
        """The pages in the order in which they will be used, again and again; it decides which stay in memory."""
        if self._order is not pages:
            self._memory.set_order(list(pages))
            self._order = pages

    @property
    def everything_fits(self) -> bool:
        return self.stats()["pages"] <= self._frames

    def locations(self) -> list[str]:
        """Of each page: "resident" or "spilled"."""
        return ["resident" if there else "spilled" for there in self.resident()]

    def record_events(self, on: bool) -> None:
        """Begins (forgetting the earlier ones) or ends to note every read, write and wait."""
        self._memory.record_events(on)


def mapped_tensor(folder: str, n: int, dtype: torch.dtype) -> torch.Tensor:
    """torch.empty(n, dtype=dtype), in a file without a name in `folder` where it is large; SpillError without room."""
    nbytes = n * dtype.itemsize
    if nbytes < _SMALLEST_MAPPED:
        return torch.empty(n, dtype=dtype)
    try:
        with tempfile.TemporaryFile(prefix=".pyfastpeft-spill-", dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            return torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=n, dtype=dtype)
    except OSError as error:
        raise SpillError(
            error.errno,
            f"paged memory: no room for a copy of {nbytes / 2**20:.1f} MiB in {folder}: {error.strerror}; free some "
            "space there, or choose another folder with spill_dir=",
        ) from error


def write_chrome_trace(
    path: str | os.PathLike,
    events: Iterable[tuple[str, int, int, int, int]],
    computed: Iterable[tuple[int, int, int, int]],
) -> None:
    """A file for chrome://tracing or ui.perfetto.dev: one row for the computation and its waits, one for each I/O thread.

    events    (kind, thread, page, begin, end) of PagedMemory.events(), in ns
    computed  (first page, how many, begin, end)
    """
    spans = [(kind, thread + 1, page, 1, begin, end) for kind, thread, page, begin, end in events]
    spans += [("compute", 0, page, count, begin, end) for page, count, begin, end in computed]
    start = min((span[4] for span in spans), default=0)
    pid = os.getpid()
    rows: list[dict[str, Any]] = [
        {
            "name": "thread_name", "ph": "M", "pid": pid, "tid": tid,
            "args": {"name": "step" if tid == 0 else f"pages, thread {tid}"},
        }
        for tid in sorted({span[1] for span in spans} | {0})
    ]  # fmt: skip
    for kind, tid, page, count, begin, end in sorted(spans, key=lambda span: span[4]):
        rows.append({
            "name": kind, "cat": "paging", "ph": "X", "pid": pid, "tid": tid, "ts": (begin - start) / 1e3,
            "dur": (end - begin) / 1e3, "args": {"page": page, "pages": count},
        })  # fmt: skip
    Path(path).write_text(json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}), encoding="utf-8")
