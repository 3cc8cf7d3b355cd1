"""4-bit quantisation ops: quantize_4bit, quantize_absmax, dequantize_4bit and its out variant.

The format is csrc/nf4/nf4_format.h, the maths pyfastpeft/reference/nf4.py. None of these ops has a gradient: the codes
are integers, and a base weight is frozen. What they return never requires grad, whatever the inputs do.
"""

from __future__ import annotations

import math

import torch

from pyfastpeft._native import _C
from pyfastpeft.ops._cuda import target
from pyfastpeft.ops._library import LIBRARY, dtype_code, register_op
from pyfastpeft.quantized_tensor import QuantizedTensor, flat_schema
from pyfastpeft.reference.nf4 import NESTED_BLOCKSIZE, dynamic_map


def _ceil_div(n: int, d: int) -> int:
    return -(n // -d)


def _position(flat: int, shape: torch.Size) -> str:
    """The flat position as an index of `shape`: "[row, col]" of a matrix."""
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return "[" + ", ".join(str(i) for i in reversed(index)) + "]"


def _check_weight(weight: torch.Tensor) -> int:
    return dtype_code(weight.dtype, "quantize_4bit", "weight")


def _quantize_cpu(weight: torch.Tensor, blocksize: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    code = _check_weight(weight)
    weight = weight.contiguous()
    n = weight.numel()
    packed = torch.empty(((n + 1) // 2, 1), dtype=torch.uint8)
    absmax = torch.empty(_ceil_div(n, max(blocksize, 1)), dtype=torch.float32)
    bad = _C.nf4_quantize_cpu(
        weight.data_ptr(), code, n, blocksize, quant_type,
        packed.data_ptr(), packed.numel(), absmax.data_ptr(), absmax.numel(),
    )  # fmt: skip
    if bad >= 0:
        raise _not_finite(weight, bad)
    return packed, absmax


def _not_finite(weight: torch.Tensor, bad: int) -> ValueError:
    value = weight.reshape(-1)[bad].item()
    return ValueError(
        f"quantize_4bit: weight{_position(bad, weight.shape)} is {value}, expected finite values "
        f"(shape {tuple(weight.shape)}); repair the checkpoint, or replace it with torch.nan_to_num"
    )


def _quantize_cuda(weight: torch.Tensor, blocksize: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    code = _check_weight(weight)
    weight = weight.contiguous()
    n = weight.numel()
    packed = torch.empty(((n + 1) // 2, 1), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(_ceil_div(n, max(blocksize, 1)), dtype=torch.float32, device=weight.device)
    none = torch.iinfo(torch.int64).max
    bad = torch.full((1,), none, dtype=torch.int64, device=weight.device)
    module, device, stream = target(weight, "quantize_4bit")
    module.nf4_quantize_cuda(
        weight.data_ptr(), code, n, blocksize, quant_type,
        packed.data_ptr(), packed.numel(), absmax.data_ptr(), absmax.numel(), bad.data_ptr(), device, stream,
    )  # fmt: skip
    if (bad := bad.item()) != none:  # waits for the stream: once per weight, when a model is loaded
        raise _not_finite(weight, bad)
    return packed, absmax


def _quantize_fake(weight: torch.Tensor, blocksize: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    _check_weight(weight)
    _C.nf4_check(blocksize, quant_type, "quantize_4bit")
    n = weight.numel()
    packed = weight.new_empty(((n + 1) // 2, 1), dtype=torch.uint8)
    return packed, weight.new_empty((_ceil_div(n, blocksize),), dtype=torch.float32)


def _check_absmax(absmax: torch.Tensor) -> None:
    if absmax.dtype != torch.float32 or absmax.dim() != 1:
        raise TypeError(
            f"quantize_absmax: absmax is {absmax.dtype} of shape {tuple(absmax.shape)}, expected float32 [blocks] "
            "as quantize_4bit returns it"
        )


def _quantize_absmax_cpu(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_absmax(absmax)
    absmax = absmax.detach().contiguous()
    blocks = absmax.numel()
    # torch's own mean: its summation order is part of the format
    offset = absmax.mean() if blocks else torch.zeros(())
    nested_map = dynamic_map()
    codes = torch.empty(blocks, dtype=torch.uint8)
    nested_absmax = torch.empty(_ceil_div(blocks, NESTED_BLOCKSIZE), dtype=torch.float32)
    bad = _C.nf4_quantize_absmax_cpu(
        absmax.data_ptr(), blocks, offset.item(), nested_map.data_ptr(), nested_map.numel(),
        codes.data_ptr(), codes.numel(), nested_absmax.data_ptr(), nested_absmax.numel(),
    )  # fmt: skip
    if bad >= 0:
        raise ValueError(
            f"quantize_absmax: absmax[{bad}] = {absmax[bad].item()} around the mean {offset.item()} is not finite in "
            "float32; the weight is too large for double quantisation: quantise it with double_quant=False"
        )
    return codes, nested_absmax, nested_map, offset


def _quantize_absmax_fake(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_absmax(absmax)
    blocks = absmax.numel()
    return (
        absmax.new_empty((blocks,), dtype=torch.uint8),
        absmax.new_empty((_ceil_div(blocks, NESTED_BLOCKSIZE),)),
        absmax.new_empty((256,)),
        absmax.new_empty(()),
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


def _dequantize_into(
    launch, where, out, packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype
) -> None:
    """out = the weight, by `launch`: the CPU's binding, or the GPU's with `where` = (device, stream)."""
    check_flat(packed, absmax, nested_absmax, nested_map, offset)
    # named, so that a copy made by .contiguous() outlives the call
    packed, absmax = packed.contiguous(), absmax.contiguous()
    if offset is not None:
        nested_absmax, nested_map = nested_absmax.contiguous(), nested_map.contiguous()
    launch(
        packed.data_ptr(), packed.numel(), absmax.data_ptr(), absmax.numel(), _ptr(nested_absmax), _numel(nested_absmax),
        _ptr(nested_map), _numel(nested_map), _ptr(offset), math.prod(shape), blocksize, quant_type,
        dtype_code(dtype, "dequantize_4bit", "the output"), out.data_ptr(), out.numel(), *where,
    )  # fmt: skip


def _cpu_launch(packed):
    return _C.nf4_dequantize_cpu, ()


def _cuda_launch(packed):
    module, device, stream = target(packed, "dequantize_4bit")
    return module.nf4_dequantize_cuda, (device, stream)


def _dequantize(launch_for):
    """dequantize_4bit's implementation for one kind of device."""

    def run(packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype) -> torch.Tensor:
        dtype_code(dtype, "dequantize_4bit", "the output")
        out = torch.empty(shape, dtype=dtype, device=packed.device)
        flat = (packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type)
        _dequantize_into(*launch_for(packed), out, *flat, shape, dtype)
        return out

    return run


def _dequantize_out(launch_for):
    """dequantize_4bit.out's implementation for one kind of device."""

    def run(packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype, *, out):
        _check_out(out, packed, shape, dtype)
        args = (packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype)
        if out.is_contiguous():
            _dequantize_into(*launch_for(packed), out, *args)
            torch.autograd.graph.increment_version(out)
        else:
            out.copy_(_dequantize(launch_for)(*args))
        return out

    return run


def _dequantize_fake(packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype):
    dtype_code(dtype, "dequantize_4bit", "the output")
    check_flat(packed, absmax, nested_absmax, nested_map, offset)
    _C.nf4_check(blocksize, quant_type, "dequantize_4bit")
    return packed.new_empty(shape, dtype=dtype)


def _check_out(out: torch.Tensor, packed: torch.Tensor, shape, dtype: torch.dtype) -> None:
    if out.dtype != dtype or tuple(out.shape) != tuple(shape) or out.device != packed.device:
        raise ValueError(
            f"dequantize_4bit: out is {out.dtype} {tuple(out.shape)} on {out.device}, expected {dtype} {tuple(shape)} "
            f"on {packed.device}"
        )
    if out.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "dequantize_4bit: out requires grad, and writing into it has no derivative; call it under torch.no_grad()"
        )


def _dequantize_out_fake(
    packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype, *, out
) -> torch.Tensor:
    _check_out(out, packed, shape, dtype)
    _dequantize_fake(packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype)
    return out


_quantize = register_op(
    "quantize_4bit(Tensor weight, int blocksize, str quant_type) -> (Tensor packed, Tensor absmax)",
    cpu=_quantize_cpu,
    cuda=_quantize_cuda,
    fake=_quantize_fake,
)
_quantize_absmax = register_op(
    "quantize_absmax(Tensor absmax) -> (Tensor codes, Tensor nested_absmax, Tensor nested_map, Tensor offset)",
    cpu=_quantize_absmax_cpu,
    fake=_quantize_absmax_fake,
)
_dequantize_op = register_op(
    f"dequantize_4bit({flat_schema}) -> Tensor",
    cpu=_dequantize(_cpu_launch),
    cuda=_dequantize(_cuda_launch),
    fake=_dequantize_fake,
)
_dequantize_out_op = register_op(
    f"dequantize_4bit.out({flat_schema}, *, Tensor(a!) out) -> Tensor(a!)",
    cpu=_dequantize_out(_cpu_launch),
    cuda=_dequantize_out(_cuda_launch),
    fake=_dequantize_out_fake,
)
for _name in ("quantize_4bit", "quantize_absmax", "dequantize_4bit", "dequantize_4bit.out"):
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # no gradient, by decision and not by accident


@_dequantize_out_op.py_functionalize_impl
def _dequantize_out_functional(ctx, *args, out: torch.Tensor) -> torch.Tensor:
    """torch.compile rewrites writes as values, and for an op that returns its argument it has to be told how."""
    _check_out(out, args[0], *args[7:])
    with ctx.redispatch_to_next():
        value = _dequantize_op(*ctx.unwrap_tensors(args))
    ctx.replace(out, value)
    ctx.commit_update(out)
    ctx.sync(out)
    return out


def quantize_4bit(
    weight: torch.Tensor, blocksize: int = 64, quant_type: str = "nf4", double_quant: bool = False
) -> QuantizedTensor:
    """Quantises a weight to 4 bits in blocks (QLoRA, arXiv:2305.14314; bytes as bitsandbytes writes them).

    code(i) = how many of the 15 midpoints between levels lie strictly below w[i] / absmax(block of i).

    weight        any shape (usually [N, K]), float32, float16 or bfloat16; copied if it is not contiguous
    blocksize     values per absmax over the flat weight: 32, 64, 128, … 4096
    quant_type    "nf4" or "fp4"
    double_quant  store absmax in 8 bits too (blocks of 256 around the mean): 0.127 instead of 0.5 bit per value at 64

    Returns a QuantizedTensor; it carries no gradient, whether or not the weight requires one.
    Raises ValueError for a NaN or infinity (naming its position), a wrong blocksize or quant_type; TypeError for the
    dtype.
    """
    packed, absmax = _quantize(weight, blocksize, quant_type)
    nested_absmax = nested_map = offset = None
    if double_quant:
        absmax, nested_absmax, nested_map, offset = _quantize_absmax(absmax)
    return QuantizedTensor(
        packed=packed, absmax=absmax, nested_absmax=nested_absmax, nested_map=nested_map, offset=offset,
        blocksize=blocksize, quant_type=quant_type, shape=weight.shape, dtype=weight.dtype,
    )  # fmt: skip


def dequantize_4bit(
    q: QuantizedTensor, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight back: level(code) · absmax in fp32, rounded once to dtype; one pass, nested statistics or not.

    q      a QuantizedTensor
    dtype  float32, float16 or bfloat16; None: that of `out` where given, else the dtype the weight had
    out    written into and returned: q.shape, on q's device; if it is not contiguous a temporary copy is made

    Returns a tensor of q.shape without grad. Raises ValueError / TypeError on a malformed q or out.
    """
    if dtype is None:
        dtype = q.dtype if out is None else out.dtype
    args = (*q.flat()[:-1], dtype)
    if out is None:
        return _dequantize_op(*args)
    return _dequantize_out_op(*args, out=out)
