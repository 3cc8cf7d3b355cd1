"""ReLoRA in a training: one call after each optimizer step, or one callback for transformers' Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from pyfastpeft.methods.relora.merging import merge_and_reinit
from pyfastpeft.methods.relora.optimizer_state import MODES, reset_optimizer_state
from pyfastpeft.methods.relora.schedule import JaggedCosine, JaggedCosineLR


class ReLora:
    """Restarts LoRA every `restart_every` steps. After each optimizer.step(): relora.step().

    model, optimizer       a PeftModel with LoRA adapters, and what trains them
    restart_every          R, in optimizer steps; no restart at the very end
    total_steps            given: the jagged cosine schedule is made (`scheduler`) and stepped too; None: the learning rate
                           is the caller's affair
    warmup_steps, restart_warmup_steps, min_lr_ratio   of the schedule
    reset, fraction        what becomes of the optimizer's state: "reset", "random" or "magnitude", and how much of it
    errors                 after a restart: {path: relative error of the merge}, see merge_and_reinit

    state_dict() and load_state_dict() carry the step count and the scheduler.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        restart_every: int,
        *,
        total_steps: int | None = None,
        warmup_steps: int = 0,
        restart_warmup_steps: int = 0,
        min_lr_ratio: float = 0.1,
        reset: str = "magnitude",
        fraction: float = 0.9,
    ) -> None:
        _check(restart_every, reset, fraction)
        self.model, self.optimizer, self.restart_every, self.total_steps = model, optimizer, restart_every, total_steps
        self.reset, self.fraction = reset, fraction
        self.steps = self.restarts = 0
        self.errors: dict[str, float] = {}
        self.scheduler = None
        if total_steps is not None:
            self.scheduler = JaggedCosineLR(
                optimizer, total_steps, restart_every, warmup_steps, restart_warmup_steps, min_lr_ratio
            )

    def step(self) -> bool:
        """Counts an optimizer step; at a restart merges, draws the adapters anew and thins out the optimizer's state.
        Returns whether it was one."""
        self.steps += 1
        if self.scheduler is not None:
            self.scheduler.step()
        if self.steps % self.restart_every or self.steps == self.total_steps:
            return False
        self.errors = restart(self.model, self.optimizer, self.reset, self.fraction)
        self.restarts += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        return {"steps": self.steps, "restarts": self.restarts, "scheduler": scheduler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.restarts = state["steps"], state["restarts"]
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])


def restart(model: nn.Module, optimizer: torch.optim.Optimizer, reset: str, fraction: float) -> dict[str, float]:
    """merge_and_reinit() of the active adapters and reset_optimizer_state() of their A and B."""
    errors = merge_and_reinit(model)
    adapted = getattr(model, "base_model", model)
    parameters = [
        parameter
        for path, layer in adapted.layers()
        if path in errors
        for name in layer.active
        for parameter in layer.adapter_parameters(name)
    ]
    reset_optimizer_state(optimizer, parameters, reset, fraction)
    return errors


def relora_callback(
    restart_every: int,
    *,
    warmup_steps: int = 0,
    restart_warmup_steps: int = 0,
    min_lr_ratio: float = 0.1,
    reset: str = "magnitude",
    fraction: float = 0.9,
    jagged: bool = True,
):
    """ReLora as a callback: `Trainer(..., callbacks=[relora_callback(restart_every=1000)])`.

    jagged   put the jagged cosine schedule, over the Trainer's number of steps, into the Trainer's scheduler; False: the
             schedule is the Trainer's own
    Other arguments as for ReLora. Raises ValueError when training begins with a scheduler that is no LambdaLR (all of
    transformers' usual ones are): pass `optimizers=(optimizer, JaggedCosineLR(...))` with jagged=False there.
    """
    from transformers import TrainerCallback

    _check(restart_every, reset, fraction)

    class ReLoraCallback(TrainerCallback):
        errors: dict[str, float] = {}

        def on_train_begin(self, args, state, control, **kwargs) -> None:
            if jagged:
                schedule = JaggedCosine(
                    state.max_steps, restart_every, warmup_steps, restart_warmup_steps, min_lr_ratio
                )
                _put_schedule(kwargs["lr_scheduler"], schedule)

        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
            if state.global_step % restart_every == 0 and state.global_step < state.max_steps:
                self.errors = restart(model, optimizer, reset, fraction)

    return ReLoraCallback()


def _put_schedule(scheduler: Any, schedule: JaggedCosine) -> None:
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"relora_callback: the Trainer's scheduler is a {type(scheduler).__name__}, expected a LambdaLR; pass "
            "optimizers=(optimizer, JaggedCosineLR(...)) and jagged=False"
        )
    scheduler.lr_lambdas = [schedule] * len(scheduler.base_lrs)
    for group, base in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
        group["lr"] = base * schedule(scheduler.last_epoch)


def _check(restart_every: int, reset: str, fraction: float) -> None:
    if not isinstance(restart_every, int) or isinstance(restart_every, bool) or restart_every < 1:
        raise ValueError(f"ReLoRA: restart_every is {restart_every!r}, expected a positive integer")
    if reset not in MODES:
        raise ValueError(f"ReLoRA: reset is {reset!r}, expected one of {', '.join(MODES)}")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"ReLoRA: fraction is {fraction}, expected 0 to 1")
