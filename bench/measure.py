"""How a row is measured: candidates alternate in one process, medians, and the spread of ours against itself.

    suite.compare("M 16 bfloat16", {"ours": f, "bitsandbytes": g, "dense": h}, flops=…, moved_bytes=…, check=…)

The first candidate is ours and is timed twice, as if it were two: a ratio within that A/A spread says nothing. A row
whose check fails is not timed. A peer that is not installed is None and named once.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pyfastpeft._native import _C

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("bitsandbytes", "peft", "torchao")
# what may hold ours, torch or oneDNN down to an instruction set
FORCED = ("PYFASTPEFT_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
# shorter calls are repeated within a sample: a clock reading and a thread wake-up must not show
MIN_SAMPLE_SECONDS = 2e-3
SLOW, SLOW_ROUNDS = 8, 5  # a candidate more than 8 times as slow as ours is timed after the others, 5 times
QUICK_ROW_SECONDS = 1.0  # --quick: fewer rounds where a row would take longer, but never fewer than 3


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*args: str) -> str:
    if not (ROOT / ".git").exists():
        return ""  # installed, perhaps inside someone else's repository
    result = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict:
    """Where and with what a result was measured."""
    commit = _git("rev-parse", "--short=12", "HEAD") or str(_C.build_info().get("commit", ""))
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit + ("+dirty" if _git("status", "--porcelain", "-uno") else ""),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "isa": _C.cpu_isa(),
        "threads": torch.get_num_threads(),
        "forced": {name: os.environ[name] for name in FORCED if name in os.environ},
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", *PEERS)},
    }


def sample(f: Callable[[], object], repeats: int = 1) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(repeats):
        f()
    return (time.perf_counter() - start) / repeats


def limits() -> dict[str, float]:
    """What this machine can do: bytes read + written per second, and torch's matmul rate, each the best of several.

    A copy whose stores do not bypass the cache also reads what it overwrites; an update in place does not. The better counts.
    """
    source = torch.ones(64 << 20)
    target = torch.ones_like(source)
    copy = min(sample(f) for _ in range(8) for f in (lambda: target.copy_(source), lambda: target.neg_()))
    found = {"copy_bytes_per_second": 2 * source.nbytes / copy}
    n = 2048
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        out = torch.empty_like(a)
        seconds = min(sample(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) for _ in range(6))
        found[f"matmul_{str(dtype).removeprefix('torch.')}_flops_per_second"] = 2 * n**3 / seconds
    return found


def measure(candidates: dict[str, Callable[[], object]], rounds: int, quick: bool) -> dict:
    """Medians, best samples and ratios; the first candidate is ours.

    Candidates more than SLOW times as slow as ours do not take turns with the others: they would leave them cold caches and
    sleeping threads, and their own ratio needs no such care.
    """
    first = next(iter(candidates))
    timed = {**candidates, f"{first} again": candidates[first]}
    once = {}
    for name, f in timed.items():
        f()
        once[name] = sample(f)
    repeats = {name: max(1, round(MIN_SAMPLE_SECONDS / max(seconds, 1e-9))) for name, seconds in once.items()}
    slow = [name for name in timed if once[name] > SLOW * min(once[first], once[f"{first} again"])]
    cycle = sum(once[name] * repeats[name] for name in timed)
    if quick:
        rounds = max(3, min(rounds, int(QUICK_ROW_SECONDS / cycle)))
    samples: dict[str, list[float]] = {name: [] for name in timed}
    order, shuffle = [name for name in timed if name not in slow], random.Random(0)
    for _ in range(rounds):
        for name in order:
            samples[name].append(sample(timed[name], repeats[name]))
        shuffle.shuffle(order)  # nobody always follows the same neighbour, and finds the cache as that one left it
    for name in slow:
        for _ in range(min(rounds, SLOW_ROUNDS)):
            samples[name].append(sample(timed[name], repeats[name]))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    ours = medians[first]
    return {
        "seconds": {name: medians[name] for name in candidates},
        "best_seconds": {name: min(samples[name]) for name in candidates},
        "speedup": {name: medians[name] / ours for name in candidates if name != first},
        "a_a_spread": abs(medians[f"{first} again"] / ours - 1),
        "rounds": rounds,
    }
