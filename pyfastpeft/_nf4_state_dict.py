"""The state-dict form of a 4-bit weight: bitsandbytes' keys (csrc/nf4/README.md), written and read.

    weight                                uint8 [(n+1)//2, 1]
    weight.absmax                         fp32 [blocks], uint8 when nested
    weight.quant_map                      fp32 [16]
    weight.nested_absmax, .nested_quant_map   fp32, nested only
    weight.quant_state.bitsandbytes__nf4  uint8: UTF-8 JSON of the rest

Files come from strangers: the JSON is data, names of dtypes are looked up in a table, every count is checked against
the shape (by QuantizedTensor), and whatever does not fit is named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from pyfastpeft.reference.nf4 import NESTED_BLOCKSIZE, QUANT_TYPES, dynamic_map, quant_map

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STATE = "quant_state"
_TENSOR_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_META_KEYS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_META_KEYS = ("nested_blocksize", "nested_dtype", "nested_offset")


def to_state_dict(q, prefix: str) -> dict[str, torch.Tensor]:
    """The keys above for a QuantizedTensor. The tensors are q's own, not copies."""
    meta: dict[str, Any] = {
        "quant_type": q.quant_type,
        "blocksize": int(q.blocksize),
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": [int(size) for size in q.shape],
    }
    tensors = {"absmax": q.absmax, "quant_map": quant_map(q.quant_type).to(q.device)}
    if q.is_nested:
        tensors |= {"nested_absmax": q.nested_absmax, "nested_quant_map": q.nested_map}
        meta |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": 0.0 if q.offset.is_meta else q.offset.item(),  # a meta module names its keys, no more
        }
    packed_meta = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8, device=q.device)
    tensors[f"{_STATE}.bitsandbytes__{q.quant_type}"] = packed_meta
    return {prefix: q.packed} | {f"{prefix}.{key}": tensor for key, tensor in tensors.items()}


