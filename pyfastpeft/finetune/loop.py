"""The training loop: batches, forward, backward, clipping, optimizer step, evaluation, checkpoints, interruption."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from pyfastpeft.finetune.checkpoint import TrainerState, save_checkpoint
from pyfastpeft.finetune.config import FinetuneConfig
from pyfastpeft.finetune.data import IGNORED, BatchOrder, Sequences, step_seed
from pyfastpeft.finetune.errors import NonFiniteLossError
from pyfastpeft.finetune.methods import Restarts
from pyfastpeft.finetune.metrics import MetricsLog, peak_memory
from pyfastpeft.finetune.model import trainable_parameters
from pyfastpeft.finetune.schedule import learning_rate_at

SMALLEST_LOSS_SCALE = 2.0**-10  # float16: a gradient that overflows below this scale is no matter of scaling


class StopRequest:
    """Set by Ctrl-C or SIGTERM: the loop then saves a checkpoint and returns. A second Ctrl-C stops at once.

    Wrappers such as `timeout` and `make` may pass the same signal on twice, so one that follows within a second, or a
    second SIGTERM, is the first one again.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handles the signals inside the block (in the main thread; elsewhere Python allows no handlers)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > 1.0:
            raise KeyboardInterrupt

    @property
    def requested(self) -> bool:
        return self.signal is not None


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Σ −log p(label) over the labels that are not masked, in fp32 (scalar); logits [B, T, V], labels [B, T]."""
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _of_the_text(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The logits without those of virtual tokens, which come first."""
    return logits[:, logits.shape[1] - labels.shape[1] :]


@torch.no_grad()
def mean_loss(
    model: torch.nn.Module,
    sequences: Sequences,
    *,
    batch_size: int,
    pad: int,
    device: torch.device,
    stop: StopRequest | None = None,
) -> float | None:
    """Mean −log p per target token (nats) over all sequences, without dropout; None where a stop was requested."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for begin in range(0, len(sequences), batch_size):
            if stop is not None and stop.requested:
                return None
            batch = sequences.batch(list(range(begin, min(begin + batch_size, len(sequences)))), pad)
            labels = batch.pop("labels").to(device)
            logits = model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False).logits
            total += summed_loss(_of_the_text(logits, labels), labels).item()
            count += int((labels != IGNORED).sum())
    finally:
        model.train(was_training)
    return total / count


@dataclass
class Reporter:
    """Where the loop reports to; every field is called in the loop's thread."""

    step: Callable[[TrainerState, dict[str, float]], None]
    evaluation: Callable[[TrainerState, float], None]
    checkpoint: Callable[[TrainerState, Path], None]


