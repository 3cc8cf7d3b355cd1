"""How trainable tokens enter a model, and what their files repeat for modules that share a weight."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from pyfastpeft.inject import near_misses
from pyfastpeft.methods.base import KEY_PREFIX, Method, PeftConfig, PeftType, adapter_holders, bare_modules, named_by
from pyfastpeft.methods.trainable_tokens.config import TrainableTokensConfig
from pyfastpeft.token_modules import input_embedding, with_followers
from pyfastpeft.trainable_tokens import TokensLayer, add_trainable_tokens


class TrainableTokensMethod(Method):
    """TrainableTokensConfig -> a TokensLayer around every embedding named, and around what shares its weight.

    PEFT's files hold the rows of a shared weight once for each module that has it; so do ours, and reading one
    needs them to be equal.
    """

    peft_type = PeftType.TRAINABLE_TOKENS
    config_class = TrainableTokensConfig

    def inject(
        self, model: nn.Module, config: PeftConfig, adapter_name: str, *, fp32: bool, init: bool, strict: bool
    ) -> PeftConfig:
        config = config.copy()
        if config.target_modules is None:
            config.target_modules = input_embedding(model)
        modules = {path: module for path, module in bare_modules(model) if path}
        tokens = {path: list(config.token_indices) for path in _targets(config, modules, strict)}
        found = with_followers(modules, tokens, set(), set(), "TrainableTokensConfig", TokensLayer)
        add_trainable_tokens(
            model, found, adapter_name, fp32=fp32, init=config.init_weights or not init, kind=TokensLayer
        )
        return config

    def file_tensors(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> dict[str, torch.Tensor]:
        tensors = self.tensors(model, config, adapter_name)
        return tensors | {
            f"{KEY_PREFIX}{path}.{holder.rows_key}": holder.rows[adapter_name]
            for path, holder in adapter_holders(model)
            if isinstance(holder, TokensLayer) and holder.source is not None and adapter_name in holder.rows
        }

    def loading_tensors(self, model, config, adapter_name, resume):
        return self.file_tensors(model, config, adapter_name)

    def from_file(
        self, found: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor], config: PeftConfig
    ) -> Mapping[str, torch.Tensor]:
        found = dict(found)
        groups: dict[int, list[str]] = {}
        for key, tensor in live.items():
            groups.setdefault(id(tensor), []).append(key)
        for keys in groups.values():
            first, *others = [key for key in keys if key in found] or [None]
            for other in others:
                if not torch.equal(found[first], found[other]):
                    raise ValueError(
                        f"{first} and {other} differ in the file, and the model has one weight for both: it was trained on a "
                        "model whose weights are not tied"
                    )
            if first is not None:
                found |= {key: found[first] for key in keys if key not in found}
        return found


def _targets(config: TrainableTokensConfig, modules: dict[str, nn.Module], strict: bool) -> list[str]:
    """The paths that target_modules names."""
    wanted = config.target_modules
    if isinstance(wanted, str):
        paths, lost = [path for path in modules if re.fullmatch(wanted, path)], []
    else:
        paths = [path for path in modules if named_by(path, wanted)]
        lost = [name for name in wanted if not any(named_by(path, [name]) for path in paths)]
    if not paths or lost:
        names = lost or [wanted]
        usable = {path for path, module in modules.items() if isinstance(module, (nn.Embedding, nn.Linear))}
        message = f"target_modules: {names} match no module of the model{near_misses(names, usable)}"
        if strict or not paths:
            raise ValueError(message)
        warnings.warn(message, stacklevel=4)
    return paths
