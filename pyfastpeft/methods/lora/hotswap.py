"""Hotswap: another LoRA adapter's values in the place of a loaded one's, without compiling the model again.

    model = PeftModel.from_pretrained(base, "adapter-0")
    prepare_model_for_compiled_hotswap(model, target_rank=64)     # before torch.compile: the highest rank of all to come
    model = torch.compile(model)
    hotswap_adapter(model, "adapter-1", adapter_name="default")

A compiled graph has ranks and numbers built in. So ranks are padded to one (rows of zeros in A, columns in B, which change
nothing), scalings become tensors, and a swap writes values into what is there. Names and arguments are PEFT's. All of LoRA's
layers can be swapped: linear ones, embeddings, convolutions, nn.MultiheadAttention, Parameters (PEFT: linear ones and Conv2d).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pyfastpeft import checkpoint
from pyfastpeft.adapted_model import AdaptedModel
from pyfastpeft.inject import find_targets
from pyfastpeft.methods.base import KEY_PREFIX, PeftType, adapter_holders
from pyfastpeft.methods.lora.attention import LoraAttention
from pyfastpeft.methods.lora.config import LoraConfig
from pyfastpeft.methods.lora.factor import Factor
from pyfastpeft.methods.lora.initial import takes_from_base
from pyfastpeft.methods.lora.layer import LoraLinear
from pyfastpeft.methods.lora.method import LoraMethod
from pyfastpeft.methods.lora.parameters import LoraParameters, find_parameters
from pyfastpeft.methods.lora.tables import LoraConv, LoraConvTranspose, LoraEmbedding
from pyfastpeft.methods.lora.tied import check_agreement, followers_tensors
from pyfastpeft.methods.registry import method_for

_KINDS = (LoraLinear, LoraEmbedding, LoraConv, LoraConvTranspose, LoraAttention, LoraParameters)
_HUB_KEYWORDS = frozenset("revision token cache_dir force_download local_files_only proxies".split())


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Makes room in a model's LoRA adapters for others of up to target_rank, and their scalings tensors; in place.

    Call it once the first adapter is there and before torch.compile.
    target_rank      the highest rank of the adapters to come; None: ranks stay
    config           configs (such as model.peft_config) whose r becomes target_rank, and whose lora_alpha is changed to
                     leave the scaling as it is; without it, files keep the adapter's own rank
    check_compiled   what to do with a model that is compiled already: "error", "warn" or "ignore"
    Raises ValueError, with nothing changed: a compiled model, no LoRA adapter, an adapter of a higher rank, one that is
    merged, a convolution whose groups do not divide target_rank.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled is {check_compiled!r}, expected 'error', 'warn' or 'ignore'")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        message = "prepare_model_for_compiled_hotswap: the model is compiled already, and would be compiled again"
        if check_compiled == "error":
            raise ValueError(f"{message}; call it before torch.compile")
        if check_compiled == "warn":
            warnings.warn(message, stacklevel=2)
    if target_rank is not None and (
        isinstance(target_rank, bool) or not isinstance(target_rank, int) or target_rank < 1
    ):
        raise ValueError(f"target_rank is {target_rank!r}, expected a positive integer or None")
    layers = _lora_layers(getattr(model, "_orig_mod", model))
    if not layers:
        raise ValueError("prepare_model_for_compiled_hotswap: the model has no LoRA adapter; load the first one before")
    for path, layer in layers.items():
        if layer.merged_adapters:
            raise ValueError(f"{path}: adapters {list(layer.merged_adapters)} are merged; unmerge_adapter() first")
        for name in layer.held_adapters() if target_rank is not None else ():
            for factor in layer.ranked(name):
                if factor.rank > target_rank:
                    raise ValueError(
                        f"{path}: adapter {name!r} has rank {factor.rank}, more than target_rank {target_rank}"
                    )
                groups = _groups(layer)
                if target_rank % groups:
                    raise ValueError(
                        f"{path} is a convolution with groups={groups}, which must divide target_rank, {target_rank}"
                    )
    for layer in layers.values():
        for name in layer.held_adapters():
            if target_rank is not None:
                _resize(layer, name, target_rank)
            if not _followed(layer, name):
                layer.scaling_as_tensor(name)
    _relink(layers)
    if target_rank is not None and config:
        for each in config.values() if isinstance(config, dict) else (config,):
            _raise_rank(each, target_rank)


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike,
    adapter_name: str,
    torch_device: Any = None,
    **kwargs: Any,
) -> None:
    """Puts the LoRA adapter of a folder (or hub repository) in the place of a loaded one, under the same name.

    model          a PeftModel, or what torch.compile made of it
    adapter_name   the adapter to replace, such as "default"; it gets the file's values, scalings and config
    torch_device   accepted for PEFT's sake, without effect: values go where the old ones are
    kwargs         subfolder and the hub's revision, token, cache_dir, …

    A compiled model is not compiled again if prepare_model_for_compiled_hotswap() made room. Layers that the new adapter
    does not have add nothing afterwards; ranks, alpha, rsLoRA and dropout may differ (PEFT refuses the last three).

    Raises ValueError, naming the file and what does not fit, with the model as it was: another method; DoRA, lora_bias,
    biases or tied weights in one of the two alone; layers or saved modules that the loaded adapter does not have; tensors
    that are missing or of wrong shape; a rank above what was prepared; an initial value that changes the base (PiSSA, OLoRA,
    LoftQ); merged adapters.
    """
    adapted = _adapted(model)
    subfolder = kwargs.pop("subfolder", None)
    unknown = sorted(set(kwargs) - _HUB_KEYWORDS)
    if unknown:
        raise TypeError(f"hotswap_adapter: unknown arguments {unknown}; expected some of {sorted(_HUB_KEYWORDS)}")
    former = adapted.peft_config[adapted.check_known(adapter_name)]
    config = checkpoint.read_config(model_name_or_path, subfolder, **kwargs).copy()
    found = checkpoint.read_tensors(model_name_or_path, subfolder, **kwargs)
    source = os.fspath(model_name_or_path)
    _check_configs(source, former, config)
    layers = _swappable(adapted, adapter_name)
    here = _factors_of(adapted.model, config, layers, adapter_name)
    found = {key: t for key, t in found.items() if ".original_module." not in key and ".modules_to_save." not in key}
    _swap(adapted, adapter_name, source, config, found, here)
    checkpoint.warn_not_finite(source, found)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """hotswap_adapter() with tensors that are here already.

    state_dict         by the keys of a file ("….q_proj.lora_A.weight") or of the model ("….lora_A.default.weight")
    config             the new adapter's, for its ranks, scalings and target_parameters; it becomes model.peft_config[adapter_name],
                       so that a later save_pretrained() writes what is here
    parameter_prefix   what the names of LoRA's tensors begin with

    Layers for which the state dict has nothing add nothing afterwards. Raises ValueError, with the model as it was, for keys
    that are not the adapter's, for missing partners (A without B), and else as hotswap_adapter.
    """
    adapted = _adapted(model)
    former = adapted.peft_config[adapted.check_known(adapter_name)]
    if not isinstance(config, LoraConfig):
        raise TypeError(f"hotswap_adapter_from_state_dict: config is a {type(config).__name__}, expected a LoraConfig")
    if not isinstance(state_dict, Mapping) or not all(isinstance(t, torch.Tensor) for t in state_dict.values()):
        raise TypeError("hotswap_adapter_from_state_dict: state_dict is not a mapping of names to tensors")
    _check_configs("the state dict", former, config)
    layers = _swappable(adapted, adapter_name)
    found = {_file_key(key, adapter_name, parameter_prefix): tensor for key, tensor in state_dict.items()}
    here, parameters = (
        {},
        {p: names for p, (_, names) in find_parameters(adapted.model, config, {}, strict=False).items()},
    )
    for path, layer in layers.items():
        keys = {key.removeprefix(f"{KEY_PREFIX}{path}.") for key in found if key.startswith(f"{KEY_PREFIX}{path}.")}
        if keys or _followed(layer, adapter_name):
            here[path] = layer.ranked(adapter_name, parameters.get(path, ()))
    here = {path: factors for path, factors in here.items() if factors}
    _swap(adapted, adapter_name, "the state dict", config.copy(), found, here, only=parameter_prefix)


def _file_key(key: str, name: str, prefix: str) -> str:
    """The key of a file: without torch.compile's prefix and the adapter's name behind LoRA's part."""
    key = key.replace("_orig_mod.", "")
    pattern = rf"^(.*\.)?({re.escape(prefix)}\w+)\.{re.escape(name)}(\.weight|\.bias)?$"
    match = re.match(pattern, key)
    if not match:
        return key
    path, part, rest = match[1] or "", match[2], match[3] or ""
    return f"{path}{part}" if part == f"{prefix}magnitude_vector" else f"{path}{part}{rest}"


