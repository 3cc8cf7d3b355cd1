"""LayerMethod: what the methods that put a layer around each of target_modules (LoRA, AdaLoRA, (IA)³) have in common."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pyfastpeft.inject import bare_layer, bias_tensors, find_targets, resolved_target_modules, warn_tied
from pyfastpeft.methods.base import AdapterHolder, Method, MethodLayer, PeftConfig, replace_module
from pyfastpeft.nn import as_base_linear
from pyfastpeft.saved_modules import add_saved_modules, check_saved_modules
from pyfastpeft.token_modules import find_token_modules
from pyfastpeft.trainable_tokens import add_trainable_tokens


class LayerMethod(Method):
    """A method whose adapters live in `layer_class` around the layers that config.target_modules names.

    layer_class needs `add_adapter(name, config, path, *, fp32, init)`.
    """

    layer_class: type[MethodLayer]

    def layer_class_for(self, bare: nn.Module) -> type[MethodLayer] | None:
        """The layer (layer_class or a subclass of it) that goes around such a module; None: the method cannot adapt it."""
        return self.layer_class if as_base_linear(bare) is not None else None

    def check_layer(self, path: str, bare: nn.Module, config: PeftConfig) -> None:
        """Raises ValueError where this module cannot have an adapter of this config."""

    def fill_targets(self, model: nn.Module, config: PeftConfig, strict: bool) -> None:
        """Sets config.target_modules (and what goes with it) where the config leaves it to the architecture."""
        raise NotImplementedError

    def note_ties(self, model: nn.Module, config: PeftConfig, targets: dict[str, nn.Module]) -> None:
        """Says which of the targets share their weight with a module that stays as it is."""
        warn_tied(model, targets)

    def has_targets(self, config: PeftConfig) -> bool:
        """Whether target_modules is to name any layer."""
        return True

    def find_more(
        self, model: nn.Module, config: PeftConfig, targets: dict[str, nn.Module], saved: Iterable[str], strict: bool
    ) -> Any:
        """What add_more() adapts beside the targets, which it may change; every check before anything is changed."""

    def add_more(self, model: nn.Module, more: Any, config: PeftConfig, adapter_name: str, *, fp32: bool, init: bool):
        """Adapts what find_more() found."""

    def check_targets(self, config: PeftConfig, targets: dict[str, nn.Module], strict: bool) -> None:
        """Further checks and notes, before anything is changed; config may be filled in."""

    def inject(
        self, model: nn.Module, config: PeftConfig, adapter_name: str, *, fp32: bool, init: bool, strict: bool
    ) -> PeftConfig:
        config = config.copy()
        self.fill_targets(model, config, strict)
        targets = {}
        if self.has_targets(config):
            targets = find_targets(model, config, strict, lambda bare: self.layer_class_for(bare) is not None)
        self._check_same_method(targets)
        saved = check_saved_modules(model, config, adapter_name, strict=strict)
        tokens = find_token_modules(model, config, targets, saved)
        more = self.find_more(model, config, targets, saved, strict)
        config.target_modules = resolved_target_modules(model, config, targets)
        self.check_targets(config, targets, strict)
        _note_storage(config, targets)
        self.note_ties(model, config, targets)
        _note_fast_path(model, targets)
        for path, module in targets.items():
            self.check_layer(path, bare_layer(module), config)
        layers = []
        for path, module in targets.items():
            made = isinstance(module, MethodLayer)
            layer = module if made else self.layer_class_for(module)(module).train(module.training)
            layer.add_adapter(adapter_name, config, path, fp32=fp32, init=init)
            layers.append((module, layer))
        for module, layer in layers:
            if layer is not module:
                replace_module(model, module, layer)
        self.add_more(model, more, config, adapter_name, fp32=fp32, init=init)
        add_saved_modules(model, saved, adapter_name, config)
        add_trainable_tokens(model, tokens, adapter_name, fp32=fp32)
        return config

    def tensors(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> dict[str, torch.Tensor]:
        biases = bias_tensors(model, getattr(config, "bias", "none"), self.layer_class)
        return super().tensors(model, config, adapter_name) | biases

    def _check_same_method(self, targets: dict[str, nn.Module]) -> None:
        for path, module in targets.items():
            if isinstance(module, AdapterHolder) and type(module) is not self.layer_class_for(bare_layer(module)):
                raise ValueError(
                    f"{path} has an adapter of another method already ({type(module).__name__}); a layer holds adapters "
                    f"of one method: take it out of target_modules, or delete_adapter() the others first"
                )


def _note_fast_path(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Warns where torch's own encoder layer reads the weights of a target past it (an adapted self_attn keeps it from that)."""
    chosen = {id(module) for module in targets.values()}
    for path, layer in model.named_modules():
        if not isinstance(layer, nn.TransformerEncoderLayer) or id(layer.self_attn) in chosen:
            continue
        names = [name for name in ("linear1", "linear2") if id(getattr(layer, name)) in chosen]
        if names and torch.backends.mha.get_fastpath_enabled():
            warnings.warn(
                f"{path or 'the model'} is an nn.TransformerEncoderLayer, whose fast path in eval mode reads the weight of "
                f"{' and '.join(names)} past the adapter; call torch.backends.mha.set_fastpath_enabled(False), or merge",
                stacklevel=4,
            )


def _note_storage(config: PeftConfig, targets: dict[str, nn.Module]) -> None:
    """Sets fan_in_fan_out to what the targets are, with a warning where the config said otherwise, as PEFT does."""
    views = ((as_base_linear(bare_layer(m)), type(m).__name__) for m in targets.values())
    kinds = {view.fan_in_fan_out: kind for view, kind in views if view is not None}
    if len(kinds) == 1 and config.fan_in_fan_out not in kinds:
        ((transposed, kind),) = kinds.items()
        warnings.warn(
            f"{type(config).__name__}: fan_in_fan_out is {config.fan_in_fan_out} but the adapted layers are {kind}; "
            f"set to {transposed}",
            stacklevel=4,
        )
        config.fan_in_fan_out = transposed
