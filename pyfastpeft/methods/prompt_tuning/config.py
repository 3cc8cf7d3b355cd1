"""PromptTuningConfig: Hugging Face PEFT's fields and defaults."""

from __future__ import annotations

import dataclasses
import enum

from pyfastpeft.methods.base import PeftType
from pyfastpeft.methods.prompt_inputs import PromptInputConfig


class PromptTuningInit(str, enum.Enum):
    """How the virtual tokens begin: a text's embeddings, those of random tokens, or N(0, 1)."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclasses.dataclass
class PromptTuningConfig(PromptInputConfig):
    """Configuration of prompt tuning; the fields common to all prompt methods are those of PromptInputConfig.

    prompt_tuning_init       RANDOM: N(0, 1), PEFT's default, far larger than a language model's embeddings are;
                             SAMPLE_VOCAB: the embeddings of tokens drawn at random; TEXT: of prompt_tuning_init_text,
                             cut or repeated to num_virtual_tokens
    prompt_tuning_init_text, tokenizer_name_or_path, tokenizer_kwargs    for TEXT: the text, its tokenizer, and what
                             AutoTokenizer.from_pretrained gets beside its name (never trust_remote_code)
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROMPT_TUNING
        try:
            self.prompt_tuning_init = PromptTuningInit(self.prompt_tuning_init)
        except ValueError:
            names = ", ".join(PromptTuningInit.__members__)
            raise ValueError(
                f"PromptTuningConfig: prompt_tuning_init is {self.prompt_tuning_init!r}, expected one of {names}"
            ) from None
        is_text = self.prompt_tuning_init == PromptTuningInit.TEXT
        if is_text and not isinstance(self.prompt_tuning_init_text, str):
            raise ValueError(
                "PromptTuningConfig: prompt_tuning_init is TEXT and prompt_tuning_init_text "
                f"{self.prompt_tuning_init_text!r}, expected a text"
            )
        if is_text and not self.tokenizer_name_or_path:
            raise ValueError(
                "PromptTuningConfig: prompt_tuning_init is TEXT and tokenizer_name_or_path "
                f"{self.tokenizer_name_or_path!r}, expected the tokenizer's folder or name"
            )
        if self.tokenizer_kwargs and not is_text:
            raise ValueError("PromptTuningConfig: tokenizer_kwargs go with prompt_tuning_init='TEXT' only")
