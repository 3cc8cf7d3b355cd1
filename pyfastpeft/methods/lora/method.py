"""How LoRA enters a model: which layers it takes, and what is said about its patterns."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pyfastpeft.inject import sharing_weights, tied_targets, warn_tied
from pyfastpeft.methods.base import KEY_PREFIX, PeftType, bare_modules
from pyfastpeft.methods.layer_method import LayerMethod
from pyfastpeft.methods.lora.attention import LoraAttention, check_attention
from pyfastpeft.methods.lora.combine import KINDS, check_combination, combine_factors
from pyfastpeft.methods.lora.config import LoraConfig
from pyfastpeft.methods.lora.initial import takes_from_base
from pyfastpeft.methods.lora.layer import LoraLinear
from pyfastpeft.methods.lora.parameters import LoraParameters, add_parameters, find_parameters
from pyfastpeft.methods.lora.tables import LoraConv, LoraConvTranspose, LoraEmbedding, check_table
from pyfastpeft.methods.lora.targets import default_target_modules
from pyfastpeft.methods.lora.tied import add_followers, check_agreement, find_tied_targets, followers_tensors
from pyfastpeft.nn.base_tables import BaseAttention, BaseConv, BaseConvTranspose, BaseEmbedding, as_base_layer
from pyfastpeft.replicate_layers import replicate_layers, restore_layers
from pyfastpeft.saved_modules import ModulesToSaveWrapper


class LoraMethod(LayerMethod):
    peft_type = PeftType.LORA
    config_class = LoraConfig
    layer_class = LoraLinear
    resume_name = "base_weights.safetensors"  # what ReLoRA has merged into the base

    def fill_targets(self, model: nn.Module, config: LoraConfig, strict: bool) -> None:
        if config.target_modules is None:
            try:
                config.target_modules = default_target_modules(model)
            except ValueError:
                if not config.target_parameters:
                    raise
                config.target_modules = set()

    def has_targets(self, config: LoraConfig) -> bool:
        return bool(config.target_modules) or not config.target_parameters

    def find_more(self, model: nn.Module, config: LoraConfig, targets: dict, saved: Iterable[str], strict: bool) -> Any:
        followers = find_tied_targets(model, config, targets, saved) if config.ensure_weight_tying else {}
        return find_parameters(model, config, targets, strict), followers

    def add_more(self, model: nn.Module, more: Any, config: LoraConfig, adapter_name: str, *, fp32: bool, init: bool):
        parameters, followers = more
        add_parameters(model, parameters, config, adapter_name, fp32=fp32, init=init)
        add_followers(model, followers, config, adapter_name)

    def note_ties(self, model: nn.Module, config: LoraConfig, targets: dict[str, nn.Module]) -> None:
        if not config.ensure_weight_tying:
            warn_tied(model, targets)

    def layer_class_for(self, bare: nn.Module) -> type[LoraLinear] | None:
        view = as_base_layer(bare)
        kinds = {
            BaseAttention: LoraAttention,
            BaseConv: LoraConv,
            BaseConvTranspose: LoraConvTranspose,
            BaseEmbedding: LoraEmbedding,
        }
        return None if view is None else kinds.get(type(view), self.layer_class)

    def check_layer(self, path: str, bare: nn.Module, config: LoraConfig) -> None:
        if isinstance(bare, nn.MultiheadAttention):
            check_attention(path, bare, config)
        check_table(path, bare, config)

    def check_targets(self, config: LoraConfig, targets: dict[str, nn.Module], strict: bool) -> None:
        if config.target_parameters:
            return  # the patterns are for their paths too
        for name, keys in config.unused_patterns(list(targets)).items():
            warnings.warn(f"LoraConfig: {name} has {keys}, which match none of the adapted layers", stacklevel=3)

    def inject(self, model: nn.Module, config: LoraConfig, adapter_name: str, *, init: bool, **how) -> LoraConfig:
        replicated = replicate_layers(model, config)
        try:
            config = super().inject(model, config, adapter_name, init=init, **how)
            if init and takes_from_base(config.init_lora_weights):
                self._take_from_base(model, config, adapter_name, keep_adapter=False)
        except BaseException:
            if replicated:
                restore_layers(model)
            raise
        return config

    def _take_from_base(self, model: nn.Module, config: LoraConfig, adapter_name: str, keep_adapter: bool) -> None:
        """Changes the base as init_lora_weights says. Holds a copy of the weights meanwhile, for the case of an error."""
        layers, undo, errors = self._layers(model, adapter_name), [], {}
        # an embedding beside them begins as plain LoRA, as in PEFT
        layers = {
            path: layer
            for path, layer in layers.items()
            if not isinstance(layer, LoraEmbedding) and adapter_name not in layer.followed
        }
        for path, other in tied_targets(model, layers):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the weight of {path}, which is {other}'s too; leave "
                f"{path} out of target_modules"
            )
        shared = sharing_weights(layers)
        if shared:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the weight of {shared[0]}, which another adapted layer "
                "shares (layer_replication); use True, False, 'gaussian' or 'orthogonal'"
            )
        try:
            for path, layer in layers.items():
                if layer.merged_adapters:
                    raise RuntimeError(f"{path} has merged adapters; unmerge_adapter() first")
                undo.append((layer, layer.base.snapshot_weight()))
                errors[path] = layer.take_from_base(adapter_name, config, path, keep_adapter)
        except BaseException:
            for layer, weight in undo:
                layer.base.restore_weight(weight)
                layer.taken.discard(adapter_name)
            raise
        lost = [error for path, error in errors.items() if layers[path].base.is_quantized]
        if lost:
            warnings.warn(
                f"init_lora_weights={config.init_lora_weights!r}: what is left of {len(lost)} weights was quantised again, "
                f"which changed it by {sum(lost) / len(lost):.2%} on average, relative to its norm",
                stacklevel=4,
            )

    def add_weighted_adapter(self, adapted, adapters, weights, name, kind, svd_rank, clamp, density, sign) -> None:
        configs = [adapted.peft_config[each] for each in adapters]
        kind = check_combination(len(adapters), weights, kind, density, sign)
        if any(config.lora_bias for config in configs):
            raise ValueError("add_weighted_adapter: adapters with lora_bias cannot be combined")
        for field in ("trainable_token_indices", "target_parameters"):
            if any(getattr(config, field) for config in configs):
                raise ValueError(f"add_weighted_adapter: adapters with {field} cannot be combined")
        if any(config.use_dora for config in configs):
            raise ValueError("add_weighted_adapter: DoRA adapters have no sum; merge_adapter() them one by one")
        layers = {p: m for each in adapters for p, m in self._layers(adapted.model, each).items()}
        # in the model's order, with each layer's own adapters
        held = {path: [each for each in adapters if each in layer.r] for path, layer in layers.items()}
        ranks = {path: [layers[path].r[each] for each in names] for path, names in held.items()}
        if kind in KINDS and any(len(set(each)) > 1 for each in ranks.values()):
            raise ValueError(
                f"add_weighted_adapter: {kind} needs adapters of equal ranks, these have "
                f"{[config.r for config in configs]}; use 'cat' or a kind with svd"
            )
        highest = max(max(each) for each in ranks.values())
        rank = max(map(sum, ranks.values())) if kind == "cat" else highest
        rank = (svd_rank or highest) if kind.endswith("svd") else rank
        saved = [each for each in adapters if _saved(adapted, each)]
        if len(saved) > 1:
            raise ValueError(f"add_weighted_adapter: {saved} each have modules_to_save, which cannot be combined")
        factors = {}
        for path, names in held.items():
            layer, own = layers[path], [weights[adapters.index(each)] for each in names]
            products = zip(*(layer.products(each) for each in names), strict=True)  # of each adapter the same ones
            factors[path] = [combine_factors(list(p), own, kind, rank, density, sign, clamp) for p in products]
        config = dataclasses.replace(
            configs[0], r=rank, lora_alpha=rank, rank_pattern={}, alpha_pattern={}, use_rslora=False, bias="none",
            init_lora_weights=True, loftq_config={}, layers_to_transform=None, layers_pattern=None, exclude_modules=None,
            ensure_weight_tying=all(config.ensure_weight_tying for config in configs),
            target_modules=set(layers), modules_to_save=adapted.peft_config[saved[0]].modules_to_save if saved else None,
            inference_mode=True,
        )  # fmt: skip
        wide = next(iter(layers.values())).products(held[next(iter(layers))][0])[0][0].dtype
        adapted.add_adapter(name, config, fp32=wide in (torch.float32, torch.float64), init=False)
        with torch.no_grad():
            for path, layer in self._layers(adapted.model, name).items():
                if name not in layer.followed:
                    layer.set_products(name, factors[path])
            for source, target in zip(_saved(adapted, saved[0]) if saved else (), _saved(adapted, name), strict=True):
                target.copy_(source)

    def file_tensors(self, model: nn.Module, config: LoraConfig, adapter_name: str) -> dict[str, torch.Tensor]:
        """Without the ranks that prepare_model_for_compiled_hotswap added, and with the factors of layers that follow an
        embedding, which PEFT's files have."""
        tensors, cut = self.tensors(model, config, adapter_name), {}
        for path, layer in bare_modules(model):
            if isinstance(layer, (self.layer_class, LoraParameters)) and adapter_name in layer.held_adapters():
                for factor in layer.ranked(adapter_name):
                    rank = min(config.rank_for(factor.path(path)), factor.rank)
                    cut[f"{KEY_PREFIX}{path}.{factor.key}"] = factor.cut(rank)
        return tensors | cut | followers_tensors(model, adapter_name, cut)

    def from_file(self, found, live, config: LoraConfig):
        check_agreement(found, live)
        return found

    def resume_tensors(self, model: nn.Module, config: LoraConfig, adapter_name: str) -> dict[str, torch.Tensor]:
        """The weights of the layers whose base ReLoRA has changed, as their state dicts have them."""
        tensors = {}
        for path, layer in self._layers(model, adapter_name).items():
            if layer.base_changed:
                tensors |= {f"{path}.{key}": tensor for key, tensor in _weight_state(layer.base_layer).items()}
        if tensors:
            warnings.warn(
                f"the base's weights were changed by ReLoRA and are saved in {self.resume_name}; pyfastpeft reads it, "
                "Hugging Face PEFT does not: for PEFT save merge_and_unload() as a model",
                stacklevel=3,
            )
        return tensors

    def loading_tensors(self, model: nn.Module, config: LoraConfig, adapter_name: str, resume) -> dict:
        layers, problems = self._layers(model, adapter_name), []
        for path in _paths(resume):
            expected = _weight_state(layers[path].base_layer) if path in layers else {}
            if _shapes(expected) != _shapes(_below(resume, path)):
                problems.append(path)
        if problems:
            raise ValueError(
                f"{self.resume_name} does not fit the model, nothing was loaded: {len(problems)} layers differ (first: "
                f"{problems[0]}). Is it the base model, quantised the same way, that the adapter was trained on?"
            )
        return self.tensors(model, config, adapter_name) | followers_tensors(model, adapter_name)

    def finish_loading(self, model: nn.Module, config: LoraConfig, adapter_name: str, live, resume) -> None:
        layers = self._layers(model, adapter_name)
        if not resume and takes_from_base(config.init_lora_weights):
            # the file holds A and B alone: the original base gives up their first values once more, unless it has
            if not any(adapter_name in layer.taken for layer in layers.values()):
                self._take_from_base(model, config, adapter_name, keep_adapter=True)
        for path in _paths(resume):
            layers[path].base_layer.load_state_dict(_below(resume, path), strict=False)
            layers[path].base_changed = True

    def _layers(self, model: nn.Module, adapter_name: str) -> dict[str, LoraLinear]:
        holders = ((path, m) for path, m in bare_modules(model) if isinstance(m, self.layer_class))
        return {path: layer for path, layer in holders if adapter_name in layer.held_adapters()}


def _saved(adapted, name: str) -> list[torch.Tensor]:
    """The tensors of an adapter's modules_to_save, in the model's order."""
    holders = (holder for _, holder in adapted.holders() if isinstance(holder, ModulesToSaveWrapper))
    return [tensor for holder in holders for tensor in holder.adapter_tensors(name).values()]


def _weight_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weight's part of a linear module's state dict; of a 4-bit one with its statistics."""
    return {k: t for k, t in module.state_dict(keep_vars=True).items() if k == "weight" or k.startswith("weight.")}


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size | None]:
    """Of all but the text of a 4-bit weight's statistics, whose length differs with its numbers."""
    return {key: None if ".quant_state." in key else tensor.shape for key, tensor in state.items()}


def _paths(resume: dict[str, torch.Tensor]) -> list[str]:
    return [key.removesuffix(".weight") for key in resume if key.endswith(".weight")]


def _below(resume: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(f"{path}."): t for k, t in resume.items() if k.startswith(f"{path}.weight")}
