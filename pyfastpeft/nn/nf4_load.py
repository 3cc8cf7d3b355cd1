"""Reading a 4-bit weight out of a state dict as load_state_dict reports: missing, unexpected or damaged, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from pyfastpeft.quantized_tensor import QuantizedTensor

_TENSOR_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATE = "quant_state"
# bitsandbytes' unpacked form: these stand beside the tensors instead of the packed JSON
_PLAIN_KEYS = ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset")


def copied(q: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    """q on that device, in memory of its own."""
    return dataclasses.replace(q, **{name: tensor.to(device, copy=True) for name, tensor in q.tensors().items()})


def quantized_from_state_dict(
    items: Mapping[str, Any], key: str, missing: list[str], unexpected: list[str], errors: list[str]
) -> QuantizedTensor | None:
    """The weight that `key` and `key.*` describe; or None, and what is wrong added to missing, unexpected or errors."""
    names = {name[len(key) + 1 :] for name in items if name != key}
    known = {name for name in names if name in _TENSOR_KEYS + _PLAIN_KEYS or name.split(".")[0] == _STATE}
    unexpected += sorted(f"{key}.{name}" for name in names - known)
    if key not in items:
        missing.append(key)
        unexpected += sorted(f"{key}.{name}" for name in known)
        return None
    value = items[key]
    if not known and isinstance(value, torch.Tensor) and value.is_floating_point() and 1 not in value.shape:
        errors.append(
            f"{key} is a dense {value.dtype} weight of shape {tuple(value.shape)}, the layer holds 4 bits: load it "
            "into the unquantised model and call quantize_model."
        )
        return None
    if _STATE not in known:  # there it is a list and holds everything
        lacking = [name for name in ("absmax", "quant_map") if name not in known]
        if not any(name.startswith(_STATE) for name in known) and "quant_type" not in known:
            lacking.append(f"{_STATE}.bitsandbytes__nf4")
        if lacking:
            missing += [f"{key}.{name}" for name in lacking]
            return None
    try:
        known_items = {name: v for name, v in items.items() if name == key or name[len(key) + 1 :] in known}
        return QuantizedTensor.from_state_dict(known_items, key)
    except (TypeError, ValueError) as error:
        errors.append(f"{error}.")
        return None
