"""BitFitConfig: which biases train. Hugging Face PEFT has no such method; the fields follow its conventions."""

from __future__ import annotations

import dataclasses

from pyfastpeft.methods.base import PeftConfig, PeftType
from pyfastpeft.methods.checks import check_flags, check_names, check_strings, names_to_set


@dataclasses.dataclass
class BitFitConfig(PeftConfig):
    """Configuration of BitFit: y = x Wᵀ + b with W frozen and b trained, from the value b has (0 where it is created).

    target_modules   which modules' biases: names, matched whole or as the end of a path; a regular expression that must
                     match the whole path; "all-linear" (every linear layer but the output head); None: every bias of
                     the model, and one for every linear layer that has none (create_biases)
    exclude_modules  names or a regular expression, taken out of the targets
    create_biases    give linear layers without a bias one, beginning at 0 (Llama and T5 have no biases at all; T-Few's
                     BitFit, Liu et al. 2022, does so). False: only biases that exist, and an error if there are none
    train_norms      also train the scales of LayerNorm, RMSNorm and the like (their biases are biases anyway)
    modules_to_save  modules trained whole and saved with the adapter; SEQ_CLS and TOKEN_CLS add "classifier", "score"
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    create_biases: bool = True
    train_norms: bool = False
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BITFIT
        check_names(self, "target_modules", "exclude_modules")
        check_strings(self, "modules_to_save", self.modules_to_save)
        check_flags(self, "create_biases", "train_norms", "inference_mode")
        names_to_set(self, "target_modules", "exclude_modules")
