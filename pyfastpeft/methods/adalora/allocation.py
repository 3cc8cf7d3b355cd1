"""How AdaLoRA allocates its ranks (the paper's section 3.2 and 3.3, equations 8 to 11).

After every optimizer step, with the gradients still there, for every entry w of A, E and B:

    I = |w · ∂w|     Ī ← β₁ Ī + (1 − β₁) I     Ū ← β₂ Ū + (1 − β₂) |I − Ī|     s = Ī · Ū

A triplet i of a layer scores s(E_i) + mean_j s(A_ij) + mean_j s(B_ji). The budget's worth of best triplets of all layers
together stays, the others' E is set to zero (A and B keep training, so that a triplet can come back).

Where the paper and its authors' code differ, this is the code, as PEFT is: w is the value after the optimizer's step and ∂w the
gradient before it (the paper takes both before it: then E = 0 scores nothing at the first step); the orthogonality penalty is a
Frobenius norm, not its square; and the schedule's fraction is (t − tinit) / (T − tfinal − tinit), where the paper's
equation prints t − tinit − tfinal above it, which would begin above the first budget.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyfastpeft.methods.adalora.config import AdaLoraConfig

PARTS = ("lora_A", "lora_E", "lora_B")


def budget_at(step: int, config: AdaLoraConfig, layers: int) -> int:
    """How many triplets of `layers` layers are kept after optimizer step `step` (1 is the first).

    With b₀ = init_r · layers, b = target_r · layers and T' = total_step − tfinal: b₀ up to tinit; from there to T'
    ⌊b + (b₀ − b) (1 − (step − tinit) / (T' − tinit))³⌋; then b.
    """
    first, last = config.init_r * layers, config.target_r * layers
    end = config.total_step - config.tfinal
    if step <= config.tinit:
        return first
    if step >= end:
        return last
    left = 1 - (step - config.tinit) / (end - config.tinit)
    return int((first - last) * left**3 + last)


class RankAllocator:
    """Allocates the ranks of one adapter. It acts by itself after every step of an optimizer that trains the adapter.

    layers   {path: AdaLoraLinear}
    config   the adapter's; its rank_pattern is written whenever triplets are masked

    update_and_allocate(step), PEFT's call, takes over for good from the first time it is made: what the automatic call
    did after the same optimizer step is undone first, so that code written for PEFT gives PEFT's ranks.
    """

    def __init__(self, layers: Mapping[str, nn.Module], config: AdaLoraConfig, name: str) -> None:
        self.layers, self.config, self.name = dict(layers), config, name
        self.manual = False
        self.step = 0
        self.averages: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        # the state before the first automatic call, until it is known that no call by hand follows it
        self._before: tuple[dict[str, torch.Tensor], dict | None] | None = None
        _watch(self)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        _watch(self)  # a copy allocates for the copied model

    def parameters(self) -> dict[str, nn.Parameter]:
        """{"<path>.lora_A" and so on: Parameter}"""
        return {
            f"{path}.{part}": getattr(layer, part)[self.name] for path, layer in self.layers.items() for part in PARTS
        }

    def trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the adapter is being trained, by this optimizer."""
        mine = {id(layer.lora_E[self.name]) for layer in self.layers.values() if self.name in layer.active}
        return any(id(p) in mine and p.requires_grad for group in optimizer.param_groups for p in group["params"])

    def after_optimizer_step(self) -> None:
        """The automatic call: counts the optimizer's steps from 1."""
        if self.manual:
            return
        self._before = None
        if self.step == 0:
            values = {path: layer.lora_E[self.name].detach().clone() for path, layer in self.layers.items()}
            self._before = values, self.config.rank_pattern
        self.step += 1
        self._allocate(self.step)

    @torch.no_grad()
    def update_and_allocate(self, global_step: int) -> None:
        """Allocates after optimizer step `global_step`; call it after backward() and before zero_grad()."""
        if not self.manual and self._before is not None:  # the automatic call has just been made for the same step
            values, self.config.rank_pattern = self._before
            for path, value in values.items():
                self.layers[path].lora_E[self.name].copy_(value)
            self.averages.clear()
        self.manual, self._before = True, None
        self.step = global_step
        self._allocate(global_step)

    @torch.no_grad()
    def _allocate(self, step: int) -> None:
        config, end = self.config, self.config.total_step - self.config.tfinal
        if step > end:
            self._mask(config.rank_pattern)
            return
        if step < end:
            self._update_importance()
        if step == end or (step > config.tinit and step % config.deltaT == 0):
            config.rank_pattern = self._choose(budget_at(step, config, len(self.layers)))
            self._mask(config.rank_pattern)
        if step == end:
            self.averages.clear()

    def _update_importance(self) -> None:
        beta1, beta2 = self.config.beta1, self.config.beta2
        for key, parameter in self.parameters().items():
            if parameter.grad is None:
                continue
            importance = (parameter * parameter.grad).abs()
            if key not in self.averages:
                self.averages[key] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            mean, uncertainty = (average.to(parameter.device) for average in self.averages[key])
            mean = beta1 * mean + (1 - beta1) * importance
            self.averages[key] = mean, beta2 * uncertainty + (1 - beta2) * (importance - mean).abs()

    def _score(self, path: str) -> torch.Tensor:
        """[R], the score of each triplet of a layer."""
        layer, products = self.layers[path], []
        for part in PARTS:
            average = self.averages.get(f"{path}.{part}")
            parameter = getattr(layer, part)[self.name]
            products.append(torch.zeros_like(parameter) if average is None else average[0] * average[1])
        of_a, of_e, of_b = products
        return of_e.reshape(-1) + of_a.mean(dim=1) + of_b.mean(dim=0)

    def _choose(self, budget: int) -> dict[str, list[bool]]:
        """The `budget` best triplets of all layers, as {"<path>.lora_E": kept or not}; of equal ones the earlier."""
        scores = {path: self._score(path).float().cpu() for path in self.layers}
        order = torch.sort(torch.cat(list(scores.values())), descending=True, stable=True).indices
        kept = torch.zeros(len(order), dtype=torch.bool)
        kept[order[:budget]] = True
        parts = kept.split([len(score) for score in scores.values()])
        return {f"{path}.lora_E": part.tolist() for path, part in zip(scores, parts, strict=True)}

    def _mask(self, pattern: dict[str, list[bool]] | None) -> None:
        for path, layer in self.layers.items():
            e, kept = layer.lora_E[self.name], (pattern or {}).get(f"{path}.lora_E")
            if kept is not None and len(kept) == len(e):
                e.masked_fill_(~torch.tensor(kept, device=e.device)[:, None], 0.0)


_ALLOCATORS: weakref.WeakSet[RankAllocator] = weakref.WeakSet()
_HOOKS: list = []


def _watch(allocator: RankAllocator) -> None:
    """From now on every optimizer step that trains its adapter calls the allocator."""
    _ALLOCATORS.add(allocator)
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_post_hook(_after_any_optimizer_step))


def _after_any_optimizer_step(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    for allocator in list(_ALLOCATORS):
        if allocator.trained_by(optimizer):
            allocator.after_optimizer_step()
