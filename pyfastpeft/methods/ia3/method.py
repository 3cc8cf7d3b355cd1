"""How (IA)³ enters a model: which layers it scales, and which of them on the input's side."""

from __future__ import annotations

from torch import nn

from pyfastpeft.methods.base import PeftType, named_by
from pyfastpeft.methods.ia3.config import IA3Config
from pyfastpeft.methods.ia3.layer import IA3Linear
from pyfastpeft.methods.ia3.targets import default_targets
from pyfastpeft.methods.layer_method import LayerMethod


class IA3Method(LayerMethod):
    peft_type = PeftType.IA3
    config_class = IA3Config
    layer_class = IA3Linear

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

        paths = find_targets(model, config, strict=False)
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
