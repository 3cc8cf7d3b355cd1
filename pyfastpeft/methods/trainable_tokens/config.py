"""TrainableTokensConfig: Hugging Face PEFT's fields and defaults."""

from __future__ import annotations

import dataclasses

from pyfastpeft.methods.base import PeftConfig, PeftType
from pyfastpeft.methods.checks import check_flags, check_names
from pyfastpeft.trainable_tokens import check_tokens


@dataclasses.dataclass
class TrainableTokensConfig(PeftConfig):
    """Configuration of trainable tokens: y[t] = D[i] where t is the i-th of token_indices, else W[t].

    token_indices    the tokens, at least one, each once
    target_modules   the embeddings (or output heads): names, matched like LoraConfig's, or a regular expression; None: the
                     model's input embedding. A head that shares an embedding's weight follows it.
    init_weights     True: D begins as the rows it replaces, so that nothing changes at first; False: D ~ N(0, 1)
    """

    token_indices: list[int] = dataclasses.field(default_factory=list)
    target_modules: list[str] | str | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.TRAINABLE_TOKENS
        check_tokens(self, "token_indices", self.token_indices)
        self.token_indices = list(self.token_indices)
        check_names(self, "target_modules")
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            self.target_modules = sorted(self.target_modules)
        check_flags(self, "init_weights", "inference_mode")
