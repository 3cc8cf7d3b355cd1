"""What every bench shares: ours and the peers alternate in one process, medians, and the spread of ours against itself.

    bench = Bench("nf4_quantize")
    bench.compare("4096x4096 bf16", {"ours": f, "bitsandbytes": g}, moved_bytes=…, check=lambda: …)
    bench.finish()

A ratio within the A/A spread (the same function as two candidates, measured like any other two) says nothing. A row
whose check fails is not timed. Options of every bench: --threads N, --rounds N, --json [OUT] (bench/results/NAME.json).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout's package, also where it is not installed

from pyfastpeft._native import _C  # noqa: E402

MIN_SAMPLE_SECONDS = (
    2e-3  # shorter calls are repeated within a sample: a clock reading and a thread wake-up must not show
)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*args: str) -> str:
    result = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict:
    """Where and with what a result was measured."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD") + ("+dirty" if _git("status", "--porcelain", "-uno") else ""),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "isa": _C.cpu_isa(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "bitsandbytes", "peft")},
    }


def _sample(f: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        f()
    return (time.perf_counter() - start) / repeats


class Bench:
    """One bench file's rows: measured, printed as a table, and written as JSON with the environment."""

    def __init__(self, name: str, description: str = "") -> None:
        self.name = name
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--threads", type=int, default=torch.get_num_threads())
        parser.add_argument("--rounds", type=int, default=21, help="samples of each candidate")
        default = ROOT / "bench" / "results" / f"{name}.json"
        parser.add_argument(
            "--json", type=Path, nargs="?", const=default, help=f"write results (default {default.name})"
        )
        self.options = parser.parse_args()
        torch.set_num_threads(self.options.threads)
        self.environment = environment()
        self.copy_bytes_per_second = self._copy_bandwidth()
        self.rows: list[dict] = []
        e = self.environment
        print(f"{name}: {e['cpu']}, {e['threads']} threads, {e['isa']}, torch {e['torch']}, commit {e['commit']}")
        print(f"copy: {self.copy_bytes_per_second / 1e9:.1f} GB/s read + write; load average {e['load_average']}")

    @staticmethod
    def _copy_bandwidth() -> float:
        """Bytes read and written per second by torch's copy of 256 MiB: beyond any cache."""
        source = torch.ones(64 << 20)
        target = torch.empty_like(source)
        target.copy_(source)
        return 2 * source.nbytes / statistics.median(_sample(lambda: target.copy_(source), 1) for _ in range(7))

    def compare(
        self,
        row: str,
        candidates: dict[str, Callable[[], object]],
        *,
        moved_bytes: int | None = None,
        check: Callable[[], None] | None = None,
    ) -> dict:
        """Times the candidates, the first being ours (and timed twice, for the spread); prints and keeps the row.

        moved_bytes   what the work must read and write at least: gives GB/s and the share of the copy bandwidth
        check         called first; raises where the results to be timed are wrong
        """
        if check is not None:
            check()
        first = next(iter(candidates))
        timed = {**candidates, f"{first} again": candidates[first]}
        repeats = {}
        for name, f in timed.items():
            f()
            repeats[name] = max(1, round(MIN_SAMPLE_SECONDS / max(_sample(f, 1), 1e-9)))
        samples: dict[str, list[float]] = {name: [] for name in timed}
        order = list(timed)
        for _ in range(self.options.rounds):
            for name in order:
                samples[name].append(_sample(timed[name], repeats[name]))
            order = order[1:] + order[:1]
        medians = {name: statistics.median(values) for name, values in samples.items()}
        ours = medians[first]
        result = {
            "row": row,
            "seconds": {name: medians[name] for name in candidates},
            "best_seconds": {name: min(samples[name]) for name in candidates},
            "speedup": {name: medians[name] / ours for name in candidates if name != first},
            "a_a_spread": abs(medians[f"{first} again"] / ours - 1),
            "rounds": self.options.rounds,
        }
        parts = [f"{name} {seconds * 1e3:.3f} ms" for name, seconds in result["seconds"].items()]
        parts += [f"{ratio:.2f}x {name}" for name, ratio in result["speedup"].items()]
        if moved_bytes is not None:
            result["bytes_per_second"] = moved_bytes / ours
            result["of_copy"] = result["bytes_per_second"] / self.copy_bytes_per_second
            parts.append(f"{result['bytes_per_second'] / 1e9:.1f} GB/s ({result['of_copy']:.0%} of copy)")
        print(f"  {row}: {', '.join(parts)}, A/A {result['a_a_spread']:.1%}", flush=True)
        self.rows.append(result)
        return result

    def finish(self) -> None:
        """Writes the JSON where asked to."""
        if self.options.json is None:
            return
        document = {
            "bench": self.name,
            "environment": self.environment,
            "copy_bytes_per_second": self.copy_bytes_per_second,
            "rows": self.rows,
        }
        self.options.json.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.options.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(document, indent=2) + "\n")
        temporary.replace(self.options.json)
        print(f"written to {self.options.json}")
