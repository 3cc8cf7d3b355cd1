"""Steps inside backward: a parameter is stepped as soon as its gradient is complete, and the gradient let go.

Gradients then never lie in memory all at once: at most one bucket of them and the largest single one do. torch calls a
parameter's hook when everything that contributes to its gradient has run, tied uses included. What still needs the
parameter's value after that (a use of it that has no gradient) is found by its version, and backward raises.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

BUCKET_BYTES = 4 << 20  # of gradients stepped by one call: calls cost some 50 µs each


class GradientsReleasedError(RuntimeError):
    """Somebody asked for a gradient that backward() has consumed."""


class _Released(torch.Tensor):
    """What `.grad` is between a parameter's step and the end of the optimizer's: no memory, and an error for every use.

    None would be taken for "no gradient": clip_grad_norm_ and GradScaler would do nothing, and say nothing.
    """

    @staticmethod
    def __new__(cls, p: torch.Tensor) -> _Released:
        return torch.Tensor._make_wrapper_subclass(
            cls, p.shape, strides=p.stride(), dtype=p.dtype, device=p.device, requires_grad=False
        )

    def __repr__(self) -> str:
        return "<a gradient that step_in_backward() has consumed>"

    @classmethod
    def _refuse(cls, *_: Any) -> Any:
        raise GradientsReleasedError(
            "step_in_backward: this gradient was consumed by a step inside backward() and is gone. Clipping by the norm "
            "of all gradients and GradScaler need them all: use neither (max_grad_norm=0, bfloat16), or clip each on its "
            "way with parameter.register_hook(). To accumulate over several backward()s make all but the last inside "
            "`with stepping.paused():`. Call optimizer.step() or zero_grad() after each backward() that steps"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls._refuse()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls._refuse()  # from C++: autograd would add the next backward's gradient to it


class StepInBackward:
    """What step_in_backward() returns; as a context manager it ends with the block."""

    def __init__(self, optimizer: Steps, bucket_bytes: int) -> None:
        if not bucket_bytes >= 0:
            raise ValueError(f"step_in_backward: bucket_bytes is {bucket_bytes}, expected 0 or more")
        _refuse_other_processes()
        self._optimizer, self._bucket_bytes, self._paused = weakref.ref(optimizer), bucket_bytes, False
        self._hooks: dict[torch.Tensor, Any] = {}
        self._groups: dict[torch.Tensor, int] = {}
        # whose gradients are complete, by the stream that made them; in a GPU's backward each device has its thread
        self._waiting: dict[Any, dict[torch.Tensor, int]] = {}
        self._released: dict[torch.Tensor, _Released] = {}
        self._plans: dict[int, dict] = {}  # by the first parameter of a bucket
        self._aside: dict[torch.Tensor, torch.Tensor] = {}  # gradients of a bucket whose step failed
        self._backward = -1  # torch's number of the backward that runs
        self._lock = threading.RLock()
        self._attach(optimizer)
        self._finalizer = weakref.finalize(optimizer, _remove, self._hooks)

    def _attach(self, optimizer: Steps) -> None:
        """Hooks for the parameters that have none; those added or unfrozen since."""
        self._groups = {p: n for n, group in enumerate(optimizer.param_groups) for p in group["params"]}
        mine = weakref.ref(self)

        def arrived(p: torch.Tensor) -> None:
            stepping = mine()
            if stepping is not None:
                stepping._arrived(p)

        for p in self._groups:
            if p.requires_grad and p not in self._hooks:
                self._hooks[p] = p.register_post_accumulate_grad_hook(arrived)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it gradients are left where they are: for all but the last backward() of gradient accumulation."""
        former, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = former

    def remove(self) -> None:
        """Gradients are left to step() again. A step that the disk has cut short is to be finished first."""
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._stepping is self:
            self.finish()
            optimizer._stepping = None
        _remove(self._hooks)

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    # ---- within backward ---------------------------------------------------------------------------------------------

    def _arrived(self, p: torch.Tensor) -> None:
        optimizer = self._optimizer()
        if self._paused or optimizer is None or p not in self._groups:
            return
        with self._lock:
            if self._aside:
                raise RuntimeError(
                    "step_in_backward: the last backward() was cut short by an error in a step; call optimizer.step(), "
                    "which finishes it, before the next backward()"
                )
            self._begin(optimizer)
            stream = torch.cuda.current_stream(p.device) if p.is_cuda else None
            waiting = self._waiting.setdefault(stream, {})
            waiting[p] = p.grad.numel() * p.grad.element_size()
            if sum(waiting.values()) >= self._bucket_bytes:
                self._flush(optimizer, stream)

    def _begin(self, optimizer: Steps) -> None:
        number = torch._C._current_graph_task_id()
        if number != self._backward:
            _refuse_other_processes()
            self._backward = number
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        """Runs when all of a backward has, on the streams of who called it."""
        optimizer = self._optimizer()
        if optimizer is not None:
            with self._lock:
                self._flush_all(optimizer)

    def _flush_all(self, optimizer: Steps) -> None:
        for stream in list(self._waiting):
            self._flush(optimizer, stream)

    def _flush(self, optimizer: Steps, stream: Any) -> None:
        """Steps the parameters that wait. Where that fails their gradients are put aside, for finish()."""
        for p, grad in self._aside.items():
            p.grad = grad
        self._aside = {}
        waiting = [p for p in self._waiting[stream] if p.grad is not None and p in self._groups]
        groups = [{**group, "params": []} for group in optimizer.param_groups]
        for p in waiting:
            groups[self._groups[p]]["params"].append(p)
        try:
            if waiting:
                with torch.no_grad():
                    optimizer._step_bucket(groups, self._plans.setdefault(id(waiting[0]), {}))
        except BaseException:
            self._aside = {p: p.grad for p in waiting}
            raise
        finally:
            for p in waiting:
                if p not in self._released:
                    self._released[p] = _Released(p)
                p.grad = self._released[p]
        del self._waiting[stream]

    # ---- beside it ---------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Steps what waits; gradients that were consumed are None from here on. step() and zero_grad() begin with it."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        with self._lock:
            self._flush_all(optimizer)
            for p in self._groups:
                if isinstance(p.grad, _Released):
                    p.grad = None
            optimizer._end_of_buckets()
            self._attach(optimizer)


