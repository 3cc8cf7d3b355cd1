"""What quantize_model will quantise, what it will leave and why: decided, and refused, before anything is changed."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterable

import torch
from torch import nn

from pyfastpeft.nn.dense import conv1d_class, has_own_forward, is_conv1d
from pyfastpeft.nn.nf4_linear import NF4Linear
from pyfastpeft.nn.quantization_report import SkippedEntry
from pyfastpeft.quantized_tensor import DTYPES

OUTPUT_HEAD = "lm_head"


@dataclasses.dataclass
class Plan:
    """layers: paths of the linear modules to quantise, in the model's order; places[path]: every (parent's path,
    attribute) under which the module hangs; values: weights in them; skipped: the rest. No reference to a module."""

    layers: list[str]
    places: dict[str, list[tuple[str, str]]]
    values: int
    skipped: list[SkippedEntry]


def make_plan(model: nn.Module, skip: Iterable[str] | None) -> Plan:
    """Raises ValueError / TypeError for a model or a skip list that quantize_model refuses."""
    modules = dict(model.named_modules())
    if _is_linear(model):
        raise ValueError(
            f"quantize_model: the model is itself a {type(model).__name__}, which cannot be replaced in place; use "
            "pyfastpeft.nn.NF4Linear.from_linear"
        )
    _refuse_quantized(model, modules)
    skipped_by = _match_skip(model, modules, (skip,) if isinstance(skip, str) else tuple(skip or ()))
    owners = _owners(modules)
    keep_fp32 = set(getattr(model, "_keep_in_fp32_modules", None) or ()) | set(
        getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    )
    reasons: dict[str, str] = {}
    layers = []
    for name, module in modules.items():
        if not (_is_linear(module) or isinstance(module, nn.Linear)):
            continue
        reason = _tied(name, module, owners) or skipped_by.get(name) or _why_not(name, module, modules, keep_fp32)
        if reason:
            reasons[name] = reason
        else:
            _check_weight(name, module.weight)
            layers.append(name)
    skipped = skipped_entries(modules, reasons, set(layers))
    if not layers:
        listed = "; ".join(f"{e.name}: {e.reason}" for e in skipped[:8]) or "it has no linear layer"
        raise ValueError(f"quantize_model: nothing to quantise in this {type(model).__name__} ({listed})")
    names = {id(modules[name]): name for name in layers}
    places: dict[str, list[tuple[str, str]]] = {name: [] for name in layers}
    for parent_name, parent in modules.items():
        for attribute, child in parent._modules.items():
            if id(child) in names:
                places[names[id(child)]].append((parent_name, attribute))
    values = sum(modules[name].weight.numel() for name in layers)
    return Plan(layers, places, values, skipped)


def output_head_prefixes(model: nn.Module) -> list[str]:
    """Paths of the modules that make up a transformers model's output head: what stands beside its base_model, and its
    output embedding. Empty for any other module."""
    heads = []
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        heads += [name for name, _ in model.named_children() if name != prefix]
    if callable(getattr(model, "get_output_embeddings", None)):
        try:
            output = model.get_output_embeddings()
        except (AttributeError, NotImplementedError):  # transformers' answer for a model without one
            output = None
        heads += [name for name, module in model.named_modules() if output is not None and module is output]
    return heads


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


def _refuse_quantized(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    way_out = "load the original 16- or 32-bit checkpoint to quantise it another way"
    for name, module in modules.items():
        kind = type(module)
        if isinstance(module, NF4Linear):
            raise ValueError(f"quantize_model: the model is already quantised: {name} is an NF4Linear; {way_out}")
        if kind.__module__.startswith(("bitsandbytes.", "torchao.")):
            raise ValueError(
                f"quantize_model: the model is already quantised: {name} is a {kind.__module__}.{kind.__name__}; "
                f"{way_out}"
            )
        if kind.__module__.startswith(("peft.tuners.", "pyfastpeft.methods.")):
            raise ValueError(
                f"quantize_model: the model has adapters: {name or 'it'} is a {kind.__module__}.{kind.__name__}; quantise "
                "the base model first and add adapters to the quantised one (get_peft_model)"
            )
    if getattr(model, "hf_quantizer", None) is not None:
        method = getattr(getattr(model.hf_quantizer, "quantization_config", None), "quant_method", "a quantised one")
        raise ValueError(
            f"quantize_model: the model was loaded as {getattr(method, 'value', method)}: already quantised; {way_out}"
        )


def _match_skip(model: nn.Module, modules: dict[str, nn.Module], skip: tuple[str, ...]) -> dict[str, str]:
    """Path -> reason, for every module that an entry names or that lies below one it names."""
    reasons: dict[str, str] = {}
    for entry in skip:
        if not isinstance(entry, str):
            raise TypeError(f"quantize_model: skip holds {entry!r} ({type(entry).__name__}), expected paths as strings")
        named = [name for name in modules if name == entry or name.endswith("." + entry)]
        why = f"in skip ({entry!r})"
        heads = output_head_prefixes(model) if entry == OUTPUT_HEAD else []
        if not named and entry != OUTPUT_HEAD:
            named = _match_regex(entry, modules)
        for name, reason in [(n, why) for n in named] + [(n, f"output head ({why})") for n in heads]:
            for path in modules:
                if path == name or path.startswith(name + "."):
                    reasons.setdefault(path, reason)
    return reasons


def _match_regex(entry: str, modules: dict[str, nn.Module]) -> list[str]:
    try:
        found = [name for name in modules if re.fullmatch(entry, name)]
    except re.error as error:
        raise ValueError(
            f"quantize_model: skip entry {entry!r} is neither a module's path nor a regular expression ({error})"
        ) from None
    if not found:
        last = {name.rpartition(".")[2] for name, module in modules.items() if _is_linear(module)}
        near = difflib.get_close_matches(entry, sorted(last | modules.keys()), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"its linear layers end in {', '.join(sorted(last)[:8])}"
        raise ValueError(f"quantize_model: skip entry {entry!r} matches no module; {hint}")
    return found


def _tied(name: str, module: nn.Module, owners: dict[tuple, list[str]]) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight):
        return None
    others = [owner for owner in owners[_key(weight)] if owner != f"{name}.weight"]
    return f"tied to {', '.join(others)}" if others else None


def _why_not(name: str, module: nn.Module, modules: dict[str, nn.Module], keep_fp32: set[str]) -> str | None:
    parent = modules[name.rpartition(".")[0]]
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return f"{type(parent).__name__} reads its weight directly"
    if not _is_linear(module):
        return f"a subclass of nn.Linear ({type(module).__module__}.{type(module).__qualname__})"
    if has_own_forward(module, conv1d_class(type(module)) or nn.Linear):
        return "has hooks or a forward of its own, which would be lost"
    if module.weight.numel() == 0:
        return "has no values"
    if any(f".{entry}." in f".{name}." for entry in keep_fp32):
        return "the model keeps it in fp32 (_keep_in_fp32_modules)"
    return None


def _check_weight(name: str, weight: torch.Tensor) -> None:
    if weight.dtype not in DTYPES:
        raise TypeError(
            f"quantize_model: {name}.weight has dtype {weight.dtype}, expected float32, float16 or bfloat16; "
            + (
                "convert the model first: model.float()"
                if weight.dtype == torch.float64
                else "a model that is already quantised cannot be quantised again"
            )
        )
    if weight.is_meta:
        raise ValueError(
            f"quantize_model: {name}.weight is on the meta device and holds no data; load the checkpoint first, or load "
            "a 4-bit one with load_quantized_state_dict"
        )


def _key(tensor: torch.Tensor) -> tuple:
    """Equal for tensors that are the same memory seen the same way, whether or not they are one object."""
    if tensor.is_meta or tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)


def _owners(modules: dict[str, nn.Module]) -> dict[tuple, list[str]]:
    owners: dict[tuple, list[str]] = {}
    for name, module in modules.items():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and not nn.parameter.is_lazy(parameter):
                owners.setdefault(_key(parameter), []).append(f"{name}.{attribute}".lstrip("."))
    return owners


def skipped_entries(
    modules: dict[str, nn.Module], reasons: dict[str, str], layers: Collection[str] = ()
) -> list[SkippedEntry]:
    """Every parameter of two or more dimensions but the weights of `layers`, with its module's reason or what it is."""
    entries = []
    for name, module in modules.items():
        for attribute, parameter in module._parameters.items():
            if parameter is None or nn.parameter.is_lazy(parameter) or parameter.dim() < 2:
                continue
            if name in layers and attribute == "weight":
                continue
            entries.append(
                SkippedEntry(
                    name=f"{name}.{attribute}".lstrip("."),
                    kind=type(module).__name__,
                    shape=tuple(parameter.shape),
                    dtype=str(parameter.dtype).removeprefix("torch."),
                    nbytes=parameter.nbytes,
                    reason=reasons.get(name) or _what_it_is(module, parameter),
                )
            )
    return entries


def _what_it_is(module: nn.Module, parameter: torch.Tensor) -> str:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "an embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "a convolution"
    if parameter.dim() == 3:
        kind = type(module).__name__
        return f"a 3-D weight of {kind} (all experts of a mixture in one parameter), which is not a linear layer"
    return f"a {parameter.dim()}-D parameter of {type(module).__name__}, which is not a linear layer"
