"""How LoRA enters a model: find the linear layers, put LoraLinear around them."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from pyfastpeft.inject import (
    bias_tensors,
    find_targets,
    resolved_target_modules,
    warn_tied,
)
from pyfastpeft.methods.base import Method, PeftType, replace_module
from pyfastpeft.methods.lora.config import LoraConfig
from pyfastpeft.methods.lora.layer import LoraLinear
from pyfastpeft.methods.lora.targets import default_target_modules
from pyfastpeft.nn import as_base_linear
from pyfastpeft.saved_modules import add_saved_modules, check_saved_modules


class LoraMethod(Method):
    peft_type = PeftType.LORA
    config_class = LoraConfig

    def inject(
        self, model: nn.Module, config: LoraConfig, adapter_name: str, *, fp32: bool, init: bool, strict: bool
    ) -> LoraConfig:
        config = config.copy()
        if config.target_modules is None:
            config.target_modules = default_target_modules(model)
        targets = find_targets(model, config, strict=strict)
        saved = check_saved_modules(model, config, adapter_name, strict=strict)
        config.target_modules = resolved_target_modules(model, config, targets)
        for name, keys in config.unused_patterns(list(targets)).items():
            warnings.warn(f"LoraConfig: {name} has {keys}, which match none of the adapted layers", stacklevel=2)
        _note_storage(config, targets)
        warn_tied(model, targets)
        layers = []
        for path, module in targets.items():
            layer = module if isinstance(module, LoraLinear) else LoraLinear(module).train(module.training)
            layer.add_adapter(adapter_name, config, path, fp32=fp32, init=init)
            layers.append((module, layer))
        for module, layer in layers:
            if layer is not module:
                replace_module(model, module, layer)
        add_saved_modules(model, saved, adapter_name)
        return config

    def tensors(self, model: nn.Module, config: LoraConfig, adapter_name: str) -> dict[str, torch.Tensor]:
        return super().tensors(model, config, adapter_name) | bias_tensors(model, config.bias, LoraLinear)


def _note_storage(config: LoraConfig, targets: dict[str, nn.Module]) -> None:
    """Sets fan_in_fan_out to what the targets are, with a warning where the config said otherwise, as PEFT does."""
    kinds = {
        as_base_linear(m.base_layer if isinstance(m, LoraLinear) else m).fan_in_fan_out: type(m).__name__
        for m in targets.values()
    }
    if len(kinds) == 1 and config.fan_in_fan_out not in kinds:
        ((transposed, kind),) = kinds.items()
        warnings.warn(
            f"LoraConfig: fan_in_fan_out is {config.fan_in_fan_out} but the adapted layers are {kind}; set to "
            f"{transposed}",
            stacklevel=3,
        )
        config.fan_in_fan_out = transposed
