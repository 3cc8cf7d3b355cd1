"""How (IA)³ enters a model: which layers it scales, and which of them on the input's side."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from pyfastpeft.methods.base import PeftType, named_by
from pyfastpeft.methods.ia3.config import IA3Config
from pyfastpeft.methods.ia3.conv import IA3Conv
from pyfastpeft.methods.ia3.layer import IA3Linear
from pyfastpeft.methods.ia3.targets import default_targets
from pyfastpeft.methods.layer_method import LayerMethod
from pyfastpeft.methods.lora.combine import check_combination
from pyfastpeft.nn import as_base_linear
from pyfastpeft.nn.base_tables import BaseConv, as_base_layer


class IA3Method(LayerMethod):
    peft_type = PeftType.IA3
    config_class = IA3Config
    layer_class = IA3Linear

    def layer_class_for(self, bare: nn.Module) -> type[IA3Linear] | None:
        if as_base_linear(bare) is not None:
            return IA3Linear
        return IA3Conv if type(as_base_layer(bare)) is BaseConv else None

    def fill_targets(self, model: nn.Module, config: IA3Config, strict: bool) -> None:
        usual = default_targets(model)
        if config.target_modules is None:
            if usual is None:
                raise ValueError(
                    f"IA3Config: target_modules is None and there is no default for {type(model).__name__}; say which "
                    "layers to scale, and those of the feed-forward blocks in feedforward_modules as well"
                )
            outputs, inputs = usual
            if config.feedforward_modules is None:
                config.feedforward_modules = set(inputs)
            names = config.feedforward_modules
            config.target_modules = outputs | inputs | (names if isinstance(names, set) else set())
        elif config.feedforward_modules is None:
            config.feedforward_modules = set(usual[1]) if usual else set()
            config.feedforward_modules.intersection_update(self._used(model, config))

    def _used(self, model: nn.Module, config: IA3Config) -> set[str]:
        """The default feed-forward names that name one of the targets."""
        from pyfastpeft.inject import find_targets

        paths = find_targets(model, config, False, lambda bare: self.layer_class_for(bare) is not None)
        return {name for name in config.feedforward_modules if any(named_by(path, (name,)) for path in paths)}

    def check_targets(self, config: IA3Config, targets: dict[str, nn.Module], strict: bool) -> None:
        names = config.feedforward_modules
        inputs = {path for path in targets if config.is_feedforward(path)}
        lost = [names] if isinstance(names, str) and not inputs else []
        if isinstance(names, set):
            lost = sorted(name for name in names if not any(named_by(path, (name,)) for path in inputs))
        if lost and strict:
            raise ValueError(
                f"feedforward_modules: {lost} match none of the layers that target_modules names; a layer whose input is "
                "to be scaled must be a target too"
            )
        if isinstance(names, set) and isinstance(config.target_modules, set) and not names <= config.target_modules:
            # PEFT reads a file only if the one list holds the names of the other
            config.feedforward_modules = inputs
            config.target_modules = config.target_modules | inputs

    def add_weighted_adapter(self, adapted, adapters, weights, name, *how) -> None:
        """l = Σ w_i l_i in every layer (of the adapters that are there), as PEFT sums them; `how` counts for nothing."""
        check_combination(len(adapters), weights, "cat", None, "total")
        configs = [adapted.peft_config[each] for each in adapters]
        if any(config.modules_to_save for config in configs):
            raise ValueError("add_weighted_adapter: adapters with modules_to_save cannot be combined")
        layers = {p: m for p, m in adapted.layers() if isinstance(m, IA3Linear) and set(adapters) & set(m.ia3_l)}
        sides = {
            path: {layer.feedforward[each] for each in adapters if each in layer.ia3_l}
            for path, layer in layers.items()
        }
        mixed = [path for path, each in sides.items() if len(each) > 1]
        if mixed:
            raise ValueError(
                f"add_weighted_adapter: {mixed[0]} is a feed-forward layer in one adapter and not in another"
            )
        inputs = {path for path, each in sides.items() if each == {True}}
        config = dataclasses.replace(
            configs[0],
            target_modules=set(layers),
            feedforward_modules=inputs,
            exclude_modules=None,
            inference_mode=True,
        )
        wide = next(iter(next(iter(layers.values())).ia3_l.values())).dtype
        adapted.add_adapter(name, config, fp32=wide in (torch.float32, torch.float64), init=False)
        with torch.no_grad():
            for layer in layers.values():
                terms = [
                    w * layer.ia3_l[each] for each, w in zip(adapters, weights, strict=True) if each in layer.ia3_l
                ]
                layer.ia3_l[name].copy_(sum(terms[1:], start=terms[0]))
