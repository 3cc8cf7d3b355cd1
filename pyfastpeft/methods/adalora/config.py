"""AdaLoraConfig: Hugging Face PEFT's fields and defaults."""

from __future__ import annotations

import dataclasses
import warnings

from pyfastpeft.methods.base import PeftType
from pyfastpeft.methods.checks import check_finite, check_integers
from pyfastpeft.methods.lora.config import LoraConfig


@dataclasses.dataclass
class AdaLoraConfig(LoraConfig):
    """Configuration of AdaLoRA: y = base(x) + s · B (E ⊙ A) dropout(x), E [R, 1] singular values that are pruned.

    With T = total_step: the first tinit steps keep all init_r · (number of layers) triplets; then, every deltaT steps, the
    least important ones of all layers lose their E, until at step T − tfinal only target_r · (number of layers) are left;
    the last tfinal steps train these.

    target_r, init_r   average rank at the end, and rank of every layer at the start; s = lora_alpha / (init_r + 1e-5)
                       throughout (lora_alpha / init_r, but for PEFT's guard)
    tinit, tfinal, deltaT, total_step   the schedule, in optimizer steps; total_step must be given
    beta1, beta2       smoothing of sensitivity and uncertainty
    orth_reg_weight    times the mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ (Frobenius) over the layers, added to the loss in
                       training (PEFT adds it in evaluation too)
    rank_pattern       {"<path>.lora_E": [kept or not, ...]}: what the allocation arrived at; written by it

    The learning rate: E starts at 0, and Adam moves an entry by at most about its learning rate in a step, so after t steps
    the update's singular values are below s · rate · t as long as the penalty holds A and B near orthonormal. LoRA's B has N · R
    entries that each move as far. What is usual for LoRA leaves AdaLoRA far behind in a short run; begin with ten times that.

    The other fields are LoraConfig's; r, use_rslora and alpha_pattern count for nothing here, as in PEFT.
    """

    rank_pattern: dict | None = None
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADALORA
        self.rank_pattern = self.rank_pattern or None
        ignored = {"r": self.r != 8, "use_rslora": self.use_rslora, "alpha_pattern": bool(self.alpha_pattern)}
        for name, given in ignored.items():
            if given:
                hint = "; the initial rank is init_r" if name == "r" else ""
                warnings.warn(f"AdaLoraConfig: {name} counts for nothing in AdaLoRA{hint}", stacklevel=3)

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        if not isinstance(self.init_lora_weights, bool):
            raise ValueError(f"AdaLoraConfig: init_lora_weights is {self.init_lora_weights!r}, expected True or False")

    def _unsupported(self) -> frozenset[str]:
        return super()._unsupported() | {
            "use_dora",
            "lora_bias",
            "loftq_config",
            "target_parameters",
            "layer_replication",
            "ensure_weight_tying",
        }

    def _check_ranks(self) -> None:
        if self.total_step is None:
            raise ValueError(
                "AdaLoraConfig: total_step is None, expected the number of optimizer steps of the whole training: the "
                "ranks are allocated by it"
            )
        check_integers(
            self, 1, target_r=self.target_r, init_r=self.init_r, deltaT=self.deltaT, total_step=self.total_step
        )
        check_integers(self, 0, tinit=self.tinit, tfinal=self.tfinal)
        check_finite(self, beta1=self.beta1, beta2=self.beta2, orth_reg_weight=self.orth_reg_weight)
        for name in ("beta1", "beta2"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"AdaLoraConfig: {name} is {getattr(self, name)}, expected 0 < {name} < 1")
        if self.orth_reg_weight < 0.0:
            raise ValueError(f"AdaLoraConfig: orth_reg_weight is {self.orth_reg_weight}, expected at least 0")
        if self.target_r > self.init_r:
            raise ValueError(
                f"AdaLoraConfig: target_r is {self.target_r}, expected at most init_r = {self.init_r}: ranks only shrink"
            )
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"AdaLoraConfig: tinit {self.tinit} and tfinal {self.tfinal} leave no step of total_step "
                f"{self.total_step} for the allocation; lower one of them"
            )
        for key, kept in self.rank_pattern.items():
            if not isinstance(kept, list) or not all(isinstance(each, bool) for each in kept):
                raise TypeError(f"AdaLoraConfig: rank_pattern[{key!r}] is {kept!r}, expected a list of booleans")

    def kept_at(self, path: str) -> list[bool] | None:
        """Which of the init_r triplets of a layer the rank pattern keeps; None where there is no pattern."""
        return None if self.rank_pattern is None else self.rank_pattern.get(f"{path}.lora_E")
