"""IA3Config: Hugging Face PEFT's fields and defaults."""

from __future__ import annotations

import dataclasses
import re

from pyfastpeft.methods.base import PeftConfig, PeftType, named_by
from pyfastpeft.methods.checks import check_flags, check_names, check_strings, names_to_set


@dataclasses.dataclass
class IA3Config(PeftConfig):
    """Configuration of (IA)³: y = base(x) · l for most layers, y = base(x · l) for feed-forward ones.

    target_modules       which linear layers, as in LoraConfig: names, a regular expression, "all-linear", or None: the
                         usual ones of the architecture, which are PEFT's (on some they differ from the paper's keys,
                         values and feed-forward input: opt, bart, gemma and qwen scale the queries instead of the keys,
                         and bert's "output.dense" names the attention's output too)
    exclude_modules      names or a regular expression, taken out of the targets
    feedforward_modules  the layers whose input is scaled instead of the output, [K] values instead of [N]: names, matched
                         like targets, or a regular expression; None: the architecture's among the targets, none where
                         it is unknown. Names of a list that target_modules (a list too) does not hold are added to it;
                         with a string there, they must be among what it matches.
    fan_in_fan_out       whether the weight is stored [K, N] (GPT-2's Conv1D); found out by itself
    modules_to_save      modules trained whole and saved with the adapter
    init_ia3_weights     True: l = 1, so that nothing changes at first; False: l ~ N(0, 1)

    PEFT decides by the bare end of a path which layers are feed-forward ("dense" then names "up_dense" too); here a name
    begins at a dot.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.IA3
        names = ("target_modules", "exclude_modules", "feedforward_modules")
        check_names(self, *names)
        check_strings(self, "modules_to_save", self.modules_to_save)
        check_flags(self, "fan_in_fan_out", "init_ia3_weights", "inference_mode")
        names_to_set(self, *names)
        if isinstance(self.target_modules, set) and isinstance(self.feedforward_modules, set):
            self.target_modules |= self.feedforward_modules

    def is_feedforward(self, path: str) -> bool:
        """Whether feedforward_modules names the layer."""
        names = self.feedforward_modules
        if isinstance(names, str):
            return re.fullmatch(names, path) is not None
        return named_by(path, names or ())
