"""The progress of a run: one live line on a terminal, plain lines every few seconds elsewhere."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from pyfastpeft.finetune.checkpoint import TrainerState
from pyfastpeft.finetune.loop import Reporter, perplexity


class StepClock:
    """Recent speed: an exponential mean of the time and the tokens of a step (weight 0.1 for the newest)."""

    def __init__(self) -> None:
        self.seconds_per_step: float | None = None
        self.tokens_per_second: float | None = None
        self._last: tuple[float, int] | None = None

    def tick(self, row: dict[str, float]) -> None:
        now = time.monotonic()
        speed = row["tokens_per_second"]
        self.tokens_per_second = _blend(self.tokens_per_second, speed)
        if self._last is not None:
            self.seconds_per_step = _blend(self.seconds_per_step, now - self._last[0])
        self._last = (now, int(row["step"]))

    def left(self, steps: int) -> float | None:
        return None if self.seconds_per_step is None else self.seconds_per_step * steps


def _blend(mean: float | None, new: float) -> float:
    return new if mean is None else 0.9 * mean + 0.1 * new


class ProgressLine:
    """Shows a TrainingLoop's progress. `console` decides: a terminal gets the live line, anything else plain lines."""

    def __init__(self, console: Console, total: int, *, log_seconds: float = 10.0) -> None:
        self.console, self.total, self.log_seconds = console, total, log_seconds
        self.clock = StepClock()
        self._last_line = -1e9
        self._heldout: float | None = None
        self._live: Progress | None = None
        if console.is_terminal:
            self._live = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=max(4, min(40, console.width - 88))),
                _StatusColumn(),
                console=console,
                refresh_per_second=4,
            )
            self._task = self._live.add_task("training", total=total, status="starting")

    def __enter__(self) -> ProgressLine:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def reporter(self) -> Reporter:
        return Reporter(step=self.step, evaluation=self.evaluation, checkpoint=self.checkpoint)

    def step(self, state: TrainerState, row: dict[str, float]) -> None:
        self.clock.tick(row)
        left = self.clock.left(self.total - state.step)
        parts = [
            f"loss {row['train_loss']:.4f}",
            *([f"held out {self._heldout:.4f}"] if self._heldout is not None and self.console.width >= 100 else []),
            f"{self.clock.tokens_per_second:,.0f} tokens/s",
            *([f"peak {row['peak_memory_mib'] / 1024:.2f} GiB"] if row["peak_memory_mib"] else []),
            f"{duration(left)} left" if left is not None else "",
        ]
        status = "  ".join(part for part in parts if part)
        if self._live is not None:
            self._live.update(self._task, completed=state.step, status=status)
        elif time.monotonic() - self._last_line >= self.log_seconds or state.step == self.total:
            self._last_line = time.monotonic()
            self._print(f"step {state.step}/{self.total}  {status}")

    def evaluation(self, state: TrainerState, loss: float) -> None:
        self._heldout = loss
        self._print(f"step {state.step}/{self.total}  held out: loss {loss:.4f}, perplexity {perplexity(loss):.3f}")

    def checkpoint(self, state: TrainerState, path: Path) -> None:
        if self._live is None:
            self._print(f"step {state.step}/{self.total}  checkpoint {path}")

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class _StatusColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("status", "")), no_wrap=True, overflow="ellipsis")


def duration(seconds: float) -> str:
    """1:05:09, 4:07 or 0:03."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def silent() -> Reporter:
    """A reporter that says nothing."""
    return Reporter(step=lambda *_: None, evaluation=lambda *_: None, checkpoint=lambda *_: None)
