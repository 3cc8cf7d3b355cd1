"""Writing the adapters of a model into files, and reading files into a model: what the files hold is checkpoint.py's affair."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

from pyfastpeft import checkpoint
from pyfastpeft.adapted_model import AdaptedModel, check_adapter_name
from pyfastpeft.methods.base import PeftConfig
from pyfastpeft.methods.lora.plain import as_plain_lora
from pyfastpeft.methods.registry import method_for

HUB_KEYWORDS = frozenset("revision token cache_dir force_download local_files_only proxies".split())


def save_adapter(
    adapted: AdaptedModel,
    name: str,
    folder: str | os.PathLike,
    *,
    safe_serialization: bool,
    save_embedding_layers: bool | str,
    value_of: Callable[[torch.Tensor], torch.Tensor],
    initial: str | os.PathLike | None,
) -> None:
    """Writes one adapter into a folder; arguments as PeftModel.save_pretrained's.

    value_of   what is written of a tensor of the model
    initial    path_initial_model_for_weight_conversion
    """
    config, model = adapted.peft_config[name].copy(), adapted.model
    method = method_for(config.peft_type)
    tensors = method.file_tensors(model, config, name)
    if save_embedding_layers is True or (save_embedding_layers == "auto" and _vocabulary_resized(model)):
        tensors = checkpoint.embedding_tensors(model) | tensors
    resume = method.resume_tensors(model, config, name)
    tensors, resume = ({key: value_of(t) for key, t in group.items()} for group in (tensors, resume))
    config.inference_mode = True
    tensors = method.to_file(tensors, config)
    if initial is not None:
        tensors = as_plain_lora(tensors, config, initial)
    kind = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    checkpoint.write_adapter(
        folder,
        tensors,
        config,
        safe_serialization=safe_serialization,
        auto_mapping=kind if config.task_type is None else None,
        card=checkpoint.model_card(config),
        resume=resume,
        resume_name=method.resume_name,
    )


def _vocabulary_resized(model: nn.Module) -> bool:
    """Whether the vocabulary differs from that of the local folder the model came from."""
    config = getattr(model, "config", None)
    folder = getattr(config, "_name_or_path", None)
    if not folder or not os.path.isfile(os.path.join(folder, "config.json")):
        return False
    former = type(config).from_pretrained(folder)
    return getattr(former, "vocab_size", None) != getattr(config, "vocab_size", None)


def load_adapter_files(
    adapted: AdaptedModel,
    model_id: str | os.PathLike,
    name: str,
    is_trainable: bool,
    config: PeftConfig | None,
    fp32: bool,
    subfolder: str | None,
    hub_kwargs: dict,
) -> PeftConfig:
    """Reads an adapter and adds it: everything is read and compared first, and an error takes all of it out again."""
    unknown = sorted(set(hub_kwargs) - HUB_KEYWORDS)
    if unknown:
        raise TypeError(f"unknown arguments {unknown}; expected some of {sorted(HUB_KEYWORDS)}")
    check_adapter_name(name)
    if config is None:
        config = checkpoint.read_config(model_id, subfolder, **hub_kwargs)
    found = checkpoint.read_tensors(model_id, subfolder, **hub_kwargs)
    method = method_for(config.peft_type)
    resume = checkpoint.read_resume(model_id, method.resume_name, subfolder, **hub_kwargs)
    config = config.copy()
    config.inference_mode = not is_trainable
    exists = name in adapted.peft_config
    if exists and adapted.peft_config[name].peft_type != config.peft_type:
        held = adapted.peft_config[name].peft_type
        raise ValueError(
            f"{os.fspath(model_id)} is an adapter of {config.peft_type.value}, and {name!r} is one of {held.value} "
            "already; load it under another name"
        )
    flags = [(parameter, parameter.requires_grad) for parameter in adapted.model.parameters()]
    if not exists:
        adapted.add_adapter(name, config, fp32=fp32, init=False, strict=False)
    try:
        resolved = adapted.peft_config[name]
        if exists:
            resolved = resolved.copy()
            resolved.inference_mode = config.inference_mode
        live = method.loading_tensors(adapted.model, resolved, name, resume)
        extra = {k: t for k, t in checkpoint.embedding_tensors(adapted.model).items() if k in found and k not in live}
        live |= extra
        # PEFT with bias="all" adds the inner biases of a saved head to its file, which the head has already
        found = {k: t for k, t in found.items() if ".original_module." not in k and ".modules_to_save." not in k}
        found = method.from_file(found, live, config)
        checkpoint.check_tensors(os.fspath(model_id), found, live)
        checkpoint.warn_not_finite(os.fspath(model_id), found)
        checkpoint.copy_tensors(found, live)
        method.finish_loading(adapted.model, resolved, name, live, resume)
    except BaseException:
        if not exists:
            adapted.delete_adapter(name)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        raise
    if is_trainable:
        adapted.set_requires_grad(name)
    return adapted.peft_config[name]
