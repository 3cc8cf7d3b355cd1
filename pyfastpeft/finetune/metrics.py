"""metrics.csv and loss.png: what a run measured, as numbers and as a picture."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from pyfastpeft.finetune.errors import OutputError
from pyfastpeft.finetune.files import reason, write_bytes

COLUMNS = (
    "step",
    "epoch",
    "tokens",
    "train_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "peak_memory_mib",
    "seconds",
    "eval_loss",
    "eval_perplexity",
)
INTEGERS = ("step", "tokens")


class MetricsLog:
    """The rows of a run, in memory and in metrics.csv: one for each optimizer step and one for each evaluation.

    `step` counts the optimizer steps done, so row 0 is the evaluation before training. Floats are written so that they
    read back to the same value. A resumed run keeps the rows up to its checkpoint's step.
    """

    def __init__(self, path: Path, upto: int | None = None) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        if upto is not None and path.is_file():
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                rows = (_numbers(row) for row in csv.DictReader(file))
                self.rows = [row for row in rows if row and row["step"] <= upto]
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        try:
            write_bytes(path, buffer.getvalue().encode())
            self._file = path.open("a", newline="", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path} could not be written: {reason(error)}") from error

    def add(self, **row: float) -> None:
        self.rows.append(row)
        try:
            csv.DictWriter(self._file, COLUMNS, lineterminator="\n").writerow(row)
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self.path} could not be written: {reason(error)}") from error

    def sync(self) -> None:
        """The rows are on the disk: a checkpoint relies on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _numbers(row: dict[str, Any]) -> dict[str, float] | None:
    """A row of the file as numbers, empty cells left out; None for a line that a killed process left torn."""
    try:
        values = {name: (int if name in INTEGERS else float)(row[name]) for name in COLUMNS if row[name]}
    except (KeyError, TypeError, ValueError):
        return None
    if "step" not in values or None in row:
        return None
    return values


def draw_losses(path: Path, rows: list[dict[str, float]], title: str) -> None:
    """The loss curve as a PNG: training loss of each step and its running mean, held-out loss where there is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]
    heldout = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        smooth = _running_mean(losses, window=max(1, len(losses) // 20))
        axes.plot(steps, losses, color="#1f77b4", alpha=0.3, linewidth=1, label="training, each step")
        axes.plot(steps, smooth, color="#1f77b4", linewidth=1.8, label="training, running mean")
    if heldout:
        axes.plot(
            *zip(*heldout, strict=True), color="#d62728", marker="o", markersize=4, linewidth=1.8, label="held out"
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, fontsize=11)
    axes.grid(True, alpha=0.3)
    if train or heldout:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    try:
        write_bytes(path, buffer.getvalue())
    except OSError as error:
        raise OutputError(f"{path} could not be written: {reason(error)}") from error


def _running_mean(values: tuple[float, ...], window: int) -> list[float]:
    """Mean of the last `window` values (fewer at the beginning)."""
    result, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        result.append(total / min(i + 1, window))
    return result


def peak_memory(device_type: str) -> int:
    """Bytes: the most that torch held on the GPU, or that this process held of main memory, so far."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
