"""What quantize_model did: the layers it quantised, what it left alone and why, and the bytes before and after."""

from __future__ import annotations

import dataclasses
import math
import re

import torch
from torch import nn

from pyfastpeft.nn.nf4_linear import NF4Linear


@dataclasses.dataclass(frozen=True)
class QuantizedEntry:
    """A layer that is 4-bit now. name: its path in the model; shape: [N, K]; kind: the class it had."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class SkippedEntry:
    """A weight that stays as it was. name: the path of the parameter; kind: the class of the module that holds it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    reason: str


@dataclasses.dataclass
class QuantizationReport:
    """`model.quantization_report` after quantize_model; str() of it is for reading.

    quantized, skipped    one entry a weight, in the model's order; skipped holds every parameter of two or more
                          dimensions that is still dense
    model_bytes_before, model_bytes_after    of all parameters and buffers, shared ones once
    """

    quant_type: str
    blocksize: int
    double_quant: bool
    quantized: list[QuantizedEntry] = dataclasses.field(default_factory=list)
    skipped: list[SkippedEntry] = dataclasses.field(default_factory=list)
    model_bytes_before: int = 0
    model_bytes_after: int = 0

    @property
    def bytes_before(self) -> int:
        """Bytes of the quantised layers' weights before."""
        return sum(entry.bytes_before for entry in self.quantized)

    @property
    def bytes_after(self) -> int:
        """Bytes of the same weights now, statistics included."""
        return sum(entry.bytes_after for entry in self.quantized)

    @property
    def bits_per_weight(self) -> float:
        values = sum(math.prod(entry.shape) for entry in self.quantized)
        return 8 * self.bytes_after / values if values else 0.0

    def reason(self, name: str) -> str | None:
        """Why the module or parameter of that path was skipped; None if it was not."""
        return next((e.reason for e in self.skipped if e.name in (name, f"{name}.weight")), None)

    def __str__(self) -> str:
        lines = [
            f"{self.quant_type.upper()}, block size {self.blocksize}"
            f"{', double quantisation' if self.double_quant else ''}: {len(self.quantized)} layers, "
            f"{readable_bytes(self.bytes_before)} -> {readable_bytes(self.bytes_after)} "
            f"({self.bits_per_weight:.2f} bits a weight); the model {readable_bytes(self.model_bytes_before)} -> "
            f"{readable_bytes(self.model_bytes_after)}"
        ]
        for name, count, entry in _grouped(self.quantized, lambda e: (e.kind, e.shape, e.dtype)):
            lines.append(f"  {name}{count}  {entry.kind} {list(entry.shape)} {entry.dtype}")
        if self.skipped:
            total = readable_bytes(sum(entry.nbytes for entry in self.skipped))
            lines.append(f"not quantised, {total}:")
        for name, count, entry in _grouped(self.skipped, lambda e: (e.kind, e.shape, e.dtype, e.reason)):
            lines.append(f"  {name}{count}  {entry.kind} {list(entry.shape)} {entry.dtype}: {entry.reason}")
        return "\n".join(lines)


def _grouped(entries, key):
    """(name with * for the numbers that vary, " × count", one of them) per group of like entries, in order."""
    groups: dict[tuple, list] = {}
    for entry in entries:
        groups.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "*", entry.name), *key(entry)), []).append(entry)
    for (pattern, *_), members in groups.items():
        one = len(members) == 1
        yield members[0].name if one else pattern, "" if one else f" × {len(members)}", members[0]


def readable_bytes(count: int) -> str:
    """1536 -> "1.5 kB": decimal units, three digits."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def quantized_entry(name: str, layer: NF4Linear, kind: str) -> QuantizedEntry:
    """The entry of a layer that had the class `kind`."""
    shape = (layer.out_features, layer.in_features)
    return QuantizedEntry(
        name=name,
        kind=kind,
        shape=shape,
        dtype=str(layer.quantized_dtype).removeprefix("torch."),
        bytes_before=math.prod(shape) * layer.quantized_dtype.itemsize,
        bytes_after=layer.quantized.nbytes,
    )


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, buffers and 4-bit statistics; shared storages once."""
    storages = {}
    for module in model.modules():
        tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        if isinstance(module, NF4Linear):
            tensors += module.quantized.tensors().values()
        for tensor in tensors:
            if not nn.parameter.is_lazy(tensor):
                storages[(tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)] = tensor.nbytes
    return sum(storages.values())


def record_in_config(model: nn.Module, report: QuantizationReport, compute_dtype: torch.dtype | None) -> None:
    """Says in a transformers config what bitsandbytes' checkpoints say there, so that the saved folder loads anywhere."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return
    dtype = report.quantized[0].dtype if compute_dtype is None else str(compute_dtype).removeprefix("torch.")
    dense = [e.name.removesuffix(".weight") for e in report.skipped if e.name.endswith(".weight") and len(e.shape) == 2]
    config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": report.quant_type,
        "bnb_4bit_use_double_quant": report.double_quant,
        "llm_int8_skip_modules": dense,
    }