def fields_from_state_dict(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The arguments of QuantizedTensor(...) that `prefix` and `prefix.*` of the state dict describe."""
    if prefix not in state_dict:
        near = sorted(key for key in state_dict if str(key).endswith("absmax"))[:3]
        hint = f"; it has {', '.join(near)}" if near else ""
        raise ValueError(f"from_state_dict: there is no key {prefix!r}, expected the packed weight{hint}")
    stem = prefix + "."
    items = {key[len(stem) :]: value for key, value in state_dict.items() if str(key).startswith(stem)}
    packed = _packed_bytes(state_dict[prefix], prefix)
    if isinstance(items.get(_STATE), (list, tuple)):
        return {"packed": packed, **_from_list(items, prefix)}
    meta = _take_meta(items, prefix)
    unknown = sorted(items.keys() - set(_TENSOR_KEYS))
    if unknown:
        raise ValueError(
            f"from_state_dict: unknown key {prefix}.{unknown[0]} beside a 4-bit weight; known are "
            + ", ".join(f"{prefix}.{key}" for key in _TENSOR_KEYS)
            + f" and {prefix}.{_STATE}.bitsandbytes__nf4 (or __fp4)"
        )
    for key in ("absmax", "quant_map"):
        _require(key in items, prefix, key, "is missing")
    quant_type = _choice(meta, "quant_type", QUANT_TYPES, prefix)
    _check_quant_map(items["quant_map"], quant_type, prefix)
    fields = {
        "packed": packed,
        "absmax": _tensor(items["absmax"], prefix, "absmax"),
        "blocksize": _integer(meta, "blocksize", prefix),
        "quant_type": quant_type,
        "shape": _shape(meta, prefix),
        "dtype": _DTYPES[_choice(meta, "dtype", tuple(_DTYPES), prefix)],
    }
    fields |= _nested_fields(items, meta, prefix)
    _check_finite(fields, prefix)
    return fields


def _nested_fields(items: Mapping[str, Any], meta: Mapping[str, Any], prefix: str) -> dict[str, torch.Tensor]:
    names = ["nested_absmax", "nested_quant_map"] + [f"{_STATE}: {key}" for key in _NESTED_META_KEYS]
    found = [key in items for key in names[:2]] + [key in meta for key in _NESTED_META_KEYS]
    if not any(found):
        return {}
    for name, there in zip(names, found, strict=True):
        _require(there, prefix, name, "is missing, and the weight is double-quantised")
    if _integer(meta, "nested_blocksize", prefix) != NESTED_BLOCKSIZE:
        raise ValueError(
            f"from_state_dict: {prefix}: nested_blocksize is {meta['nested_blocksize']}, expected {NESTED_BLOCKSIZE}"
        )
    _choice(meta, "nested_dtype", ("float32",), prefix)
    offset = meta["nested_offset"]
    is_number = isinstance(offset, (int, float)) and not isinstance(offset, bool)
    if not is_number or not abs(offset) <= torch.finfo(torch.float32).max:  # false for NaN too
        raise ValueError(f"from_state_dict: {prefix}: nested_offset is {offset!r}, expected a finite float32 number")
    nested_absmax = _tensor(items["nested_absmax"], prefix, "nested_absmax")
    return {
        "nested_absmax": nested_absmax,
        "nested_map": _tensor(items["nested_quant_map"], prefix, "nested_quant_map"),
        "offset": torch.tensor(float(offset), dtype=torch.float32, device=nested_absmax.device),
    }


def _take_meta(items: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The JSON part, removed from items; or its entries as plain values beside the tensors (an older form)."""
    state_keys = sorted(key for key in items if key.startswith(_STATE))
    if not state_keys:
        meta = {key: items.pop(key) for key in (*_META_KEYS, *_NESTED_META_KEYS) if key in items}
        _require(bool(meta), prefix, f"{_STATE}.bitsandbytes__nf4 (or __fp4)", "is missing")
        for key in ("dtype", "nested_dtype"):
            if isinstance(meta.get(key), torch.dtype):
                meta[key] = str(meta[key]).removeprefix("torch.")
    else:
        name = f"{prefix}.{state_keys[0]}"
        expected = [f"{_STATE}.bitsandbytes__{t}" for t in QUANT_TYPES]
        if len(state_keys) > 1 or state_keys[0] not in expected:
            raise ValueError(
                f"from_state_dict: {', '.join(f'{prefix}.{key}' for key in state_keys)} found, expected exactly one of "
                + " and ".join(f"{prefix}.{key}" for key in expected)
            )
        meta = _parse_json(items.pop(state_keys[0]), name)
        if meta.get("quant_type") != state_keys[0].rpartition("__")[2]:
            said = meta.get("quant_type")
            raise ValueError(f"from_state_dict: {name} says quant_type {said!r}, which its name denies")
    for key in _META_KEYS:
        _require(key in meta, prefix, f"{_STATE}: {key}", "is missing")
    unknown = sorted(meta.keys() - set(_META_KEYS) - set(_NESTED_META_KEYS))
    _require(not unknown, prefix, f"{_STATE}: {', '.join(map(str, unknown))}", "is unknown")
    return meta


def _parse_json(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8 or value.dim() != 1:
        raise TypeError(f"from_state_dict: {name} is {_describe(value)}, expected a 1-D uint8 tensor of UTF-8 JSON")
    if value.is_meta:
        raise ValueError(f"from_state_dict: {name} is on the meta device and holds no data; load the file on the CPU")
    try:
        meta = json.loads(bytes(value.tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"from_state_dict: {name} is not valid UTF-8 JSON ({error}); the file is damaged") from None
    if not isinstance(meta, dict):
        raise ValueError(f"from_state_dict: {name} holds a JSON {type(meta).__name__}, expected an object")
    return meta


def _from_list(items: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Old releases: [absmax, shape, dtype, blocksize, None | [offset, [absmax, map, …]], quant_type, maybe the table]."""
    name = f"{prefix}.{_STATE}"
    extra = sorted(items.keys() - {_STATE})
    _require(not extra, prefix, ", ".join(extra), f"stands beside a list-shaped {_STATE}, which holds everything")
    state = list(items[_STATE])
    if not 6 <= len(state) <= 7:
        raise ValueError(f"from_state_dict: {name} is a list of {len(state)} parts, expected 6 or 7")
    absmax, shape, dtype, blocksize, nested, quant_type = state[:6]
    meta = {
        "shape": list(shape) if isinstance(shape, (list, tuple)) else shape,
        "dtype": str(dtype).removeprefix("torch."),
        "blocksize": blocksize,
        "quant_type": quant_type,
    }
    fields = {
        "absmax": _tensor(absmax, name, "0"),
        "blocksize": _integer(meta, "blocksize", name),
        "quant_type": _choice(meta, "quant_type", QUANT_TYPES, name),
        "shape": _shape(meta, name),
        "dtype": _DTYPES[_choice(meta, "dtype", tuple(_DTYPES), name)],
    }
    if len(state) == 7:
        _check_quant_map(state[6], fields["quant_type"], name)
    if nested is not None:
        if not (isinstance(nested, (list, tuple)) and len(nested) == 2 and isinstance(nested[1], (list, tuple))):
            got = _describe(nested)
            raise ValueError(f"from_state_dict: {name}[4] is {got}, expected None or [offset, [absmax, …]]")
        offset, inner = nested
        has_map = len(inner) > 1 and isinstance(inner[1], torch.Tensor) and inner[1].numel() == 256
        _require(len(inner) > 0, name, "4", "has no nested absmax")
        fields["nested_absmax"] = _tensor(inner[0], name, "4.1.0")
        # where the list has the shape in the map's place, the map was always the dynamic one
        fields["nested_map"] = inner[1] if has_map else dynamic_map().to(inner[0].device)
        fields["offset"] = torch.as_tensor(offset, dtype=torch.float32, device=inner[0].device).reshape(())
    _check_finite(fields, prefix)
    return fields


def _packed_bytes(weight: Any, prefix: str) -> torch.Tensor:
    """Any quant_storage dtype and the transposed [1, bytes] form hold the same bytes in the same order."""
    if not isinstance(weight, torch.Tensor) or weight.is_complex() or weight.dtype == torch.bool:
        raise TypeError(f"from_state_dict: {prefix} is {_describe(weight)}, expected packed bytes (a uint8 tensor)")
    if weight.dim() != 2 or 1 not in weight.shape:
        raise ValueError(
            f"from_state_dict: {prefix} has shape {tuple(weight.shape)}, expected [bytes, 1] (or [1, bytes]); an "
            "unquantised weight is quantised with quantize_4bit"
        )
    return weight.detach().reshape(-1).contiguous().view(torch.uint8)[:, None]


def _check_quant_map(value: Any, quant_type: str, prefix: str) -> None:
    stored = _tensor(value, prefix, "quant_map")
    table = quant_map(quant_type)
    if stored.shape != table.shape:
        raise ValueError(f"from_state_dict: {prefix}.quant_map has shape {tuple(stored.shape)}, expected (16,)")
    if not stored.is_meta and not torch.equal(stored.cpu().float(), table):
        code = (stored.cpu().float() != table).nonzero()[0].item()
        raise ValueError(
            f"from_state_dict: {prefix}.quant_map differs from the {quant_type} table at code {code}: "
            f"{stored[code].item()!r}, expected {table[code].item()!r}; the weight uses another 4-bit type"
        )


def _check_finite(fields: Mapping[str, Any], prefix: str) -> None:
    for name in ("absmax", "nested_absmax", "nested_map", "offset"):
        tensor = fields.get(name)
        if tensor is not None and tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"from_state_dict: {prefix}: {name} holds NaN or infinity; the file is damaged")


def _tensor(value: Any, prefix: str, key: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"from_state_dict: {prefix}.{key} is {_describe(value)}, expected a tensor")
    return value.detach()


def _choice(meta: Mapping[str, Any], key: str, allowed: tuple[str, ...], prefix: str) -> str:
    if meta[key] not in allowed:
        raise ValueError(f"from_state_dict: {prefix}: {key} is {meta[key]!r}, expected one of {', '.join(allowed)}")
    return meta[key]


def _integer(meta: Mapping[str, Any], key: str, prefix: str) -> int:
    if isinstance(meta[key], bool) or not isinstance(meta[key], int):
        raise ValueError(f"from_state_dict: {prefix}: {key} is {meta[key]!r}, expected a whole number")
    return meta[key]


def _shape(meta: Mapping[str, Any], prefix: str) -> torch.Size:
    shape = meta["shape"]
    if not isinstance(shape, (list, tuple)) or any(
        isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 1 << 48 for size in shape
    ):
        raise ValueError(f"from_state_dict: {prefix}: shape is {shape!r}, expected a list of sizes such as [4096, 64]")
    return torch.Size(shape)


def _require(there: bool, prefix: str, key: str, problem: str) -> None:
    if not there:
        raise ValueError(f"from_state_dict: {prefix}.{key} {problem}")


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
