"""QuantizedTensor: a 4-bit weight with its statistics, and its two-way road to bitsandbytes' state-dict keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from pyfastpeft._nf4_state_dict import fields_from_state_dict, to_state_dict
from pyfastpeft.reference.nf4 import BLOCKSIZES, NESTED_BLOCKSIZE, QUANT_TYPES

# How a QuantizedTensor stands in an op's schema; `flat()` gives the values in this order.
flat_schema = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_map, Tensor? offset, "
    "int blocksize, str quant_type, SymInt[] shape, ScalarType dtype"
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TENSORS = ("packed", "absmax", "nested_absmax", "nested_map", "offset")


@dataclasses.dataclass(eq=False, repr=False)
class QuantizedTensor:
    """A weight in 4 bits: what quantize_4bit returns and every 4-bit op takes. Its tensors never require grad.

    packed         uint8 [(n+1)//2, 1], two codes a byte, the even value in the high nibble; n = prod(shape)
    absmax         float32 [blocks], or its uint8 codes when double-quantised; blocks = ceil(n / blocksize)
    nested_absmax  float32 [ceil(blocks/256)], nested_map float32 [256], offset float32 []: None unless double-quantised
    blocksize      32, 64, … 4096 values of the flat weight;  quant_type  "nf4" or "fp4"
    shape, dtype   those of the weight before quantisation (and of dequantize_4bit's result)

    Raises ValueError or TypeError naming the part that does not fit the others.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    blocksize: int
    quant_type: str
    shape: torch.Size
    dtype: torch.dtype
    nested_absmax: torch.Tensor | None = None
    nested_map: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.shape, torch.Size):  # torch.compile of torch 2.6 cannot trace the conversion
            self.shape = torch.Size(self.shape)
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"QuantizedTensor: blocksize is {self.blocksize}, expected one of {BLOCKSIZES}")
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"QuantizedTensor: quant_type is {self.quant_type!r}, expected 'nf4' or 'fp4'")
        if self.dtype not in DTYPES:
            raise TypeError(f"QuantizedTensor: dtype is {self.dtype}, expected float32, float16 or bfloat16")
        n = math.prod(self.shape)
        blocks = -(n // -self.blocksize)
        given = [t is not None for t in (self.nested_absmax, self.nested_map, self.offset)]
        if any(given) != all(given):
            raise ValueError("QuantizedTensor: nested_absmax, nested_map and offset come together or not at all")
        nested = given[0]
        self._expect("packed", torch.uint8, ((n + 1) // 2, 1), f"[({n} + 1) // 2, 1] of shape {tuple(self.shape)}")
        self._expect("absmax", torch.uint8 if nested else torch.float32, (blocks,), f"ceil({n} / {self.blocksize})")
        if nested:
            nested_blocks = -(blocks // -NESTED_BLOCKSIZE)
            self._expect("nested_absmax", torch.float32, (nested_blocks,), f"ceil({blocks} / {NESTED_BLOCKSIZE})")
            self._expect("nested_map", torch.float32, (256,), "the levels of 8 bits")
            self._expect("offset", torch.float32, (), "one number")

    def _expect(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], why: str) -> None:
        tensor = getattr(self, name)
        if tensor.dtype != dtype:
            raise TypeError(f"QuantizedTensor: {name} has dtype {tensor.dtype}, expected {dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"QuantizedTensor: {name} has shape {tuple(tensor.shape)}, expected {shape} (= {why})")
        if tensor.device != self.packed.device:
            raise ValueError(f"QuantizedTensor: {name} is on {tensor.device}, packed is on {self.packed.device}")

    @property
    def is_nested(self) -> bool:
        """Whether absmax is itself quantised (double quantisation)."""
        return self.nested_map is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by attribute name, those present."""
        return {name: t for name in _TENSORS if (t := getattr(self, name)) is not None}

    def flat(self) -> tuple:
        """The arguments that stand for it in an op's schema (`flat_schema`)."""
        return (
            self.packed, self.absmax, self.nested_absmax, self.nested_map, self.offset,
            self.blocksize, self.quant_type, self.shape, self.dtype,
        )  # fmt: skip

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> QuantizedTensor:
        """On that device; itself when it is there already. The dtype of a quantised tensor cannot be changed."""
        if isinstance(device, torch.dtype):
            raise TypeError(
                f"QuantizedTensor.to: got {device}, expected a device; dequantize_4bit(q, dtype={device}) converts"
            )
        moved = {name: t.to(device, non_blocking=non_blocking) for name, t in self.tensors().items()}
        if all(moved[name] is t for name, t in self.tensors().items()):
            return self
        return dataclasses.replace(self, **moved)

    def __eq__(self, other: object) -> bool:
        """Bitwise equality of every part."""
        if not isinstance(other, QuantizedTensor):
            return NotImplemented
        mine, theirs = self.tensors(), other.tensors()
        return (
            (self.blocksize, self.quant_type, self.shape, self.dtype)
            == (other.blocksize, other.quant_type, other.shape, other.dtype)
            and mine.keys() == theirs.keys()
            and self.device == other.device
            and all(torch.equal(mine[name], theirs[name]) for name in mine)
        )

    __hash__ = None

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor({self.quant_type}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"blocksize={self.blocksize}, {'nested, ' if self.is_nested else ''}nbytes={self.nbytes}, "
            f"device='{self.device}')"
        )

    def state_dict(self, prefix: str = "weight") -> dict[str, torch.Tensor]:
        """bitsandbytes' keys: `prefix`, `prefix.absmax`, … (csrc/nf4/README.md). The tensors are not copied."""
        return to_state_dict(self, prefix)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any], prefix: str = "weight") -> QuantizedTensor:
        """Reads the keys `prefix` and `prefix.*` (others are ignored): ours, bitsandbytes', and its older forms.

        Raises ValueError / TypeError naming the key that is missing, unknown or malformed.
        """
        return cls(**fields_from_state_dict(state_dict, prefix))
