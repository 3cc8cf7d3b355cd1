"""AdamW with fp32 or 8-bit state: torch.optim.Optimizer's manners around ops.adamw_."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pyfastpeft.ops._library import DTYPE_CODES
from pyfastpeft.ops.adamw import adamw_, standard_maps
from pyfastpeft.optim.adamw_plan import Plan, make_plan, run_plans
from pyfastpeft.optim.adamw_state import state_for
from pyfastpeft.optim.in_backward import Steps
from pyfastpeft.optim.loading import LoadsStates
from pyfastpeft.reference.adamw import BLOCK

MIN_8BIT_NUMEL = 4096  # smaller tensors keep fp32 state (formats.md, and bitsandbytes' min_8bit_size)


def _check_options(options: dict[str, Any]) -> None:
    lr = options["lr"]
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"AdamW: lr is a tensor of {lr.numel()} values, expected a number or a tensor of one")
    for name in ("lr", "eps", "weight_decay"):
        if not options[name] >= 0:
            raise ValueError(f"AdamW: {name} is {options[name]}, expected a number >= 0")
    betas = options["betas"]
    if len(betas) != 2 or not all(0 <= float(b) < 1 for b in betas):
        raise ValueError(f"AdamW: betas is {betas}, expected two numbers in [0, 1)")
    if options["state_bits"] not in (8, 32):
        raise ValueError(f"AdamW: state_bits is {options['state_bits']}, expected 32 or 8")
    for name in ("amsgrad", "differentiable"):
        if options.get(name):
            raise ValueError(f"AdamW: {name}=True is not supported; use torch.optim.AdamW({name}=True)")
    if options["master_weights"] and options["stochastic_rounding"]:
        raise ValueError(
            "AdamW: master_weights and stochastic_rounding are both True; choose one: a parameter that has an fp32 "
            "master is rounded from it to nearest"
        )


class AdamW(LoadsStates, Steps, torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) in one kernel call per group, with fp32 or 8-bit state.

    m ← β1 m + (1 - β1) g;  v ← β2 v + (1 - β2) g²;  p ← (1 - lr·λ) p - lr · m̂ / (sqrt(v̂) + eps)

    params        float32, bfloat16 or float16 tensors, or groups of them (dicts), as torch's optimizers take them
    lr            a number or a tensor of one value; LR schedulers work on both
    state_bits    32, or 8: m and v in block-wise 8-bit codes (Dettmers et al., arXiv:2110.02861), bitsandbytes' layout;
                  tensors of fewer than `min_8bit_numel` values keep fp32 state. A group may set its own
    maximize      ascend instead of descend
    decoupled_weight_decay   False: L2 decay added to the gradient (Adam)
    master_weights           bfloat16 and float16 parameters are updated through an fp32 copy kept in the state. The
                             copy is taken at the first step: weights loaded into the model later are overwritten by it
    stochastic_rounding      bfloat16 and float16 parameters are rounded up or down by chance, so that small updates
                             are not lost; the seed is drawn from torch's generator at each step

    State is fp32 for low-precision parameters too (torch keeps it in the parameter's dtype). With fp32 parameters m and
    v are bit for bit torch.optim.AdamW(foreach=False)'s.

    State dicts: `step, exp_avg, exp_avg_sq`, which torch.optim.AdamW loads and saves; 8-bit ones hold `step, state1,
    absmax1, qmap1, state2, absmax2, qmap2`, and bitsandbytes' 8-bit state dicts load. A state whose precision differs
    from state_bits is converted.

    torch.amp.GradScaler hands its scale to the kernel; the gradients themselves are then left scaled, and the step is
    skipped on infinities without a synchronisation. Gradients must be dense: sparse ones raise RuntimeError.
    """

    _own_options = ("state_bits",)  # the state is converted to it
    _check_options = staticmethod(_check_options)
    _step_supports_amp_scaling = True  # torch.amp.GradScaler: sets grad_scale and found_inf around step()

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_bits: int = 32,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = True,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        min_8bit_numel: int = MIN_8BIT_NUMEL,
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, state_bits=state_bits, amsgrad=amsgrad,
            maximize=maximize, decoupled_weight_decay=decoupled_weight_decay, master_weights=master_weights,
            stochastic_rounding=stochastic_rounding, min_8bit_numel=min_8bit_numel,
        )  # fmt: skip
        _check_options(defaults)
        self._plans: dict[int, Plan] = {}  # by the group's number
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            for i, p in enumerate(group["params"]):
                # integers cannot be trained: the frozen codes of a 4-bit base among model.parameters() are passed over
                if p.dtype not in DTYPE_CODES and (p.is_floating_point() or p.is_complex()):
                    raise TypeError(
                        f"AdamW: parameter {i} of group {len(self.param_groups) - 1} has dtype {p.dtype}, expected "
                        "float32, bfloat16 or float16; use torch.optim.AdamW for it"
                    )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _step_groups(self, groups: Sequence[dict[str, Any]], plans: dict) -> None:
        run_plans(plans, groups, self.state, self._step_and_plan, self._scalars)

    def _scalars(self, group: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """The options of a call on `device`, but for the state's."""
        beta1, beta2 = group["betas"]
        scale, inf = (
            None if tensor is None else tensor.to(device, torch.float32)
            for tensor in (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        )
        seed = None
        if group["stochastic_rounding"]:
            seed = torch.empty(1, dtype=torch.int64, device=device).random_()
        return {
            "lr": group["lr"], "beta1": float(beta1), "beta2": float(beta2), "eps": group["eps"],
            "weight_decay": group["weight_decay"], "decoupled": group["decoupled_weight_decay"],
            "maximize": group["maximize"], "grad_scale": scale, "found_inf": inf, "rounding_seed": seed,
        }  # fmt: skip

    def _step_and_plan(self, number: int, group: dict[str, Any]) -> Plan | None:
        """The step from the group's parameters as they are; the plan for the next."""
        calls = defaultdict(lambda: [[] for _ in range(8)])  # the op's lists, by what one call must share
        for i, p in enumerate(group["params"]):
            grad = p.grad
            if grad is None:
                continue
            state = self.state[p]
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    f"AdamW: the gradient of parameter {i} of group {number} is sparse ({grad.layout}), expected a dense "
                    "one; use nn.Embedding(sparse=False), or torch.optim.SparseAdam for that parameter"
                )
            if not state:
                state.update(self._new_state(p, group))
            if not (grad.is_contiguous() and p.is_contiguous()) and grad.stride() != p.stride():
                grad = torch.empty_like(p, dtype=grad.dtype).copy_(grad)
            eight = "state1" in state
            maps = (state["qmap1"], state["qmap2"]) if eight else (None, None)
            lists = calls[p.device, id(maps[0]), id(maps[1]), "master" in state]
            lists[0].append(p)
            lists[1].append(grad)
            lists[4].append(state["step"])
            if eight:
                lists[2].append(state["state1"])
                lists[3].append(state["state2"])
                lists[5].append(state["absmax1"])
                lists[6].append(state["absmax2"])
            else:
                lists[2].append(state["exp_avg"])
                lists[3].append(state["exp_avg_sq"])
            if "master" in state:
                lists[7].append(state["master"])
        made = []
        for (device, *_), lists in calls.items():
            states = [self.state[p] for p in lists[0]]
            first = states[0]
            qmaps = first.get("qmap1"), first.get("qmap2")
            adamw_(
                *lists, state_bits=8 if "state1" in first else 32, qmap1=qmaps[0], qmap2=qmaps[1],
                **self._scalars(group, device),
            )  # fmt: skip
            made.append((lists, states, qmaps))
        return make_plan(group, made)

    def _new_state(self, p: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
        if not torch.ops.aten.is_non_overlapping_and_dense(p):
            raise ValueError(
                f"AdamW: a parameter of shape {tuple(p.shape)} has strides {p.stride()}, which leave gaps or overlap; "
                "make it contiguous: nn.Parameter(p.contiguous())"
            )
        small = self._small_states
        state = {"step": small.step(p.device)}
        if self._is_8bit(p, group):
            blocks = -(p.numel() // -BLOCK)
            maps = standard_maps(p.device)
            for i in (1, 2):
                state[f"state{i}"] = small.zeros_like(p, torch.uint8)
                state[f"absmax{i}"] = torch.zeros(blocks, dtype=torch.float32, device=p.device)
                state[f"qmap{i}"] = maps[i - 1]
        else:
            state["exp_avg"] = small.zeros_like(p, torch.float32)
            state["exp_avg_sq"] = small.zeros_like(p, torch.float32)
        if self._has_master(p, group):
            state["master"] = p.detach().to(torch.float32, copy=True)
        return state

    @staticmethod
    def _is_8bit(p: torch.Tensor, group: dict[str, Any]) -> bool:
        return group["state_bits"] == 8 and p.numel() >= group["min_8bit_numel"]

    @staticmethod
    def _has_master(p: torch.Tensor, group: dict[str, Any]) -> bool:
        return group["master_weights"] and p.dtype != torch.float32

    def _converted(self, p: torch.Tensor, group: dict[str, Any], key: Any, value: dict[str, Any]) -> dict[str, Any]:
        return state_for(
            p, value, key, bits8=self._is_8bit(p, group), master=self._has_master(p, group),
            maps=standard_maps(p.device),
        )  # fmt: skip
