"""What the CPU and CUDA implementations of the 4-bit ops share: checks, error messages, a tensor's address."""

from __future__ import annotations

import math

import torch

from pyfastpeft.ops._library import dtype_code


def ceil_div(n: int, d: int) -> int:
    return -(n // -d)


def _position(flat: int, shape: torch.Size) -> str:
    """The flat position as an index of `shape`: "[row, col]" of a matrix."""
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return "[" + ", ".join(str(i) for i in reversed(index)) + "]"


def check_weight(weight: torch.Tensor) -> int:
    return dtype_code(weight.dtype, "quantize_4bit", "weight")


def not_finite(weight: torch.Tensor, bad: int) -> ValueError:
    value = weight.reshape(-1)[bad].item()
    return ValueError(
        f"quantize_4bit: weight{_position(bad, weight.shape)} is {value}, expected finite values "
        f"(shape {tuple(weight.shape)}); repair the checkpoint, or replace it with torch.nan_to_num"
    )


def check_absmax(absmax: torch.Tensor) -> None:
    if absmax.dtype != torch.float32 or absmax.dim() != 1:
        raise TypeError(
            f"quantize_absmax: absmax is {absmax.dtype} of shape {tuple(absmax.shape)}, expected float32 [blocks] "
            "as quantize_4bit returns it"
        )


def absmax_not_finite(absmax: torch.Tensor, bad: int, offset: torch.Tensor) -> ValueError:
    return ValueError(
        f"quantize_absmax: absmax[{bad}] = {absmax[bad].item()} around the mean {offset.item()} is not finite in "
        "float32; the weight is too large for double quantisation: quantise it with double_quant=False"
    )


def _ptr(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _numel(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


def check_flat(packed, absmax, nested_absmax, nested_map, offset, op: str = "dequantize_4bit") -> None:
    nested = (nested_absmax, nested_map, offset)
    if any(t is None for t in nested) != all(t is None for t in nested):
        raise ValueError(
            f"{op}: nested_absmax, nested_map and offset are given together (double quantisation) or not at "
            f"all; got {', '.join('None' if t is None else 'a tensor' for t in nested)}"
        )
    expected = [("packed", packed, torch.uint8), ("absmax", absmax, torch.float32 if offset is None else torch.uint8)]
    if offset is not None:
        names = ("nested_absmax", "nested_map", "offset")
        expected += [(name, tensor, torch.float32) for name, tensor in zip(names, nested, strict=True)]
    for name, tensor, dtype in expected:
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected {dtype}")
        if tensor.device != packed.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, packed is on {packed.device}")
    if offset is not None and offset.numel() != 1:
        raise ValueError(f"{op}: offset has {offset.numel()} values, expected 1")


def dequantize_into(
    launch_for, out, packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype
) -> None:
    """out = the weight. launch_for(out) gives the binding and what it takes beyond the CPU's: device and stream, or ()."""
    check_flat(packed, absmax, nested_absmax, nested_map, offset)
    launch, where = launch_for(out)
    # named, so that a copy made by .contiguous() outlives the call
    packed, absmax = packed.contiguous(), absmax.contiguous()
    if offset is not None:
        nested_absmax, nested_map = nested_absmax.contiguous(), nested_map.contiguous()
    launch(
        packed.data_ptr(), packed.numel(), absmax.data_ptr(), absmax.numel(), _ptr(nested_absmax), _numel(nested_absmax),
        _ptr(nested_map), _numel(nested_map), _ptr(offset), math.prod(shape), blocksize, quant_type,
        dtype_code(dtype, "dequantize_4bit", "the output"), out.data_ptr(), out.numel(), *where,
    )  # fmt: skip


def check_out(out: torch.Tensor, packed: torch.Tensor, shape, dtype: torch.dtype) -> None:
    if out.dtype != dtype or tuple(out.shape) != tuple(shape) or out.device != packed.device:
        raise ValueError(
            f"dequantize_4bit: out is {out.dtype} {tuple(out.shape)} on {out.device}, expected {dtype} {tuple(shape)} "
            f"on {packed.device}"
        )
    if out.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "dequantize_4bit: out requires grad, and writing into it has no derivative; call it under torch.no_grad()"
        )
