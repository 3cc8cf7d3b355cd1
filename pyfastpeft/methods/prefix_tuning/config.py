"""PrefixTuningConfig: Hugging Face PEFT's fields and defaults."""

from __future__ import annotations

import dataclasses

from pyfastpeft.methods.base import PeftType
from pyfastpeft.methods.checks import check_flags
from pyfastpeft.methods.prompt_learning import PromptLearningConfig, check_counts


@dataclasses.dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Configuration of prefix tuning; the fields common to all prompt methods are those of PromptLearningConfig.

    prefix_projection    True: embeddings [v, d] through Linear(d, h) - tanh - Linear(h, columns), the original paper's
                         reparametrisation; False: the prefix itself is trained (P-tuning v2)
    encoder_hidden_size  h; None: token_dim
    init_weights         "zero": all keys and values begin at 0 (which is not the same as no prefix: softmax attends to
                         a zero key too); None: as torch initialises the layers
    token_dim, num_attention_heads    of keys: heads × head size, fewer than those of queries in grouped-query attention
    """

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING
        check_counts(self, "encoder_hidden_size")
        check_flags(self, "prefix_projection")
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"PrefixTuningConfig: init_weights is {self.init_weights!r}, expected None or 'zero'")
