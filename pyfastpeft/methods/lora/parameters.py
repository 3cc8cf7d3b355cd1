"""LoRA on Parameters (target_parameters): the stacked expert weights of mixtures, and any other of 2 or 3 dimensions.

    W[e] + s B_e A_e          W [E, N, K], or [E, K, N] where the module says is_transposed; A_e [R, K], B_e [N, R]

The layout is PEFT's: A [R·E, K], the experts' rows one after the other; B [N, R·E], where column r·E + e is the r-th of
expert e; and nested modules for several Parameters of one module, so that its keys are <path>.lora_A.weight for the last of
them, <path>.base_layer.lora_A.weight for the one before it, and so on.

The module computes as ever, with AddedWeights in the Parameters' places. PEFT adds up a whole stack in every forward.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import nn

from pyfastpeft.methods.base import AdapterHolder, MethodLayer, bare_modules, replace_module
from pyfastpeft.methods.lora.added_weight import AddedWeight
from pyfastpeft.methods.lora.config import LoraConfig
from pyfastpeft.methods.lora.factor import Factor, set_scaling
from pyfastpeft.methods.lora.initial import draw_weights


class LoraParameters(MethodLayer):
    """A module with LoRA on Parameters of its own; `lora_A[name][parameter]` [R·E, K], `lora_B[name][parameter]` [N, R·E].

    Merging writes into the Parameters. The dense ones alone: a quantised weight has another shape.
    """

    merges_weight = False  # nothing is quantised again

    def __init__(self, base_layer: nn.Module) -> None:
        AdapterHolder.__init__(self)
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.scaling: dict[str, dict[str, float]] = {}
        self.merged_adapters = ()
        self.base_changed = False
        self._snapshot: dict[str, torch.Tensor] | None = None

    base = None  # there is no linear layer to look at

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def check_mixed(self, name: str, path: str) -> None:
        AdapterHolder.check_mixed(self, name, path)  # an expert sees tokens of all samples

    def add_adapter(
        self, name: str, parameters: list[str], config: LoraConfig, path: str, *, fp32: bool, init: bool
    ) -> None:
        a_of, b_of, scalings = nn.ParameterDict(), nn.ParameterDict(), {}
        for parameter in parameters:
            weight = getattr(self.base_layer, parameter)
            experts, outputs, inputs = self._sizes(weight)
            rank, alpha = config.rank_for(f"{path}.{parameter}"), config.alpha_for(f"{path}.{parameter}")
            wide = torch.promote_types(weight.dtype, torch.float32) if fp32 else weight.dtype
            a, b = draw_weights(inputs, outputs, rank * experts, config.init_lora_weights if init else None)
            if config.init_lora_weights == "gaussian":  # of the experts' rank, not of all ranks together
                a = a * experts
            a_of[parameter] = nn.Parameter(a.to(weight.device, wide), requires_grad=False)
            b_of[parameter] = nn.Parameter(b.to(weight.device, wide), requires_grad=False)
            scalings[parameter] = config.scaling(rank, alpha)
        self.lora_A[name], self.lora_B[name], self.scaling[name] = a_of, b_of, scalings

    def _sizes(self, weight: torch.Tensor) -> tuple[int, int, int]:
        """(E, N, K)."""
        if weight.ndim == 2:
            return 1, *weight.shape
        experts, first, second = weight.shape
        return (experts, second, first) if self._transposed(weight) else (experts, first, second)

    def _transposed(self, weight: torch.Tensor) -> bool:
        return weight.ndim == 3 and bool(getattr(self.base_layer, "is_transposed", False))

    def held_adapters(self) -> list[str]:
        return list(self.lora_A)

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.lora_A:
            return {}
        tensors = {}
        for depth, parameter in enumerate(reversed(list(self.scaling[name]))):
            nested = "base_layer." * depth
            tensors[f"{nested}lora_A.weight"] = self.lora_A[name][parameter]
            tensors[f"{nested}lora_B.weight"] = self.lora_B[name][parameter]
        return tensors

    def ranked(self, name: str, parameters: Iterable[str] | None = None) -> list[Factor]:
        """parameters: those that a file has, of which its keys are made (None: the adapter's own)."""
        here = [p for p in self.scaling[name] if parameters is None or p in parameters]
        factors = []
        for depth, parameter in enumerate(reversed(here)):
            experts, nested = self._sizes(getattr(self.base_layer, parameter))[0], "base_layer." * depth
            for part, held, axis, blocks in (("A", self.lora_A, 0, experts), ("B", self.lora_B, 1, 1)):
                key = f"{nested}lora_{part}.weight"
                factors.append(Factor(key, held[name], parameter, axis, blocks, experts, parameter=parameter))
        return factors

    def set_numbers(self, name: str, config: LoraConfig, path: str) -> None:
        for parameter in self.scaling[name]:
            rank, alpha = (of(f"{path}.{parameter}") for of in (config.rank_for, config.alpha_for))
            set_scaling(self.scaling[name], parameter, config.scaling(rank, alpha))

    def scaling_as_tensor(self, name: str) -> None:
        for parameter, value in self.scaling[name].items():
            device = self.lora_A[name][parameter].device
            self.scaling[name][parameter] = torch.as_tensor(value, dtype=torch.float32, device=device)

    @torch.no_grad()
    def empty(self, name: str) -> None:
        """The adapter adds nothing here: B = 0."""
        for b in self.lora_B[name].values():
            b.zero_()

    def _apply(self, fn, recurse: bool = True):
        result = super()._apply(fn, recurse)
        for name, scalings in self.scaling.items():  # tensors once they are prepared for hotswap
            for parameter, value in scalings.items():
                if isinstance(value, torch.Tensor):
                    scalings[parameter] = value.to(self.lora_A[name][parameter].device)
        return result

    def remove_adapter(self, name: str) -> None:
        if name in self.merged_adapters:
            self.unmerge()
        for held in (self.lora_A, self.lora_B, self.scaling):
            if name in held:
                del held[name]
        self.active = tuple(other for other in self.active if other != name)

    def factors(self, name: str, parameter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(left, right) with s B A = left @ right in the Parameter's own layout; a dimension E first where it has one."""
        a, b, scaling = self.lora_A[name][parameter], self.lora_B[name][parameter], self.scaling[name][parameter]
        weight = getattr(self.base_layer, parameter)
        experts, outputs, inputs = self._sizes(weight)
        b = b * scaling
        if weight.ndim == 2:
            return b, a
        a, b = a.reshape(experts, -1, inputs), b.reshape(outputs, -1, experts).permute(2, 0, 1)
        return (a.mT, b.mT) if self._transposed(weight) else (b, a)

    def forward(self, *args, **kwargs):
        """The module's own answer, computed with W + Σ s B A."""
        active = () if self.merged_adapters or not self.enabled else self.active
        parameters = dict.fromkeys(parameter for name in active for parameter in self.scaling[name])
        stand_ins = {parameter: self._adapted(active, parameter) for parameter in parameters}
        own = vars(self.base_layer)  # what is found here comes before the Parameters
        own.update(stand_ins)
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            for parameter in stand_ins:
                own.pop(parameter, None)

    def _adapted(self, active: tuple[str, ...], parameter: str) -> torch.Tensor:
        weight = getattr(self.base_layer, parameter)
        factors = [self.factors(name, parameter) for name in active if parameter in self.scaling[name]]
        left = torch.cat([left for left, _ in factors], dim=-1).to(weight.dtype)
        right = torch.cat([right for _, right in factors], dim=-2).to(weight.dtype)
        if torch.compiler.is_compiling():  # which cannot trace it
            return torch.baddbmm(weight, left, right) if weight.ndim == 3 else torch.addmm(weight, left, right)
        return AddedWeight(weight, left, right)

    @torch.no_grad()
    def merge(self, names: Iterable[str], keep_snapshot: bool, dtype: torch.dtype | None = None) -> float:
        names = self.mergeable(names)
        if keep_snapshot and names:
            touched = {parameter for name in names for parameter in self.scaling[name]}
            kept = self._snapshot or {}
            self._snapshot = {p: getattr(self.base_layer, p).clone() for p in sorted(touched - set(kept))} | kept
        for name in names:
            for parameter in self.scaling[name]:
                for part, delta in self._deltas(name, parameter):
                    part.copy_(part.to(delta.dtype) + delta)
        self.merged_adapters += names
        return 0.0

    def _deltas(self, name: str, parameter: str):
        """(matrix of the Parameter, its s B A in fp32 or wider), expert by expert."""
        weight = getattr(self.base_layer, parameter).detach()
        left, right = self.factors(name, parameter)
        wide = torch.promote_types(left.dtype, torch.float32)
        if weight.ndim == 2:
            yield weight, left.to(wide) @ right.to(wide)
            return
        for part, one, other in zip(weight, left, right, strict=True):
            yield part, one.to(wide) @ other.to(wide)

    @torch.no_grad()
    def unmerge(self) -> None:
        if not self.merged_adapters:
            return
        if self._snapshot is None:
            raise RuntimeError("LoraParameters: the adapters were merged for good; load the base model again")
        for parameter, weight in self._snapshot.items():
            getattr(self.base_layer, parameter).copy_(weight)
        self._snapshot, self.merged_adapters = None, ()

    @torch.no_grad()
    def check_merge(self, names: Iterable[str], safe: bool) -> None:
        for name in self.mergeable(names):
            for parameter in self.scaling[name]:
                for tensor in (self.lora_A[name][parameter], self.lora_B[name][parameter]):
                    if not torch.isfinite(tensor).all():
                        raise ValueError(f"adapter {name!r} has NaN or infinities for {parameter}; not merged")
                for part, delta in self._deltas(name, parameter) if safe else ():
                    if not torch.isfinite((part.to(delta.dtype) + delta).to(part.dtype)).all():
                        raise ValueError(
                            f"merging {name!r} gives NaN or infinities in {part.dtype} ({parameter}); not merged. Merge "
                            "into a wider dtype (model.float())"
                        )

    def extra_repr(self) -> str:
        return f"parameters={ {name: list(of) for name, of in self.scaling.items()} }, active={self.active}"


def find_parameters(
    model: nn.Module, config: LoraConfig, targets: Iterable[str], strict: bool
) -> dict[str, tuple[nn.Module, list[str]]]:
    """{path: (module, names of its Parameters)} of what target_parameters names, in the model's order.

    An entry is a Parameter's whole path or its end after a dot. Raises ValueError, before anything is changed, for what cannot
    be adapted; for an entry that matches nothing when strict.
    """
    wanted = config.target_parameters or []
    if not wanted:
        return {}
    found: dict[str, tuple[nn.Module, list[str]]] = {}
    owners: dict[int, list[str]] = {}
    ends, used = set(), set()
    for path, module in bare_modules(model):
        bare = module.bare_module() if isinstance(module, AdapterHolder) else module
        for name, parameter in bare._parameters.items():
            if parameter is None:
                continue
            key = f"{path}.{name}" if path else name
            owners.setdefault(id(parameter), []).append(key)
            ends.add(f"{path.rpartition('.')[2]}.{name}" if path else name)
            hits = [entry for entry in wanted if key == entry or key.endswith(f".{entry}")]
            used.update(hits)
            if hits:
                _check_parameter(path, module, name, parameter, targets)
                found.setdefault(path, (module, []))[1].append(name)
    unused = [entry for entry in wanted if entry not in used]
    if unused and (strict or not found):
        near = [match for entry in unused for match in difflib.get_close_matches(entry, sorted(ends), n=3, cutoff=0.5)]
        hint = f"; near misses: {', '.join(dict.fromkeys(near))}" if near else ""
        raise ValueError(f"target_parameters: {unused} match no parameter of the model{hint}")
    for path, (module, names) in found.items():
        for name in names:
            shared = owners[id(_bare(module)._parameters[name])]
            if len(shared) > 1:
                raise ValueError(
                    f"target_parameters: {path}.{name} is {(set(shared) - {f'{path}.{name}'}).pop()} too (tied weights); "
                    "adapt it as a layer with target_modules"
                )
    return found


def add_parameters(
    model: nn.Module,
    found: dict[str, tuple[nn.Module, list[str]]],
    config: LoraConfig,
    adapter_name: str,
    *,
    fp32: bool,
    init: bool,
) -> None:
    """Gives the Parameters of find_parameters() an adapter."""
    for path, (module, names) in found.items():
        holder = module if isinstance(module, LoraParameters) else LoraParameters(module).train(module.training)
        holder.add_adapter(adapter_name, names, config, path, fp32=fp32, init=init)
        if holder is not module:
            replace_module(model, module, holder)


def _bare(module: nn.Module) -> nn.Module:
    return module.bare_module() if isinstance(module, AdapterHolder) else module


def _check_parameter(path: str, module: nn.Module, name: str, parameter: nn.Parameter, targets: Iterable[str]) -> None:
    if not path:
        raise ValueError(
            f"target_parameters: {name} is a parameter of the model itself, which has no module around it to adapt it in"
        )
    if path in targets or (isinstance(module, AdapterHolder) and not isinstance(module, LoraParameters)):
        raise ValueError(
            f"target_parameters: {path}.{name} belongs to a layer that is adapted already, or by target_modules (perhaps the "
            "architecture's default ones: target_modules=[] adapts none), modules_to_save or trainable_token_indices"
        )
    if parameter.ndim not in (2, 3) or not parameter.is_floating_point():
        raise ValueError(
            f"target_parameters: {path}.{name} is {tuple(parameter.shape)} of {parameter.dtype}, expected 2 or 3 dimensions "
            "and a floating-point dtype"
        )
