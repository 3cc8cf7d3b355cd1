"""LoraLinear: a linear base and its low-rank updates.

    y = x Wᵀ + b + Σ_adapters s · dropout(x) Aᵀ Bᵀ          x [..., K], W [N, K], A [R, K], B [N, R], y [..., N]

DoRA (Liu et al. 2024, arXiv:2402.09353) scales every output by m [N] over the length of its row of W + s B A:

    y = g ⊙ (x Wᵀ + s · dropout(x) Aᵀ Bᵀ) + b          g = m / ‖W + s B A‖_row, the norm without a gradient (section 4.3)
    ‖w + s b A‖² = ‖w‖² + 2 s b · (A w) + s² b (A Aᵀ) bᵀ for a row w of W and b of B

so that a step needs A Wᵀ, R rows through the base's own matmul, and neither W + s B A nor a dequantised W; ‖w‖² is kept.
PEFT drops inputs of x Wᵀ too in training; here dropout acts on the low-rank path alone, as it does without DoRA.

One op computes (ops.linear_lora or ops.linear_4bit, as the base chooses). A and B are kept in fp32 and rounded to
the compute dtype inside the op, so a bf16 activation stays bf16.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pyfastpeft import ops
from pyfastpeft.methods.base import MethodLayer
from pyfastpeft.methods.lora.config import LoraConfig
from pyfastpeft.methods.lora.factor import Factor, FactorOf, set_scaling
from pyfastpeft.methods.lora.initial import draw_weights, draw_with_bias, take_from_base, takes_from_base
from pyfastpeft.mixed_batch import MixedBatch
from pyfastpeft.nn.base_linear import scaled
from pyfastpeft.nn.dense import has_own_forward


class LoraLinear(MethodLayer):
    """A linear layer with LoRA adapters; `lora_A[name].weight` [R, K], `lora_B[name].weight` [N, R], `scaling[name]`.

    base_layer   anything as_base_linear has a view of: nn.Linear, Conv1D, NF4Linear
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        base = self.base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ModuleDict()  # DoRA's m; an adapter without it is plain LoRA
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.taken: set[str] = set()  # adapters whose first values were taken out of the base's weight
        self.followed: dict[str, LoraLinear] = {}  # {adapter: the embedding's layer whose A and B these are} (tied.py)
        self._row_norms: tuple[tuple, torch.Tensor] | None = None

    def _apply(self, fn, recurse: bool = True):
        result = super()._apply(fn, recurse)
        for name, scaling in self.scaling.items():  # tensors once they are prepared for hotswap
            if isinstance(scaling, torch.Tensor) and scaling.device != self.base.device:
                self.scaling[name] = scaling.to(self.base.device)
        return result

    @property
    def fan_in_fan_out(self) -> bool:
        return self.base.fan_in_fan_out

    def add_adapter(self, name: str, config: LoraConfig, path: str, *, fp32: bool, init: bool) -> None:
        """Adds an adapter with the rank and alpha that the config has for this path; frozen until it is activated."""
        rank, alpha = config.rank_for(path), config.alpha_for(path)
        base = self.base
        wide = torch.promote_types(base.weight_dtype, torch.float32) if fp32 else base.weight_dtype
        # drawn on the CPU, so that a seed gives the same adapter on every device
        kind = config.init_lora_weights if init else None
        drawn = True if takes_from_base(kind) else kind
        a, b, bias = draw_with_bias(self.in_features, self.out_features, rank, drawn, config.lora_bias)
        for modules, weight in ((self.lora_A, a), (self.lora_B, b)):
            with torch.device("meta"):
                projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            if modules is self.lora_B and bias is not None:
                projection.bias = nn.Parameter(bias.to(base.device, wide), requires_grad=False)
            weight = weight.to(base.device, wide)
            projection.weight = nn.Parameter(weight, requires_grad=False)
            modules[name] = projection.train(self.training)
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout).train(self.training)
        self.r[name], self.lora_alpha[name], self.scaling[name] = rank, alpha, config.scaling(rank, alpha)
        if config.use_dora:
            self.lora_magnitude_vector[name] = Magnitude(torch.empty(self.out_features, dtype=wide, device=base.device))
            if init:
                self.reset_magnitude(name)

    @torch.no_grad()
    def take_from_base(self, name: str, config: LoraConfig, path: str, keep_adapter: bool = False) -> float:
        """A, B and the base's weight as init_lora_weights (pissa, olora, loftq) has them; see initial.py.

        keep_adapter   change the base only: A and B come from a file
        Returns the relative error of what the base stores.
        """
        base = self.base
        if config.init_lora_weights == "loftq" and base.is_quantized:
            raise ValueError(
                f"{path}: init_lora_weights='loftq' needs the original weight, this one is quantised already"
            )
        a, b, rest = take_from_base(
            base.get_weight(torch.float32),
            self.r[name],
            self.scaling[name],
            config.init_lora_weights,
            config.loftq_config,
        )
        error = base.set_weight(rest)
        self.taken.add(name)
        if not keep_adapter:
            self.lora_A[name].weight.copy_(a), self.lora_B[name].weight.copy_(b)
            if name in self.lora_magnitude_vector:
                self.reset_magnitude(name)
        return error

    def held_adapters(self) -> list[str]:
        return list(self.lora_A)

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.lora_A or name in self.followed:
            return {}
        tensors = {"lora_A.weight": self.lora_A[name].weight, "lora_B.weight": self.lora_B[name].weight}
        if self.lora_B[name].bias is not None:
            tensors["lora_B.bias"] = self.lora_B[name].bias
        if name in self.lora_magnitude_vector:
            tensors["lora_magnitude_vector"] = self.lora_magnitude_vector[name].weight
        return tensors

    def adapter_parameters(self, name: str) -> Iterable[nn.Parameter]:
        followed = self.followed.get(name)
        return super().adapter_parameters(name) if followed is None else followed.adapter_parameters(name)

    def follow(self, name: str, embedding: LoraLinear, config: LoraConfig) -> None:
        """Adds an adapter that is the embedding's, whose weight this layer has: A is its Bᵀ and B its Aᵀ."""
        self.followed[name] = embedding
        self.lora_A[name], self.lora_B[name] = FactorOf(embedding, name, "B"), FactorOf(embedding, name, "A")
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout).train(self.training)
        self.take_numbers(name)

    def ranked(self, name: str, parameters: Iterable[str] | None = None) -> list[Factor]:
        """The adapter's tensors that have a dimension of ranks, by their keys in a file; none of one that follows another.

        parameters: LoraParameters' alone
        """
        if name in self.followed:
            return []
        parts = ("lora_A", self.lora_A[name], 0), ("lora_B", self.lora_B[name], 1)
        return [Factor(f"{key}.weight", module, "weight", axis) for key, module, axis in parts]

    @torch.no_grad()
    def empty(self, name: str) -> None:
        """The adapter adds nothing here: B = 0, and DoRA's m the lengths of the base's rows."""
        self.lora_B[name].weight.zero_()
        if self.lora_B[name].bias is not None:
            self.lora_B[name].bias.zero_()
        if name in self.lora_magnitude_vector:
            self.reset_magnitude(name)

    def set_numbers(self, name: str, config: LoraConfig, path: str) -> None:
        """Rank, alpha, scaling and dropout as a config has them for this path; a scaling that is a tensor stays one."""
        rank, alpha = config.rank_for(path), config.alpha_for(path)
        self.r[name], self.lora_alpha[name] = rank, alpha
        set_scaling(self.scaling, name, config.scaling(rank, alpha))
        self.lora_dropout[name].p = config.lora_dropout

    def scaling_as_tensor(self, name: str) -> None:
        """Makes the scaling a tensor, which a compiled graph reads anew."""
        if not isinstance(self.scaling[name], torch.Tensor):
            self.scaling[name] = torch.tensor(float(self.scaling[name]), device=self.base.device)

    def take_numbers(self, name: str) -> None:
        """Rank, alpha and scaling are those of the layer that is followed."""
        for mine, others in ((getattr(each, field) for each in (self, self.followed[name])) for field in _NUMBERS):
            mine[name] = others[name]

    def follows(self, names: Iterable[str]) -> bool:
        here = self.mergeable(names)
        leaders = {id(self.followed.get(name)): self.followed.get(name) for name in here}
        leader = next(iter(leaders.values()), None)
        shared = len(leaders) == 1 and leader is not None and leader.weight is self.weight
        return shared and set(leader.mergeable(names)) == set(here)

    @torch.no_grad()
    def merge(self, names: Iterable[str], keep_snapshot: bool, dtype: torch.dtype | None = None) -> float:
        names = self.mergeable(names)
        if names and all(n in self.followed and self.followed[n].weight is self.weight for n in names):
            self.merged_adapters += names  # the embedding writes the weight
            return 0.0
        return super().merge(names, keep_snapshot, dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        if self._snapshot is None and all(name in self.followed for name in self.merged_adapters):
            self.merged_adapters = ()
        super().unmerge()

    def remove_adapter(self, name: str) -> None:
        if name in self.merged_adapters:
            self.unmerge()
        modules = (self.lora_A, self.lora_B, self.lora_dropout, self.lora_magnitude_vector)
        for held in (*modules, self.r, self.lora_alpha, self.scaling, self.followed):
            if name in held:  # all of them, unless adding it failed half-way
                del held[name]
        self.active = tuple(other for other in self.active if other != name)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """x [..., K] -> y [..., N] in the dtype the base gives."""
        if not self.active or not self.enabled or self.merged_adapters:
            return self.base_layer(x, *args, **kwargs)
        y = self._forward_factors(x)
        bias = self._bias(self.active)
        return y if bias is None else y + bias.to(y.dtype)

    def _forward_factors(self, x: torch.Tensor) -> torch.Tensor:
        base, active = self.base, self.active
        if any(name in self.lora_magnitude_vector for name in active):
            return self._forward_dora(base, x)
        if len(active) == 1:
            return base.forward_lora(x, *self.call_factors(active[0]), self._dropout_p(active[0]))
        dropping = [name for name in active if self._dropout_p(name) > 0.0]
        if not dropping:
            return self._forward_together(base, x)
        # every adapter drops inputs of its own; only the first one fits into the fused op
        y = base.forward_lora(x, *self.call_factors(active[0]), self._dropout_p(active[0]))
        for name in active[1:]:
            a, b, scaling = self.factors(name)
            dropped = nn.functional.dropout(x, self._dropout_p(name))
            update = nn.functional.linear(nn.functional.linear(dropped, a.to(x.dtype)), b.to(x.dtype))
            y = y + (update * scaling).to(y.dtype)
        return y

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(A [R, K], B [N, R], s) of an adapter's update s · B A, with their history for autograd."""
        return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]

    @torch.no_grad()
    def set_factors(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Writes A [R, K] and B [N, R] into an adapter that is here."""
        self.lora_A[name].weight.copy_(a), self.lora_B[name].weight.copy_(b)

    def products(self, name: str) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """factors() of every weight that the adapter changes here."""
        return [self.factors(name)]

    def set_products(self, name: str, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Writes the A and B of products() into an adapter that is here."""
        self.set_factors(name, *pairs[0])

    def call_factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """factors() for an op, whose scaling is a number: one that is a tensor (hotswap) is multiplied into B."""
        a, b, scaling = self.factors(name)
        return (a, b * scaling, 1.0) if isinstance(scaling, torch.Tensor) else (a, b, scaling)

    def forward_mixed(self, batch: MixedBatch, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The base's one product, and every adapter's update to its samples by one kernel; DoRA's by its samples apart."""
        # looked up once: with many adapters the modules' own look-ups take longer than the kernel
        lora_a, lora_b = dict(self.lora_A.items()), dict(self.lora_B.items())
        here = [name for name in batch.adapters if name in lora_a]
        if self.lora_magnitude_vector and any(name in self.lora_magnitude_vector for name in here):
            return super().forward_mixed(batch, x, *args, **kwargs)
        order, starts = batch.segments(x)
        y = self.base_layer(x, *args, **kwargs)
        if not here:
            return y
        if has_own_forward(self.base_layer, self.base._known_class()):  # hooks may keep what it gave
            y = y.clone()
        a, b, biases, scalings = [], [], [], []
        for name in batch.adapters:
            if name in lora_a:
                own_a, own_b, scaling = self.factors(name)
                bias = getattr(lora_b[name], "bias", None)
                if isinstance(scaling, torch.Tensor):  # hotswap's: as in call_factors
                    own_b, bias, scaling = own_b * scaling, None if bias is None else bias * scaling, 1.0
            else:  # rank 0: its samples keep the base's answer
                own_a, own_b, scaling = a_and_b_of_nothing(self.in_features, self.out_features, x.device)
                bias = None
            a.append(own_a), b.append(own_b), biases.append(bias), scalings.append(scaling)
        x = self._drop_mixed(batch, here, x.to(y.dtype))
        return ops.segmented_lora(y, x, order, starts, a, b, biases, scalings)

    def _drop_mixed(self, batch: MixedBatch, here: list[str], x: torch.Tensor) -> torch.Tensor:
        """dropout(x), each sample's with its adapter's probability."""
        dropouts = dict(self.lora_dropout.items())
        rates = {name: dropouts[name].p for name in here if dropouts[name].training}
        if not any(rates.values()):
            return x
        if len({rates.get(name, 0.0) for name in here}) == 1:
            return nn.functional.dropout(x, rates[here[0]])
        repeats = batch.repeats(x)
        rate = torch.tensor([rates.get(name, 0.0) for name in batch.names for _ in range(repeats)], device=x.device)
        rate = rate.view(-1, *[1] * (x.dim() - 1))
        kept = torch.rand(x.shape, device=x.device) >= rate
        return x * (kept / (1 - rate).clamp_min(1e-30)).to(x.dtype)

    def _forward_together(self, base, x: torch.Tensor) -> torch.Tensor:
        """Several adapters as one of the summed rank: A = [A₁; A₂], B = [s₁ B₁, s₂ B₂], so x is read once."""
        factors = [self.factors(name) for name in self.active]
        a = torch.cat([a for a, _, _ in factors])
        b = torch.cat([b * scaling for _, b, scaling in factors], dim=1)
        return base.forward_lora(x, a, b, 1.0, 0.0)

    def _forward_dora(self, base, x: torch.Tensor) -> torch.Tensor:
        """Each adapter's own y, of which all but one count only by how they differ from the base's."""
        y = None
        for name in self.active:
            one = base.forward_lora(x, *self.call_factors(name), self._dropout_p(name))
            if name in self.lora_magnitude_vector:
                gain = self.lora_magnitude_vector[name].weight / self.row_norms(name)
                one = scaled(one, gain)
                if base.bias is not None:  # which is not scaled
                    one = one + ((1 - gain) * base.bias).to(one.dtype)
            y = one if y is None else y + one
        return y if len(self.active) == 1 else y - (len(self.active) - 1) * self.base_layer(x)

    @torch.no_grad()
    def row_norms(self, name: str) -> torch.Tensor:
        """‖W + s B A‖ of every row [N], in fp32 or wider, by the identity above."""
        a, b, scaling = self.factors(name)
        wide = torch.promote_types(a.dtype, torch.float32)
        a, b = a.to(wide), b.to(wide)
        projected = self.base.project(a).to(wide)  # A Wᵀ [R, N]
        cross = (projected * b.T).sum(0)
        own = ((b @ (a @ a.T)) * b).sum(1)
        squares = self._base_square_norms().to(wide) + 2 * scaling * cross + scaling**2 * own
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def _base_square_norms(self) -> torch.Tensor:
        """‖w‖² of every row of W [N]; computed once, and again when the weight was written."""
        if torch.compiler.is_compiling() and self._row_norms is not None:
            return self._row_norms[1]
        weight = self.base_layer.weight
        key = None if torch.compiler.is_compiling() else (id(weight), weight._version, weight.device, weight.dtype)
        if key is None or self._row_norms is None or self._row_norms[0] != key:
            wide = torch.promote_types(self.base.weight_dtype, torch.float32)
            squares = self.base.get_weight(wide).square().sum(1)
            if key is None:
                return squares
            self._row_norms = key, squares
        return self._row_norms[1]

    @torch.no_grad()
    def reset_magnitude(self, name: str) -> None:
        """m = ‖W + s B A‖_row: y is then what it is without m."""
        magnitude = self.lora_magnitude_vector[name].weight
        magnitude.copy_(self.row_norms(name).view_as(magnitude))

    @torch.no_grad()
    def reinitialise(self, name: str) -> None:
        """A is drawn anew and B = 0, in place; the weights they made are someone else's affair (ReLoRA merges them)."""
        if name in self.followed:
            return  # with the embedding's
        a, b = draw_weights(self.in_features, self.out_features, self.r[name], True)
        self.lora_A[name].weight.copy_(a), self.lora_B[name].weight.copy_(b)

    def _bias(self, names: Iterable[str]) -> torch.Tensor | None:
        """Σ s · bias_B [N] of those adapters that have one (lora_bias)."""
        biases = [
            self.scaling[n] * self.lora_B[n].bias for n in names if getattr(self.lora_B[n], "bias", None) is not None
        ]
        return sum(biases[1:], start=biases[0]) if biases else None

    @torch.no_grad()
    def check_merge(self, names: Iterable[str], safe: bool) -> None:
        names = list(names)
        if self.base.bias is None and self._bias(self.mergeable(names)) is not None:
            raise ValueError("an adapter with lora_bias cannot be merged into a layer that has no bias")
        super().check_merge(names, safe)

    def _dropout_p(self, name: str) -> float:
        dropout = self.lora_dropout[name]
        return dropout.p if dropout.training else 0.0

    def get_delta_weight(self, name: str) -> torch.Tensor:
        """s · B A [N, K], in fp32 (fp64 for fp64 adapters)."""
        a, b, scaling = self.factors(name)
        wide = torch.promote_types(a.dtype, torch.float32)
        return (b.detach().to(wide) @ a.detach().to(wide)) * scaling

    def merged_weights(self, names: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W + Σ s · B A, summed in fp32 and not yet rounded to what the base stores; bias + Σ s · bias_B (lora_bias)."""
        deltas = [self.get_delta_weight(name) for name in names]
        weight = self.base.get_weight(deltas[0].dtype)
        for i, name in enumerate(names):
            if name in self.lora_magnitude_vector:  # g (W + s B A) − W
                whole = weight + deltas[i]
                gain = self.lora_magnitude_vector[name].weight.detach().flatten() / whole.norm(dim=1).clamp_min(1e-38)
                deltas[i] = gain[:, None] * whole - weight
        bias = self._bias(names)
        return sum(deltas, start=weight), None if bias is None else self.base.bias.detach() + bias.detach()

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}: r={rank}, scaling={self.scaling[name]:g}" for name, rank in self.r.items())
        return f"in_features={self.in_features}, out_features={self.out_features}, {{{ranks}}}, active={self.active}"


def a_and_b_of_nothing(K: int, N: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Factors of rank 0."""
    return torch.empty(0, K, device=device), torch.empty(N, 0, device=device), 1.0


_NUMBERS = ("r", "lora_alpha", "scaling")


class Magnitude(nn.Module):
    """DoRA's m as a module, so that its name in a state dict is PEFT's: lora_magnitude_vector.<adapter>.weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
