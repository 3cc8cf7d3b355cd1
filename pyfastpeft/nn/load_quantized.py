"""load_quantized_state_dict: a 4-bit checkpoint (ours or bitsandbytes') into a model that was built dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pyfastpeft.nn.dense import is_conv1d
from pyfastpeft.nn.nf4_linear import NF4Linear
from pyfastpeft.nn.nf4_load import copied
from pyfastpeft.nn.quantization_plan import skipped_entries
from pyfastpeft.nn.quantization_report import QuantizationReport, model_bytes, quantized_entry, record_in_config
from pyfastpeft.quantized_tensor import QuantizedTensor

_STATE = ".quant_state"


def load_quantized_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    strict: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Loads a state dict with 4-bit weights into `model`, in place (their layers become NF4Linear); returns the model.

        with torch.device("meta"):
            model = MyModel(config)
        pyfastpeft.load_quantized_state_dict(model, safetensors.torch.load_file("model.safetensors"))

    model        dense (nn.Linear or Conv1D where the state dict has 4 bits) or quantised; on the meta device it takes
                 the state dict's tensors themselves, elsewhere it copies them
    state_dict   the keys of csrc/nf4/README.md, as NF4Linear or bitsandbytes' Linear4bit saves them, beside dense ones
    strict       missing and unexpected keys are an error; the model then has its own layers again

    Sets model.quantization_report and a transformers config's quantization_config, as quantize_model does.

    Weights that the model ties and the file holds once are tied again (model.tie_weights, where there is one). Raises
    RuntimeError as load_state_dict does; ValueError for a 4-bit key without a layer of its shape, a damaged weight, and
    for tensors still on the meta device afterwards (non-persistent buffers: build those for real, for instance with
    accelerate.init_empty_weights(include_buffers=False)).
    """
    on_meta = any(p.is_meta for p in model.parameters())
    new = _new_layers(model, state_dict, compute_dtype, on_meta)
    old = {name: model.get_submodule(name) for name in new}
    _replace(model, new)
    try:
        _load(model, state_dict, strict, on_meta)
    except Exception:
        _replace(model, old)
        raise
    _report(model, compute_dtype)
    return model


def _report(model: nn.Module, compute_dtype: torch.dtype | None) -> None:
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, NF4Linear)}
    if not layers:
        return
    first = next(iter(layers.values()))
    report = QuantizationReport(first.quant_type, first.blocksize, first.double_quant)
    report.quantized = [quantized_entry(name, layer, "NF4Linear") for name, layer in layers.items()]
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear) or is_conv1d(module)]
    dense = dict.fromkeys(linear, "dense in the checkpoint")
    report.skipped = skipped_entries(modules, dense, layers)
    report.model_bytes_after = model_bytes(model)
    report.model_bytes_before = report.model_bytes_after - report.bytes_after + report.bytes_before
    model.quantization_report = report
    record_in_config(model, report, compute_dtype)


def _replace(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)


def _load(model: nn.Module, state_dict: Mapping[str, Any], strict: bool, on_meta: bool) -> None:
    if not on_meta:
        model.load_state_dict(state_dict, strict=strict)
        return
    result = model.load_state_dict(state_dict, strict=False, assign=True)
    if callable(getattr(model, "tie_weights", None)):
        model.tie_weights()
    missing = [key for key in result.missing_keys if _is_empty(model, key)]
    if strict and (missing or result.unexpected_keys):
        raise RuntimeError(
            f"load_quantized_state_dict: missing keys: {', '.join(missing) or 'none'}; unexpected keys: "
            f"{', '.join(result.unexpected_keys) or 'none'}"
        )
    empty = [name for name, tensor in model.named_buffers() if tensor.is_meta]
    if empty:
        raise ValueError(
            f"load_quantized_state_dict: {', '.join(empty[:3])} are still on the meta device and not part of the "
            "checkpoint; build the model's buffers for real, for instance with "
            "accelerate.init_empty_weights(include_buffers=False)"
        )


def _new_layers(model: nn.Module, state_dict: Mapping[str, Any], compute_dtype, on_meta: bool) -> dict[str, NF4Linear]:
    modules = dict(model.named_modules())
    layers = {}
    for key in sorted({key[: key.index(_STATE)] for key in state_dict if _STATE in key}):
        name = key.removesuffix(".weight")
        if not isinstance(modules.get(name), NF4Linear):
            q = QuantizedTensor.from_state_dict(state_dict, key)
            layers[name] = _quantized_like(modules.get(name), name, q, compute_dtype, on_meta)
    return layers


def _quantized_like(module, name: str, q: QuantizedTensor, compute_dtype, on_meta: bool) -> NF4Linear:
    linear = isinstance(module, nn.Linear) or (module is not None and is_conv1d(module))
    if not linear:
        kind = "nothing" if module is None else type(module).__name__
        raise ValueError(f"load_quantized_state_dict: {name}.weight has 4 bits, and the model has {kind} there")
    shape = tuple(module.weight.shape)
    expected = shape[::-1] if is_conv1d(module) else shape
    if tuple(q.shape) != expected:
        raise ValueError(f"load_quantized_state_dict: {name}.weight has shape {tuple(q.shape)}, expected {expected}")
    q = q if on_meta else copied(q, module.weight.device)
    return NF4Linear.from_quantized(q, module.bias, compute_dtype).train(module.training)


def _is_empty(model: nn.Module, key: str) -> bool:
    """Whether the tensor of that key is missing still: on the meta device, or no tensor of the model at all."""
    parent, _, attribute = key.rpartition(".")
    try:
        tensor = getattr(model.get_submodule(parent), attribute)
    except AttributeError:
        return True
    return not isinstance(tensor, torch.Tensor) or tensor.is_meta