class TrainingLoop:
    """Trains `model` from `state` to the end of `order`.

    Step s is a function of the weights, the optimizer's state and s: the batch, the dropout masks and the learning rate
    follow from (seed, s). A run that was stopped and resumed is therefore the same run, bit for bit on one machine.
    Gradients of the micro-batches are those of the mean over all target tokens of the step, however they are spread.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: FinetuneConfig,
        *,
        output: Path,
        train: Sequences,
        heldout: Sequences | None,
        order: BatchOrder,
        optimizer: torch.optim.Optimizer,
        state: TrainerState,
        metrics: MetricsLog,
        save_adapter: Callable[[str], Any],
        report: Reporter,
        device: torch.device,
        pad: int,
        loss_scaling: bool,
    ) -> None:
        self.model, self.config, self.output, self.train, self.heldout = model, config, output, train, heldout
        self.order, self.optimizer, self.state, self.metrics = order, optimizer, state, metrics
        self.save_adapter, self.report, self.device, self.pad = save_adapter, report, device, pad
        self.parameters = trainable_parameters(model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=loss_scaling)
        self.total = order.steps
        self.warmup = (
            config.warmup_steps if config.warmup_steps is not None else round(config.warmup_ratio * self.total)
        )
        self.restarts = Restarts(config, self.total, self.warmup)
        self.eval_every = _interval(config.eval_every, self.total)
        self.save_every = _interval(config.save_every, self.total)
        self.losses: list[float] = []
        self.eval_losses: list[tuple[int, float]] = []
        self.last_checkpoint: Path | None = None
        self.stop = StopRequest()

    def run(self) -> bool:
        """Trains; True where the end was reached, False where a stop was requested (a checkpoint is then written)."""
        clock = time.monotonic() - self.state.seconds
        resumed_at = self.state.step
        self.model.train()
        with self.stop.listening(), torch.random.fork_rng(devices=_cuda_devices(self.device)):
            while True:
                done, last = self.state.step, self.state.step == self.total
                evaluate = done == 0 or last or (self.eval_every and done % self.eval_every == 0)
                if evaluate and self.state.evaluated != done and not self._evaluate(clock):
                    return self._stopped()
                if last or (self.save_every and done and done % self.save_every == 0 and done != resumed_at):
                    self.save()
                if last:
                    return True
                if self.stop.requested or not self._step(clock):
                    return self._stopped()

    def _step(self, clock: float) -> bool:
        """One optimizer step; False, with nothing changed, where a stop was requested on the way."""
        config, step, begun = self.config, self.state.step, time.monotonic()
        rate = self.restarts.learning_rate(step, config.learning_rate)
        if rate is None:
            rate = learning_rate_at(
                step,
                peak=config.learning_rate,
                total=self.total,
                warmup=self.warmup,
                schedule=config.schedule,
                min_ratio=config.min_lr_ratio,
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(step_seed(config.seed, step, "dropout"))
        indices = self.order.indices(step)
        batches = [
            self.train.batch(indices[i : i + config.batch_size], self.pad)
            for i in range(0, len(indices), config.batch_size)
        ]
        targets = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        tokens = sum(
            int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["labels"].numel()
            for batch in batches
        )
        total_loss = torch.zeros((), device=self.device)
        penalty = self.model.base_model.penalty()
        for batch in batches:
            if self.stop.requested:
                self.optimizer.zero_grad(set_to_none=True)
                return False
            labels = batch.pop("labels").to(self.device)
            logits = self.model(
                **{name: value.to(self.device) for name, value in batch.items()}, use_cache=False
            ).logits
            loss = summed_loss(_of_the_text(logits, labels), labels) / targets
            total_loss += loss.detach()
            if penalty is not None:  # once a step, with the first of its batches; no part of the loss that is shown
                loss, penalty = loss + penalty, None
            self.scaler.scale(loss).backward()
        value = total_loss.item()
        if not math.isfinite(value):
            raise self._not_finite("loss", value)
        norm = self._update()
        self.restarts.after_step(step + 1, self.model, self.optimizer)
        self.state.step, self.state.tokens = step + 1, self.state.tokens + tokens
        now = time.monotonic()
        self.state.seconds = now - clock
        self.losses.append(value)
        row = {
            "step": self.state.step,
            "epoch": self.order.epoch(self.state.step),
            "tokens": self.state.tokens,
            "train_loss": value,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_per_second": tokens / max(now - begun, 1e-9),
            "peak_memory_mib": peak_memory(self.device.type) / 2**20,
            "seconds": self.state.seconds,
        }
        self.metrics.add(**row)
        self.report.step(self.state, row)
        return True

    def _update(self) -> float:
        """Clips the gradients and moves the weights; returns the gradients' norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        limit = self.config.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise self._not_finite("gradient norm", norm)
        self.scaler.step(self.optimizer)  # with loss scaling a step whose gradients overflowed is skipped
        self.scaler.update()
        if not math.isfinite(norm):
            self.state.skipped_steps += 1
            if self.scaler.get_scale() < SMALLEST_LOSS_SCALE:
                raise self._not_finite("gradient norm", norm)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _not_finite(self, what: str, value: float) -> NonFiniteLossError:
        config = self.config
        before = f"the loss was {self.losses[-1]:.4g} one step before" if self.losses else "it is the first step"
        saved = self.last_checkpoint or "none yet"
        return NonFiniteLossError(
            f"step {self.state.step + 1}: the {what} is {value} ({before}); the step was not taken and nothing was "
            f"saved over the last checkpoint ({saved}). Try a lower --learning-rate (now {config.learning_rate:g}; "
            f"{config.learning_rate / 4:g}, say), a longer warm-up, or --dtype float32"
        )

    def _evaluate(self, clock: float) -> bool:
        """Evaluates on the held-out sequences, if there are any; False where a stop was requested meanwhile."""
        if self.heldout is None:
            return True
        loss = mean_loss(
            self.model,
            self.heldout,
            batch_size=self.config.batch_size,
            pad=self.pad,
            device=self.device,
            stop=self.stop,
        )
        if loss is None:
            return False
        self.state.seconds = time.monotonic() - clock
        self.state.evaluated = self.state.step
        self.eval_losses.append((self.state.step, loss))
        self.metrics.add(
            step=self.state.step, seconds=self.state.seconds, eval_loss=loss, eval_perplexity=perplexity(loss)
        )
        self.report.evaluation(self.state, loss)
        return True

    def _stopped(self) -> bool:
        self.save()
        return False

    def save(self) -> None:
        self.metrics.sync()
        self.last_checkpoint = save_checkpoint(
            self.output,
            self.state,
            save_adapter=self.save_adapter,
            optimizer=self.optimizer,
            names=list(self.parameters),
            scaler=self.scaler.state_dict() if self.scaler.is_enabled() else None,
            keep_last=self.config.keep_last,
        )
        self.report.checkpoint(self.state, self.last_checkpoint)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _interval(value: int | None, total: int) -> int:
    """Steps between two events: as given, or a tenth of the run; 0 = at the run's ends only."""
    return value if value is not None else max(1, round(total / 10))


def _cuda_devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
