"""The whole suite: its sections, what they print, and the document they write."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from .measure import PEERS, environment, limits, measure

# section → (module of this folder, what it measures); the order is that of a run
SECTIONS = {
    "quantise": ("bench_nf4_quantize", "4-bit quantisation, plain and double"),
    "dequantise": ("bench_nf4_dequantize", "4-bit dequantisation, plain and nested"),
    "matmul": ("bench_linear_4bit", "the 4-bit linear layer over tokens, forward and backward"),
    "lora": ("bench_linear_lora", "a LoRA layer, dense and 4-bit, forward and backward"),
    "mixed": ("bench_mixed_batch", "a batch whose samples have different LoRA adapters: decode, prefill, training"),
    "ia3": ("bench_ia3", "(IA)³ scaling, forward and backward"),
    "step": ("bench_training_step", "a whole training step of a Llama shape"),
    "methods": ("bench_methods", "every method beside its peer: parameters, file, memory and time of a step"),
    "optimizer": ("bench_adamw", "optimizer steps, 32- and 8-bit state"),
    "paged": ("bench_paged", "optimizer state beyond memory: a step against its budget, beside the disk alone"),
    "memory": ("bench_memory", "peak memory of a training step"),
    "scaling": ("bench_scaling", "how cost grows: tokens, widths, rank, block size, threads, depth"),
    "start": ("bench_start", "import time, and the time to build a wheel"),
}


class Suite:
    """Rows of one run. Sections call compare() and value(); the caller reads `document`."""

    def __init__(self, rounds: int = 21, quick: bool = False, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.rounds, self.quick = rounds, quick
        self.limits = limits()
        self.failures: list[str] = []
        self.document = {"environment": environment(), "quick": quick, "limits": self.limits, "rows": []}
        self._section = ""
        self._terminal = sys.stderr.isatty()
        missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
        self.document["absent_peers"] = missing
        e = self.document["environment"]
        print(f"{e['cpu']}, {e['threads']} threads, {e['isa']}; torch {e['torch']}; commit {e['commit']}")
        print(
            f"limits: copy {self.limits['copy_bytes_per_second'] / 1e9:.1f} GB/s, torch matmul bf16 "
            f"{self.limits['matmul_bfloat16_flops_per_second'] / 1e12:.2f} and fp32 "
            f"{self.limits['matmul_float32_flops_per_second'] / 1e12:.2f} TFLOP/s; load average {e['load_average']}"
        )
        for name in missing:
            print(f"{name} is not installed: its columns are missing (pip install {name})")

    def peer(self, name: str):
        """The peer's module, or None where it is not installed."""
        return None if name in self.document["absent_peers"] else importlib.import_module(name)

    def pick(self, full: Sequence, quick: Sequence) -> Sequence:
        return quick if self.quick else full

    def run(self, names: Sequence[str]) -> None:
        begin = time.perf_counter()
        for i, name in enumerate(names):
            module, what = SECTIONS[name]
            print(f"\n{name}: {what}", flush=True)
            self._section = name
            with self._progress(f"[{i + 1}/{len(names)}] {name}"):
                importlib.import_module(f".{module}", __package__).run(self)
        self.document["seconds"] = round(time.perf_counter() - begin, 1)

    @contextlib.contextmanager
    def _progress(self, text: str) -> Iterator[None]:
        """Names the section in the terminal's last line while nothing has been printed yet."""
        if self._terminal:
            print(f"\r{text} …", end="", file=sys.stderr, flush=True)
        yield

    def compare(
        self,
        row: str,
        candidates: dict[str, Callable[[], object] | None],
        *,
        moved_bytes: int | None = None,
        flops: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        check: Callable[[], None] | None = None,
        **facts,
    ) -> dict | None:
        """Times the candidates that are there, the first being ours; prints and keeps the row.

        moved_bytes, flops   what the work must do at the least: shares of the copy bandwidth, of the matmul rate
        check                called first; an AssertionError leaves the row untimed and the run red
        facts                kept beside the row (M=, N=, …)
        """
        if check is not None:
            try:
                check()
            except AssertionError as error:
                self.failures.append(f"{self._section}: {row}: {error}")
                print(f"  {row}: CHECK FAILED, not timed: {error}", flush=True)
                self.document["rows"].append({"section": self._section, "row": row, "failed": str(error), **facts})
                return None
        present = {name: f for name, f in candidates.items() if f is not None}
        result = {"section": self._section, "row": row, **facts, **measure(present, self.rounds, self.quick)}
        first = next(iter(present))
        ours = result["seconds"][first]
        if moved_bytes is not None:
            result["moved_bytes"] = moved_bytes
            result["of_copy"] = moved_bytes / ours / self.limits["copy_bytes_per_second"]
        if flops is not None:
            rate = self.limits[f"matmul_{str(dtype).removeprefix('torch.')}_flops_per_second"]
            result["flops"], result["of_matmul"] = flops, flops / ours / rate
        self.document["rows"].append(result)
        print("  " + line(result), flush=True)
        return result

    def value(self, row: str, values: dict[str, float | None], unit: str, **facts) -> dict:
        """A row of numbers that are not alternating times: bytes, seconds of a process, exponents."""
        result = {"section": self._section, "row": row, "values": values, "unit": unit, **facts}
        self.document["rows"].append(result)
        shown = ", ".join(f"{name} {'-' if v is None else f'{v:.4g}'}" for name, v in values.items())
        print(f"  {row}: {shown} {unit}", flush=True)
        return result


def line(result: dict) -> str:
    """A compared row as one line of text."""
    parts = [f"{name} {duration(seconds)}" for name, seconds in result["seconds"].items()]
    parts += [f"{ratio:.2f}x {name}" for name, ratio in result["speedup"].items()]
    if "of_copy" in result:
        parts.append(f"{result['of_copy']:.0%} of copy")
    if "of_matmul" in result:
        parts.append(f"{result['of_matmul']:.0%} of matmul")
    return f"{result['row']}: {', '.join(parts)}, A/A {result['a_a_spread']:.1%}"


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def write_json(document: dict, file: Path) -> None:
    """Through a temporary name, so that a run that is killed leaves the former results whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(document, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