def _swap(
    adapted: AdaptedModel,
    name: str,
    source: str,
    config: LoraConfig,
    found: dict[str, torch.Tensor],
    here: dict[str, list[Factor]],
    only: str | None = None,
) -> None:
    """Checks everything, then writes: `here` has the new adapter's factors by its layers, the others are emptied.

    only   leave what is not LoRA's own (by this part of its keys) as it is
    """
    layers = _swappable(adapted, name)
    tied = followers_tensors(adapted.model, name)
    live = method_for(PeftType.LORA).tensors(adapted.model, adapted.peft_config[name], name)
    if tied and any(key in found for key in tied):
        check_agreement(found, live | tied)
    found = {key: tensor for key, tensor in found.items() if key not in tied}
    expected, factors = {}, {}
    for key, tensor in live.items():
        path = next((p for p in layers if key.startswith(f"{KEY_PREFIX}{p}.")), None)
        lora = path is not None and ".lora_" in key
        if only is not None and not lora:
            continue
        keys = {factor.key for factor in layers[path].ranked(name)} if lora else ()
        if not lora or (path in here and key.removeprefix(f"{KEY_PREFIX}{path}.") not in keys):
            expected[key] = tensor  # biases, DoRA's m, saved modules
    for path, each in here.items():
        for factor in each:
            rank = config.rank_for(factor.path(path))
            if rank > factor.rank and _is_prepared(layers[path], name):
                raise ValueError(
                    f"{source} has rank {rank} at {factor.path(path)} and the model was prepared for {factor.rank}; call "
                    f"prepare_model_for_compiled_hotswap(model, target_rank={rank}) before torch.compile"
                )
            groups = _groups(layers[path])
            if rank % groups:
                raise ValueError(f"{source} has rank {rank} at {path}, which its {groups} groups do not divide")
            key = f"{KEY_PREFIX}{path}.{factor.key}"
            expected[key] = torch.empty(factor.shape(rank), dtype=factor.tensor.dtype, device="meta")
            factors[key] = factor
    checkpoint.check_tensors(source, found, expected)

    with torch.no_grad():
        for path, layer in layers.items():
            if _followed(layer, name):
                continue
            for factor in layer.ranked(name):  # a file must be able to hold them all
                if config.rank_for(factor.path(path)) > factor.rank and not _is_prepared(layer, name):
                    factor.resize(config.rank_for(factor.path(path)))
            if path not in here or isinstance(layer, LoraParameters):
                layer.empty(name)  # what the new adapter does not have
            layer.set_numbers(name, config, path)
        for key, value in found.items():
            if key in factors:
                factors[key].write(value)
            else:
                live[key].copy_(value)
        _relink(layers, name)
        for layer in layers.values():
            if _followed(layer, name):
                layer.lora_dropout[name].p = config.lora_dropout
    former = adapted.peft_config[name]
    config.inference_mode = former.inference_mode
    config.base_model_name_or_path = former.base_model_name_or_path or config.base_model_name_or_path
    adapted.peft_config[name] = config
    _name_all(config, layers, here, name)


