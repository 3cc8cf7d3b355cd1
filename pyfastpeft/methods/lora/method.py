"""How LoRA enters a model: which layers it takes, and what is said about its patterns."""

from __future__ import annotations

import warnings

from torch import nn

from pyfastpeft.methods.base import PeftType
from pyfastpeft.methods.layer_method import LayerMethod
from pyfastpeft.methods.lora.config import LoraConfig
from pyfastpeft.methods.lora.layer import LoraLinear
from pyfastpeft.methods.lora.targets import default_target_modules


class LoraMethod(LayerMethod):
    peft_type = PeftType.LORA
    config_class = LoraConfig
    layer_class = LoraLinear

    def fill_targets(self, model: nn.Module, config: LoraConfig, strict: bool) -> None:
        if config.target_modules is None:
            config.target_modules = default_target_modules(model)

    def check_targets(self, config: LoraConfig, targets: dict[str, nn.Module], strict: bool) -> None:
        for name, keys in config.unused_patterns(list(targets)).items():
            warnings.warn(f"LoraConfig: {name} has {keys}, which match none of the adapted layers", stacklevel=3)
