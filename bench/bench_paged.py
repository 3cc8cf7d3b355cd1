"""Optimizer state beyond memory: a step of PagedAdamW against its budget, beside AdamW with everything in memory and beside
the disk alone, moving the bytes that this budget must.

Count first. 32-bit state is 8 bytes a parameter, read and written at every step: 16 bytes move for each value whose state
is not in memory, against 28 bytes of memory traffic that a step costs anyway. The bound of a step is therefore
max(unpaged step, 2 · (state - budget) / disk); the disk's rate is measured here, by threads that read and write pages of
the same size past the page cache while the candidates alternate.
"""

import concurrent.futures
import fcntl
import mmap
import os
import tempfile

import torch

import pyfastpeft as pf
from pyfastpeft.paged_memory import page_size_for, spill_folder

STEPS = 2  # in a sample: what was read ahead while another candidate ran must not count as a gift
THREADS = 4


def run(suite) -> None:
    torch.manual_seed(0)
    folder = os.environ.get("PYFASTPEFT_BENCH_SPILL_DIR") or spill_folder(None)
    _in_memory(suite, "10,000 tensors of 256 values", [(256,)] * 10_000)
    values = suite.pick((96_000_000,), (24_000_000,))[0]
    shapes = [(values // 8,)] * 8
    _in_memory(suite, f"{values // 1_000_000} M values", shapes)
    curve = []
    for bits, state in ((32, 8 * values), (8, 2 * values + values // 32)):
        for part in suite.pick((1.25, 2, 4, 10), (4,)):
            seconds = _beyond_memory(suite, folder, shapes, bits, state, part)
            if bits == 32 and seconds is not None:
                curve.append({"share": 1 / part, **seconds})
    suite.value(
        "32-bit state, a step against the share of it that is in memory",
        {f"{point['share']:.2f}": point["paged"] for point in curve},
        "s",
        budget_curve=curve,  # report.plot draws it
        state_bytes=8 * values,
    )


def _in_memory(suite, row, shapes) -> None:
    """The budget suffices: paging must cost nothing."""
    builders = {
        "paged": lambda ps: pf.optim.PagedAdamW(ps, resident_bytes="8GiB"),
        "AdamW": pf.optim.AdamW,
        "torch fused": lambda ps: torch.optim.AdamW(ps, fused=True),
    }
    optimizers = {name: build(_parameters(shapes)) for name, build in builders.items()}
    moved = 28 * sum(torch.Size(s).numel() for s in shapes)
    suite.compare(f"{row}, all in memory", {n: o.step for n, o in optimizers.items()}, moved_bytes=moved, check=_check)


def _beyond_memory(suite, folder, shapes, bits, state, part) -> dict[str, float] | None:
    budget = int(state / part)
    params = _parameters(shapes)
    paged = pf.optim.PagedAdamW(params, state_bits=bits, resident_bytes=budget, spill_dir=folder)
    unpaged = pf.optim.AdamW(params, state_bits=bits)
    for optimizer in (unpaged, paged):
        optimizer.step()  # makes the states
    page = page_size_for(budget)
    disk = Disk(folder, page, pages=-(-(state - budget) // page))
    row = f"{bits}-bit state, {part}x the budget ({state / 1e6:.0f} MB)"
    before = paged.memory_report()
    result = suite.compare(
        row,
        {
            "paged": lambda: [paged.step() for _ in range(STEPS)],
            "disk alone": lambda: [disk.read_and_write() for _ in range(STEPS)],
            "AdamW in memory": lambda: [unpaged.step() for _ in range(STEPS)],
        },
        check=_check,
        state_bytes=state,
        budget_bytes=budget,
    )
    if result is None:
        return None
    after = paged.memory_report()
    seconds = {name: value / STEPS for name, value in result["seconds"].items()}
    bound = max(seconds["disk alone"], seconds["AdamW in memory"])
    steps = int(paged.state[params[0]]["step"].item()) - 1
    moved = sum(after[key] - before[key] for key in ("bytes_in", "bytes_out")) / steps
    found = {
        "step / bound": seconds["paged"] / bound,
        "disk GB/s": disk.bytes / seconds["disk alone"] / 1e9,
        "paged GB/s": moved / seconds["paged"] / 1e9,
        "moved / least": moved / disk.bytes,
    }
    suite.value(f"{row}, against max(disk, compute)", found, "", steps=steps)
    return seconds


class Disk:
    """The least that a step must move: `pages` pages read and as many written, by threads, past the page cache."""

    def __init__(self, folder: str, page: int, pages: int) -> None:
        self.page, self.pages, self.bytes = page, pages, 2 * page * pages
        self._file = tempfile.TemporaryFile(dir=folder)
        os.posix_fallocate(self._file.fileno(), 0, page * pages)
        # private memory in huge pages, as paged memory's own: in small ones a transfer is cut into many requests
        memory = mmap.mmap(-1, (THREADS + 1) * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.write(os.urandom(4096) * (len(memory) // 4096))
        self._buffers = [memoryview(memory)[i * page : (i + 1) * page] for i in range(THREADS)]
        self._direct()
        self._pool = concurrent.futures.ThreadPoolExecutor(THREADS)
        list(self._pool.map(self._work, range(THREADS)))

    def _direct(self) -> None:
        flags = fcntl.fcntl(self._file.fileno(), fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._file.fileno(), fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError:
            print("  (this folder's file system has no direct transfers: its page cache is measured)")

    def _work(self, number: int) -> None:
        buffer, file = self._buffers[number], self._file.fileno()
        for i in range(number, self.pages, THREADS):
            os.pwritev(file, [buffer], i * self.page)
            os.preadv(file, [buffer], (i + self.pages // 2) % self.pages * self.page)

    def read_and_write(self) -> None:
        list(self._pool.map(self._work, range(THREADS)))


def _parameters(shapes):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def _check() -> None:
    """Three steps of paged and unpaged state end in the same bits."""
    for bits in (32, 8):
        ends = []
        for build in (
            lambda ps, bits=bits: pf.optim.AdamW(ps, state_bits=bits),
            lambda ps, bits=bits: pf.optim.PagedAdamW(ps, state_bits=bits, resident_bytes=131072),
        ):
            params = _parameters([(200_000,), (30, 7)])
            optimizer = build(params)
            for _ in range(3):
                optimizer.step()
            ends.append(torch.cat([p.detach().flatten() for p in params]))
        assert torch.equal(*ends), f"paged {bits}-bit state ends in other bits than unpaged"