def _name_all(config: LoraConfig, layers: dict, here: dict[str, list[Factor]], name: str) -> None:
    """Where the new adapter lacks layers, which are empty now but there (and may be trained): a config that names all."""
    whole = {path: layer.ranked(name) for path, layer in layers.items() if not _followed(layer, name)}
    if all(len(here.get(path, ())) == len(factors) for path, factors in whole.items()):
        return
    parameters = [f.path(path) for path, factors in whole.items() for f in factors[::2] if f.parameter is not None]
    config.target_modules = {path for path, layer in layers.items() if not isinstance(layer, LoraParameters)}
    config.target_parameters = parameters or None
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _adapted(model: nn.Module) -> AdaptedModel:
    model = getattr(model, "_orig_mod", model)
    adapted = model if isinstance(model, AdaptedModel) else getattr(model, "base_model", None)
    if not isinstance(adapted, AdaptedModel):
        raise TypeError(f"hotswap_adapter: the model is a {type(model).__name__}, expected a PeftModel")
    return adapted


def _lora_layers(model: nn.Module) -> dict[str, LoraLinear | LoraParameters]:
    """{path: layer} of LoRA's own layers (not AdaLoRA's, whose ranks mean something), paths as in the base model."""
    adapted = model.__dict__.get("_modules", {}).get("base_model", model)  # a transformers model has a base_model too
    bare = adapted.model if isinstance(adapted, AdaptedModel) else model
    return {path: holder for path, holder in adapter_holders(bare) if type(holder) in _KINDS}


