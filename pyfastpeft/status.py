"""What state the adapters of a model are in: one record per adapted layer, and one for the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from pyfastpeft.methods.base import AdapterHolder, adapter_holders

IRREGULAR = "irregular"  # where the layers do not agree: something went wrong


@dataclasses.dataclass
class TunerLayerStatus:
    """An adapted layer: PEFT's fields.

    name                  its path in the base model
    module_type           LoraLinear, IA3Linear, …
    enabled               whether its adapters act
    active_adapters, merged_adapters, available_adapters
    requires_grad         {adapter: True, False or "irregular"}
    devices               {adapter: the kinds of device its tensors are on}
    quantization_backend  "nf4" or "fp4" of a 4-bit base, else None
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclasses.dataclass
class TunerModelStatus:
    """A model with adapters: PEFT's fields. "irregular" where its layers do not agree."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | str
    active_adapters: list[str] | str
    merged_adapters: list[str] | str
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of every adapted layer (and saved module) of a PeftModel or a model with adapters in it, in order.

    Raises ValueError where there is none.
    """
    holders = [(path, holder) for path, holder in adapter_holders(_bare(model))]
    if not holders:
        raise ValueError(f"{type(model).__name__} has no adapted layers; get_peft_model() adds them")
    return [_of_layer(path, holder) for path, holder in holders]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of a PeftModel: see TunerModelStatus. Raises ValueError where there are no adapted layers."""
    layers = get_layer_status(model)
    configs = getattr(model, "peft_config", {})
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    if hasattr(model, "get_nb_trainable_parameters"):  # which counts 4-bit weights as what they stand for
        trainable, total = model.get_nb_trainable_parameters()
    names = sorted({name for layer in layers for name in layer.available_adapters})
    wide = {name: [layer for layer in layers if name in layer.available_adapters] for name in names}
    backends = {layer.quantization_backend for layer in layers} - {None}
    return TunerModelStatus(
        base_model_type=type(_bare(model)).__name__,
        adapter_model_type=type(model).__name__,
        peft_types={name: config.peft_type.value for name, config in configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_same(layer.enabled for layer in layers),
        # a layer that lacks an adapter cannot have it active, or merged
        active_adapters=_agreed(layers, "active_adapters", wide),
        merged_adapters=_agreed(layers, "merged_adapters", wide),
        requires_grad={name: _same(layer.requires_grad[name] for layer in wide[name]) for name in names},
        available_adapters=names,
        devices={name: sorted({d for layer in wide[name] for d in layer.devices[name]}) for name in names},
        quantization_backend=IRREGULAR if len(backends) > 1 else next(iter(backends), None),
    )


def _bare(model: nn.Module) -> nn.Module:
    """The base model of a PeftModel, else the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _of_layer(path: str, holder: AdapterHolder) -> TunerLayerStatus:
    names = holder.held_adapters()
    parameters = {name: list(holder.adapter_parameters(name)) for name in names}
    view = getattr(holder, "base", None)
    return TunerLayerStatus(
        name=path,
        module_type=type(holder).__name__,
        enabled=holder.enabled,
        active_adapters=list(holder.active),
        merged_adapters=list(getattr(holder, "merged_adapters", ())),
        requires_grad={name: _same(p.requires_grad for p in parameters[name]) for name in names},
        available_adapters=sorted(names),
        devices={name: sorted({p.device.type for p in parameters[name]}) for name in names},
        quantization_backend=view.module.quant_type if view is not None and view.is_quantized else None,
    )


def _same(values: Iterable[Any]) -> Any:
    found = list(values)
    return found[0] if all(value == found[0] for value in found) else IRREGULAR


def _agreed(layers: list[TunerLayerStatus], field: str, wide: dict[str, list[TunerLayerStatus]]) -> list[str] | str:
    """The adapters that `field` has in every layer that holds them; "irregular" where some have and some have not."""
    everywhere = []
    for name, holding in wide.items():
        having = [name in getattr(layer, field) for layer in holding]
        if any(having) and not all(having):
            return IRREGULAR
        if having and all(having):
            everywhere.append(name)
    return everywhere
