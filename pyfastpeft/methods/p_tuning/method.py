"""P-tuning as a method: its encoder, beside what it shares with prompt tuning."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from pyfastpeft.methods.base import PeftType
from pyfastpeft.methods.p_tuning.config import PromptEncoderConfig, PromptEncoderReparameterizationType
from pyfastpeft.methods.p_tuning.encoder import PromptEncoder
from pyfastpeft.methods.prompt_inputs import PromptInputMethod


class PTuningMethod(PromptInputMethod):
    peft_type = PeftType.P_TUNING
    config_class = PromptEncoderConfig

    def make_encoder(self, model: nn.Module, config: PromptEncoderConfig) -> nn.Module:
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.MLP:
            if config.encoder_num_layers != PromptEncoderConfig.encoder_num_layers:
                warnings.warn(
                    "PromptEncoderConfig: an MLP has three layers; encoder_num_layers is ignored", stacklevel=6
                )
        with torch.device("cpu"):
            return _build(config, *self.shape(model, config))

    def empty_encoder(self, model: nn.Module, config: PromptEncoderConfig) -> nn.Module:
        with torch.device("meta"):
            return _build(config, *self.shape(model, config))


def _build(config: PromptEncoderConfig, rows: int, width: int) -> PromptEncoder:
    return PromptEncoder(
        rows,
        width,
        config.encoder_hidden_size or width,
        config.encoder_reparameterization_type,
        config.encoder_num_layers,
        config.encoder_dropout,
    )