def _swappable(adapted: AdaptedModel, name: str) -> dict[str, LoraLinear | LoraParameters]:
    """The adapter's layers; ValueError where they are merged."""
    layers = {path: layer for path, layer in _lora_layers(adapted).items() if name in layer.held_adapters()}
    for path, layer in layers.items():
        if layer.merged_adapters:
            raise ValueError(
                f"hotswap_adapter: adapters {list(layer.merged_adapters)} are merged into {path}; unmerge_adapter() first"
            )
    return layers


def _factors_of(
    model: nn.Module, config: LoraConfig, layers: dict[str, LoraLinear | LoraParameters], name: str
) -> dict[str, list[Factor]]:
    """{path: factors} of those layers that the config names."""
    method: LoraMethod = method_for(PeftType.LORA)
    method.fill_targets(model, config, strict=False)
    here = {}
    if method.has_targets(config):
        targets = find_targets(model, config, False, lambda bare: method.layer_class_for(bare) is not None)
        here = {path: layers[path].ranked(name) for path in targets if isinstance(layers.get(path), LoraLinear)}
    for path, layer in layers.items():  # whoever follows an embedding is named by it
        if _followed(layer, name) and path in here:
            leader = next(p for p, other in layers.items() if other is layer.followed[name])
            here[leader] = layers[leader].ranked(name)
    for path, (module, parameters) in find_parameters(model, config, here, strict=False).items():
        if path in layers and layers[path] is module:
            here[path] = module.ranked(name, parameters)
    return {path: factors for path, factors in here.items() if factors}


def _followed(layer: nn.Module, name: str) -> bool:
    return name in getattr(layer, "followed", ())


def _groups(layer: nn.Module) -> int:
    """Of a convolution: they divide its ranks."""
    return layer.base_layer.groups if isinstance(layer, LoraConv) else 1


def _is_prepared(layer: nn.Module, name: str) -> bool:
    scaling = layer.scaling[name]
    return any(isinstance(s, torch.Tensor) for s in (scaling.values() if isinstance(scaling, dict) else (scaling,)))


def _resize(layer: nn.Module, name: str, rank: int) -> None:
    for factor in layer.ranked(name):
        factor.resize(rank)


def _relink(layers: Mapping[str, nn.Module], name: str | None = None) -> None:
    """Those who follow an embedding get its numbers and, where they hold them, its new Parameters."""
    for layer in layers.values():
        for each in getattr(layer, "followed", ()):
            if name in (None, each):
                layer.take_numbers(each)


def _raise_rank(config: LoraConfig, rank: int) -> None:
    """r = rank everywhere, and the alphas that give the scalings of before."""

    def alpha_of(key: str | None) -> float:
        held = config.rank_pattern.get(key, config.r), config.alpha_pattern.get(key, config.lora_alpha)
        return config.scaling(*held) / config.scaling(rank, 1.0)

    patterns = {key: alpha_of(key) for key in (*config.rank_pattern, *config.alpha_pattern)}
    config.lora_alpha, config.alpha_pattern = alpha_of(None), patterns
    config.r, config.rank_pattern = rank, dict.fromkeys(config.rank_pattern, rank)


def _check_configs(source: str, former: Any, config: Any) -> None:
    for what, each in (("the loaded adapter", former), (source, config)):
        if each.peft_type != PeftType.LORA:
            raise ValueError(f"hotswap_adapter: {what} is an adapter of {each.peft_type.value}, expected LORA")
        if takes_from_base(each.init_lora_weights):
            raise ValueError(
                f"hotswap_adapter: {what} has init_lora_weights={each.init_lora_weights!r}, which changes the base model's "
                "weights; load such an adapter with from_pretrained"
            )
    for field in ("use_dora", "lora_bias", "bias", "ensure_weight_tying"):
        ours, theirs = getattr(former, field), getattr(config, field)
        if ours != theirs:
            raise ValueError(
                f"hotswap_adapter: {source} has {field}={theirs!r} and the loaded adapter {ours!r}, expected the same"
            )
