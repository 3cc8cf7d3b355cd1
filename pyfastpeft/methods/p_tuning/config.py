"""PromptEncoderConfig: Hugging Face PEFT's fields and defaults."""

from __future__ import annotations

import dataclasses
import enum

from pyfastpeft.methods.base import PeftType
from pyfastpeft.methods.prompt_inputs import PromptInputConfig
from pyfastpeft.methods.prompt_learning import check_counts


class PromptEncoderReparameterizationType(str, enum.Enum):
    MLP = "MLP"
    LSTM = "LSTM"


@dataclasses.dataclass
class PromptEncoderConfig(PromptInputConfig):
    """Configuration of P-tuning; where the virtual tokens go is said by PromptInputConfig's template and
    placeholder_token_id.

    encoder_reparameterization_type  MLP: three linear layers with ReLU between them; LSTM: a bidirectional LSTM over
                                     the virtual tokens, then two linear layers with a ReLU
    encoder_hidden_size              h; None: token_dim
    encoder_num_layers               of the LSTM (an MLP has three always)
    encoder_dropout                  between the LSTM's layers, in training
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.P_TUNING
        try:
            kind = PromptEncoderReparameterizationType(self.encoder_reparameterization_type)
        except ValueError:
            names = ", ".join(PromptEncoderReparameterizationType.__members__)
            raise ValueError(
                "PromptEncoderConfig: encoder_reparameterization_type is "
                f"{self.encoder_reparameterization_type!r}, expected one of {names}"
            ) from None
        self.encoder_reparameterization_type = kind
        check_counts(self, "encoder_hidden_size", "encoder_num_layers")
        dropout = self.encoder_dropout
        if not isinstance(dropout, (int, float)) or isinstance(dropout, bool):
            raise TypeError(f"PromptEncoderConfig: encoder_dropout is {dropout!r}, expected a number")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"PromptEncoderConfig: encoder_dropout is {dropout}, expected 0 <= p < 1")
