"""Hotswap: another LoRA adapter's values in the place of a loaded one's, without compiling the model again.

    model = PeftModel.from_pretrained(base, "adapter-0")
    prepare_model_for_compiled_hotswap(model, target_rank=64)     # before torch.compile: the highest rank of all to come
    model = torch.compile(model)
    hotswap_adapter(model, "adapter-1", adapter_name="default")

A compiled graph has ranks and numbers built in. So ranks are padded to one (rows of zeros in A, columns in B, which change
nothing), scalings become tensors, and a swap writes values into what is there. Names and arguments are PEFT's.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import nn

from pyfastpeft import checkpoint
from pyfastpeft.adapted_model import AdaptedModel
from pyfastpeft.inject import find_targets
from pyfastpeft.methods.base import KEY_PREFIX, PeftType, adapter_holders
from pyfastpeft.methods.lora.config import LoraConfig
from pyfastpeft.methods.lora.initial import takes_from_base
from pyfastpeft.methods.lora.layer import LoraLinear
from pyfastpeft.methods.registry import method_for

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
    merged.
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
        raise ValueError(
            "prepare_model_for_compiled_hotswap: the model has no LoRA adapter on a linear layer; load the first one before"
        )
    for path, layer in layers.items():
        if layer.merged_adapters:
            raise ValueError(f"{path}: adapters {list(layer.merged_adapters)} are merged; unmerge_adapter() first")
        for name in layer.lora_A:
            rank = len(layer.lora_A[name].weight)
            if target_rank is not None and rank > target_rank:
                raise ValueError(f"{path}: adapter {name!r} has rank {rank}, more than target_rank {target_rank}")
    for layer in layers.values():
        for name in layer.lora_A:
            if target_rank is not None:
                _resize(layer, name, target_rank)
            if not isinstance(layer.scaling[name], torch.Tensor):
                layer.scaling[name] = torch.tensor(float(layer.scaling[name]), device=layer.base.device)
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

    Raises ValueError, naming the file and what does not fit, with the model as it was: another method; DoRA, lora_bias or
    biases in one of the two alone; layers or saved modules that the loaded adapter does not have; tensors that are missing
    or of wrong shape; a rank above what was prepared; an initial value that changes the base (PiSSA, OLoRA, LoftQ); merged
    adapters.
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
    layers = {path: layer for path, layer in _lora_layers(adapted).items() if adapter_name in layer.lora_A}
    for path, layer in adapted.layers():
        if adapter_name in layer.held_adapters() and path not in layers:
            raise ValueError(
                f"hotswap_adapter: adapter {adapter_name!r} has a {type(layer).__name__} at {path}, and only linear layers "
                "can be swapped; load the other adapter with load_adapter()"
            )
    for path, layer in layers.items():
        if layer.merged_adapters:
            raise ValueError(
                f"hotswap_adapter: adapters {list(layer.merged_adapters)} are merged into {path}; unmerge_adapter() first"
            )
    method = method_for(config.peft_type)
    live = method.tensors(adapted.model, former, adapter_name)
    if config.target_modules is None:
        method.fill_targets(adapted.model, config, strict=False)
    here = [path for path in find_targets(adapted.model, config, strict=False) if path in layers]
    absent = {path: layer for path, layer in layers.items() if path not in here}
    expected = {k: t for k, t in live.items() if not any(k.startswith(f"{KEY_PREFIX}{path}.lora_") for path in absent)}
    found = {key: t for key, t in found.items() if ".original_module." not in key and ".modules_to_save." not in key}
    values = _fitted(source, config, found, expected, {path: layers[path] for path in here}, adapter_name)

    with torch.no_grad():
        for path in here:
            layer, rank, alpha = layers[path], config.rank_for(path), config.alpha_for(path)
            if rank > len(layer.lora_A[adapter_name].weight):
                _resize(layer, adapter_name, rank)
            _set_scaling(layer, adapter_name, config.scaling(rank, alpha))
            layer.r[adapter_name], layer.lora_alpha[adapter_name] = rank, alpha
            layer.lora_dropout[adapter_name].p = config.lora_dropout
        live = method.tensors(adapted.model, former, adapter_name)
        for key, value in values.items():
            target = live[key]
            if value.shape != target.shape:
                target.zero_()
            target[tuple(slice(size) for size in value.shape)].copy_(value)
        for layer in absent.values():
            _empty(layer, adapter_name)
    config.inference_mode = former.inference_mode
    config.base_model_name_or_path = former.base_model_name_or_path or config.base_model_name_or_path
    adapted.peft_config[adapter_name] = config
    checkpoint.warn_not_finite(source, found)


def _adapted(model: nn.Module) -> AdaptedModel:
    model = getattr(model, "_orig_mod", model)
    adapted = model if isinstance(model, AdaptedModel) else getattr(model, "base_model", None)
    if not isinstance(adapted, AdaptedModel):
        raise TypeError(f"hotswap_adapter: the model is a {type(model).__name__}, expected a PeftModel")
    return adapted


def _lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """{path: layer} of LoRA's own linear layers (not AdaLoRA's, whose ranks mean something), paths as in the base model."""
    adapted = model.__dict__.get("_modules", {}).get("base_model", model)  # a transformers model has a base_model too
    bare = adapted.model if isinstance(adapted, AdaptedModel) else model
    return {path: holder for path, holder in adapter_holders(bare) if type(holder) is LoraLinear}


def _resize(layer: LoraLinear, name: str, rank: int) -> None:
    """A and B with so many ranks, the new ones zero; in parameters of their own."""
    a, b = layer.lora_A[name], layer.lora_B[name]
    if len(a.weight) == rank:
        return
    for module, shape in ((a, (rank, a.weight.shape[1])), (b, (b.weight.shape[0], rank))):
        padded = module.weight.new_zeros(shape)
        padded[: module.weight.shape[0], : module.weight.shape[1]].copy_(module.weight.detach())
        module.weight = nn.Parameter(padded, requires_grad=module.weight.requires_grad)
    a.out_features = b.in_features = rank


def _raise_rank(config: LoraConfig, rank: int) -> None:
    """r = rank everywhere, and the alphas that give the scalings of before."""

    def alpha_of(key: str | None) -> float:
        held = config.rank_pattern.get(key, config.r), config.alpha_pattern.get(key, config.lora_alpha)
        return config.scaling(*held) / config.scaling(rank, 1.0)

    patterns = {key: alpha_of(key) for key in (*config.rank_pattern, *config.alpha_pattern)}
    config.lora_alpha, config.alpha_pattern = alpha_of(None), patterns
    config.r, config.rank_pattern = rank, dict.fromkeys(config.rank_pattern, rank)


def _set_scaling(layer: LoraLinear, name: str, value: float) -> None:
    if isinstance(layer.scaling[name], torch.Tensor):
        layer.scaling[name].fill_(value)
    else:
        layer.scaling[name] = value


def _empty(layer: LoraLinear, name: str) -> None:
    """The adapter adds nothing to this layer: B = 0, and DoRA's m the lengths of the base's rows."""
    layer.lora_B[name].weight.zero_()
    if layer.lora_B[name].bias is not None:
        layer.lora_B[name].bias.zero_()
    if name in layer.lora_magnitude_vector:
        layer.reset_magnitude(name)


def _check_configs(source: str, former: Any, config: Any) -> None:
    for what, each in (("the loaded adapter", former), (source, config)):
        if each.peft_type != PeftType.LORA:
            raise ValueError(f"hotswap_adapter: {what} is an adapter of {each.peft_type.value}, expected LORA")
        if takes_from_base(each.init_lora_weights):
            raise ValueError(
                f"hotswap_adapter: {what} has init_lora_weights={each.init_lora_weights!r}, which changes the base model's "
                "weights; load such an adapter with from_pretrained"
            )
    for field in ("use_dora", "lora_bias", "bias"):
        ours, theirs = getattr(former, field), getattr(config, field)
        if ours != theirs:
            raise ValueError(
                f"hotswap_adapter: {source} has {field}={theirs!r} and the loaded adapter {ours!r}, expected the same"
            )


def _fitted(source, config, found, expected, layers, name) -> dict[str, torch.Tensor]:
    """The file's tensors, checked against the model's; those of A and B may have fewer ranks, if the config says so."""
    shaped = dict(expected)
    for path, layer in layers.items():
        rank, held = config.rank_for(path), len(layer.lora_A[name].weight)
        if rank > held and isinstance(layer.scaling[name], torch.Tensor):
            raise ValueError(
                f"{source} has rank {rank} at {path} and the model was prepared for {held}; call "
                f"prepare_model_for_compiled_hotswap(model, target_rank={rank}) before torch.compile"
            )
        for part, size in (("lora_A", (rank, layer.in_features)), ("lora_B", (layer.out_features, rank))):
            key = f"{KEY_PREFIX}{path}.{part}.weight"
            shaped[key] = torch.empty(size, dtype=expected[key].dtype, device="meta")
    checkpoint.check_tensors(source, found, shaped)
    return found
