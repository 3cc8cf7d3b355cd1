"""What every GPU bench shares: rotated inputs, graph replay, alternating rounds, and the machine's own limits.

    bench = GpuBench("nf4_dequantize")
    bench.compare("4096x14336 nested", {"ours": [f0, f1, …], "bitsandbytes": [g0, g1, …]}, moved_bytes=…, check=…)
    bench.finish()

A candidate is a list of calls that do the same work on different data, together larger than the L2: a call timed over
one weight alone would be served from the cache. All of a list is captured in one CUDA graph and the graph's replay is
timed with events, so that what is compared is the GPU's work; a candidate that can't be captured (it synchronises) is
timed eagerly and its row says so. `eager` asks for that on purpose: what a training loop pays, launches included.

Options of every bench: --rounds N, --json FILE. Nothing runs without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pyfastpeft import _bench

_bench.load()
from pyfastpeft.bench.measure import environment  # noqa: E402

MIN_SAMPLE_SECONDS = 2e-3


def rotations(bytes_each: int, at_least: int = 8) -> int:
    """How many copies of an input it takes to be three times the L2."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(at_least, -(-3 * l2 // max(1, bytes_each)))


@contextlib.contextmanager
def peer(name: str):
    """A peer that is not installed, or fails, is named and left out; ours is never excused this way."""
    try:
        yield
    except ImportError as error:
        print(f"  {name} is left out: {error}")


class _Timer:
    """Seconds per call of a candidate."""

    def __init__(self, calls: Sequence[Callable[[], object]], eager: bool) -> None:
        self.calls, self.graph = list(calls), None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in self.calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.mode = "eager"
        if not eager:
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for call in self.calls:
                        call()
                self.graph, self.mode = graph, "graph"
            except RuntimeError as error:
                torch.cuda.synchronize()
                self.mode = f"eager: not capturable ({str(error).splitlines()[0][:80]})"
        self.repeats = 1
        self.repeats = max(1, round(MIN_SAMPLE_SECONDS / max(self.sample() * len(self.calls), 1e-7)))

    def sample(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self.repeats):
            if self.graph is not None:
                self.graph.replay()
            else:
                for call in self.calls:
                    call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / self.repeats / len(self.calls)


class GpuBench:
    """One bench file's rows: measured, printed as a table, and written as JSON with the environment and the limits."""

    def __init__(self, name: str, description: str | None = None) -> None:
        self.name = name
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--rounds", type=int, default=21, help="samples of each candidate")
        parser.add_argument("--json", type=Path, help="write results there")
        self.options = parser.parse_args()
        if not torch.cuda.is_available():
            raise SystemExit(f"{name}: needs a CUDA device, and torch {torch.__version__} finds none")
        gpu = torch.cuda.get_device_properties(0)
        self.environment = {
            **environment(),
            "gpu": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "cuda": torch.version.cuda,
        }
        self.copy_bytes_per_second = self._copy_bandwidth()
        self.matmul_flops_per_second = self._matmul_rate()
        self.rows: list[dict] = []
        e = self.environment
        print(f"{name}: {e['gpu']}, CUDA {e['cuda']}, torch {e['torch']}, commit {e['commit']}")
        print(
            f"copy {self.copy_bytes_per_second / 1e12:.2f} TB/s read + write, "
            f"bf16 matmul {self.matmul_flops_per_second / 1e12:.0f} TFLOP/s"
        )

    @staticmethod
    def _copy_bandwidth() -> float:
        source = torch.randn(1 << 30, device="cuda")  # 4 GiB
        target = torch.empty_like(source)
        timer = _Timer([lambda: target.copy_(source)], eager=False)
        return 2 * source.nbytes / statistics.median(timer.sample() for _ in range(9))

    @staticmethod
    def _matmul_rate() -> float:
        n = 8192
        a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        timer = _Timer([lambda: torch.mm(a, b, out=out)], eager=False)
        return 2 * n**3 / statistics.median(timer.sample() for _ in range(9))

    def compare(
        self,
        row: str,
        candidates: dict[str, Sequence[Callable[[], object]]],
        *,
        moved_bytes: int | None = None,
        flops: int | None = None,
        floor_seconds: float | None = None,
        check: Callable[[], None] | None = None,
        eager: bool = False,
    ) -> dict:
        """Times the candidates, the first being ours (and timed twice, for the spread); prints and keeps the row.

        moved_bytes, flops   of one call, at the least: give the shares of the copy bandwidth and of the matmul rate
        floor_seconds        a model's prediction for one call, where the work is neither one nor the other alone
        check                called first; raises where the results to be timed are wrong
        """
        if check is not None:
            check()
        first = next(iter(candidates))
        timers = {name: _Timer(calls, eager) for name, calls in candidates.items()}
        timers[f"{first} again"] = _Timer(candidates[first], eager)
        samples: dict[str, list[float]] = {name: [] for name in timers}
        order = list(timers)
        for _ in range(self.options.rounds):
            for name in order:
                samples[name].append(timers[name].sample())
            order = order[1:] + order[:1]
        medians = {name: statistics.median(values) for name, values in samples.items()}
        ours = medians[first]
        result = {
            "row": row,
            "seconds": {name: medians[name] for name in candidates},
            "mode": {name: timers[name].mode for name in candidates},
            "speedup": {name: medians[name] / ours for name in candidates if name != first},
            "a_a_spread": abs(medians[f"{first} again"] / ours - 1),
            "rounds": self.options.rounds,
        }
        parts = [f"{name} {seconds * 1e6:.1f} us" for name, seconds in result["seconds"].items()]
        parts += [f"{ratio:.2f}x {name}" for name, ratio in result["speedup"].items()]
        if moved_bytes is not None:
            result["of_copy"] = moved_bytes / ours / self.copy_bytes_per_second
            parts.append(f"{result['of_copy']:.0%} of copy")
        if flops is not None:
            result["of_matmul"] = flops / ours / self.matmul_flops_per_second
            parts.append(f"{result['of_matmul']:.0%} of matmul")
        if floor_seconds is not None:
            result["of_floor"] = floor_seconds / ours
            parts.append(f"{result['of_floor']:.0%} of the model")
        parts += [f"{name} {timers[name].mode}" for name in candidates if timers[name].mode not in ("graph", "eager")]
        print(f"  {row}: {', '.join(parts)}, A/A {result['a_a_spread']:.1%}", flush=True)
        self.rows.append(result)
        return result

    def finish(self) -> None:
        if self.options.json is None:
            return
        document = {
            "bench": self.name,
            "environment": self.environment,
            "copy_bytes_per_second": self.copy_bytes_per_second,
            "matmul_flops_per_second": self.matmul_flops_per_second,
            "rows": self.rows,
        }
        self.options.json.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.options.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(document, indent=2) + "\n")
        temporary.replace(self.options.json)


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double() - truth.double()).norm() / truth.double().norm())


__all__ = ["GpuBench", "peer", "relative_error", "rotations"]