def _remove(hooks: dict[torch.Tensor, Any]) -> None:
    for hook in hooks.values():
        hook.remove()
    hooks.clear()


def _refuse_other_processes() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"step_in_backward: {distributed.get_world_size()} processes train together, expected one: a gradient would be "
            "consumed before it is averaged over them (DistributedDataParallel does that after this hook)"
        )


class Steps:
    """Beside a torch.optim.Optimizer in the bases of a class: step(), and steps inside backward.

    The class has `_plans`, a dict, and

    _step_groups(groups, plans)     steps the parameters of these groups that have gradients. The groups are
                                    self.param_groups, or copies with some of their parameters; plans keeps what it likes
                                    between calls for the same ones
    """

    _stepping: StepInBackward | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what `closure`, if given, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._stepping is not None:
            self._stepping.finish()
        self._step_groups(self.param_groups, self._plans)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._stepping is not None:
            self._stepping.finish()
        super().zero_grad(set_to_none)

    def step_in_backward(self, *, bucket_bytes: int = BUCKET_BYTES) -> StepInBackward:
        """From here on backward() steps the parameters, each as soon as its gradient is complete, and lets that go.

            stepping = optimizer.step_in_backward()
            for batch in batches:
                model(batch).loss.backward()    # steps
                optimizer.step()                # ends the step: nothing is left to do in it
                scheduler.step()

        bucket_bytes  of gradients are collected before they are stepped together; 0: each on its own. This and the
                      largest gradient are what gradients take of the peak memory, in place of all of them

        Results are those of step() after backward(), bit for bit (stochastic_rounding draws other numbers). Keep
        calling step(), or zero_grad(), after each backward(): until then `.grad` is an object that raises
        GradientsReleasedError whatever is done to it. So clip_grad_norm_, GradScaler and a second backward() without
        `with stepping.paused():` are errors and not silently wrong; `parameter.register_hook(lambda g: …)` can still clip
        a gradient on its way. Several processes (DistributedDataParallel) are refused with RuntimeError.

        In a Trainer: max_grad_norm=0, gradient_accumulation_steps=1, and, since it asks for the norm to log it, a class with

            def _get_grad_norm(self, model, grad_norm=None):
                return grad_norm

        A parameter that autograd still needs when its gradient is complete (used elsewhere under detach(), or by a
        second backward of a retained graph) makes that backward raise RuntimeError, since its version has risen.
        torch.utils.checkpoint recomputes without looking at versions: with it, no parameter may be used again under
        detach(). With use_reentrant=True a parameter shared between a checkpoint and the rest is refused.

        Paged optimizers learn the order of their pages from the first backward. A SpillError leaves backward(); step() then
        finishes the gradients that had arrived, and the others' parameters stay as they were.

        remove() of what is returned, or leaving its `with` block, ends it. Copies and pickles of the optimizer step plainly.
        """
        if self._stepping is not None:
            raise RuntimeError("step_in_backward: it is in use already; call remove() on what it returned first")
        self._stepping = StepInBackward(self, bucket_bytes)
        return self._stepping

    def _step_bucket(self, groups: list[dict[str, Any]], plans: dict) -> None:
        self._step_groups(groups, plans)

    def _end_of_buckets(self) -> None:
        """All buckets of a step were stepped."""
