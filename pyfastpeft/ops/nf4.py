"""4-bit quantisation ops: quantize_4bit, quantize_absmax, dequantize_4bit and its out variant.

The format is csrc/nf4/nf4_format.h, the maths pyfastpeft/reference/nf4.py; the CPU implementations are here, the CUDA
ones in nf4_cuda.py. None of these ops has a gradient: the codes are integers, and a base weight is frozen. What they
return never requires grad, whatever the inputs do.
"""

from __future__ import annotations

import torch

from pyfastpeft._native import _C
from pyfastpeft.ops import nf4_cuda
from pyfastpeft.ops._library import LIBRARY, dtype_code, register_op
from pyfastpeft.ops._nf4 import (
    absmax_not_finite,
    ceil_div,
    check_absmax,
    check_flat,
    check_out,
    check_weight,
    dequantize_into,
    not_finite,
)
from pyfastpeft.quantized_tensor import QuantizedTensor, flat_schema
from pyfastpeft.reference.nf4 import NESTED_BLOCKSIZE, dynamic_map


def _quantize_cpu(check_finite: bool):
    """quantize_4bit's implementation; with check_finite a NaN or infinity raises."""

    def run(weight: torch.Tensor, blocksize: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
        code = check_weight(weight)
        weight = weight.contiguous()
        n = weight.numel()
        packed = torch.empty(((n + 1) // 2, 1), dtype=torch.uint8)
        absmax = torch.empty(ceil_div(n, max(blocksize, 1)), dtype=torch.float32)
        bad = _C.nf4_quantize_cpu(
            weight.data_ptr(), code, n, blocksize, quant_type,
            packed.data_ptr(), packed.numel(), absmax.data_ptr(), absmax.numel(),
        )  # fmt: skip
        if check_finite and bad >= 0:
            raise not_finite(weight, bad)
        return packed, absmax

    return run


def _quantize_fake(weight: torch.Tensor, blocksize: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    check_weight(weight)
    _C.nf4_check(blocksize, quant_type, "quantize_4bit")
    n = weight.numel()
    packed = weight.new_empty(((n + 1) // 2, 1), dtype=torch.uint8)
    return packed, weight.new_empty((ceil_div(n, blocksize),), dtype=torch.float32)


def _quantize_absmax_cpu(check_finite: bool):
    """quantize_absmax's implementation; check_finite as in _quantize_cpu."""

    def run(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        check_absmax(absmax)
        absmax = absmax.detach().contiguous()
        blocks = absmax.numel()
        # torch's own mean: its summation order is part of the format
        offset = absmax.mean() if blocks else torch.zeros(())
        nested_map = dynamic_map()
        codes = torch.empty(blocks, dtype=torch.uint8)
        nested_absmax = torch.empty(ceil_div(blocks, NESTED_BLOCKSIZE), dtype=torch.float32)
        bad = _C.nf4_quantize_absmax_cpu(
            absmax.data_ptr(), blocks, offset.item(), nested_map.data_ptr(), nested_map.numel(),
            codes.data_ptr(), codes.numel(), nested_absmax.data_ptr(), nested_absmax.numel(),
        )  # fmt: skip
        if check_finite and bad >= 0:
            raise absmax_not_finite(absmax, bad, offset)
        return codes, nested_absmax, nested_map, offset

    return run


def _quantize_absmax_fake(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check_absmax(absmax)
    blocks = absmax.numel()
    return (
        absmax.new_empty((blocks,), dtype=torch.uint8),
        absmax.new_empty((ceil_div(blocks, NESTED_BLOCKSIZE),)),
        absmax.new_empty((256,)),
        absmax.new_empty(()),
    )


def _launch_for(out: torch.Tensor):
    return _C.nf4_dequantize_cpu, ()


def _dequantize_cpu(
    packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype
) -> torch.Tensor:
    dtype_code(dtype, "dequantize_4bit", "the output")
    out = torch.empty(shape, dtype=dtype)
    flat = (packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype)
    dequantize_into(_launch_for, out, *flat)
    return out


def _dequantize_fake(packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype):
    dtype_code(dtype, "dequantize_4bit", "the output")
    check_flat(packed, absmax, nested_absmax, nested_map, offset)
    _C.nf4_check(blocksize, quant_type, "dequantize_4bit")
    return packed.new_empty(shape, dtype=dtype)


def _dequantize_out_cpu(
    packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype, *, out
) -> torch.Tensor:
    check_out(out, packed, shape, dtype)
    flat = (packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype)
    if out.is_contiguous():
        dequantize_into(_launch_for, out, *flat)
        torch.autograd.graph.increment_version(out)
    else:
        out.copy_(_dequantize_cpu(*flat))
    return out


def _dequantize_out_fake(
    packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype, *, out
) -> torch.Tensor:
    check_out(out, packed, shape, dtype)
    _dequantize_fake(packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype)
    return out


_QUANTIZE = "(Tensor weight, int blocksize, str quant_type) -> (Tensor packed, Tensor absmax)"
_QUANTIZE_ABSMAX = "(Tensor absmax) -> (Tensor codes, Tensor nested_absmax, Tensor nested_map, Tensor offset)"

# By check_finite. The unchecked overloads leave out the one thing that waits for a GPU.
_quantize = {
    check: register_op(
        ("quantize_4bit" if check else "quantize_4bit.unchecked") + _QUANTIZE,
        cpu=_quantize_cpu(check),
        cuda=nf4_cuda.quantize(check),
        fake=_quantize_fake,
    )
    for check in (True, False)
}
_quantize_absmax = {
    check: register_op(
        ("quantize_absmax" if check else "quantize_absmax.unchecked") + _QUANTIZE_ABSMAX,
        cpu=_quantize_absmax_cpu(check),
        cuda=nf4_cuda.quantize_absmax(check),
        fake=_quantize_absmax_fake,
    )
    for check in (True, False)
}
_dequantize = register_op(
    f"dequantize_4bit({flat_schema}) -> Tensor", cpu=_dequantize_cpu, cuda=nf4_cuda.dequantize, fake=_dequantize_fake
)
_dequantize_out = register_op(
    f"dequantize_4bit.out({flat_schema}, *, Tensor(a!) out) -> Tensor(a!)",
    cpu=_dequantize_out_cpu,
    cuda=nf4_cuda.dequantize_out,
    fake=_dequantize_out_fake,
)
for _op in (*_quantize.values(), *_quantize_absmax.values(), _dequantize, _dequantize_out):
    # no gradient, by decision and not by accident
    LIBRARY.impl(_op, torch.library.fallthrough_kernel, "Autograd")


@_dequantize_out.py_functionalize_impl
def _dequantize_out_functional(ctx, *args, out: torch.Tensor) -> torch.Tensor:
    """torch.compile rewrites writes as values, and for an op that returns its argument it has to be told how."""
    check_out(out, args[0], *args[7:])
    with ctx.redispatch_to_next():
        value = _dequantize(*ctx.unwrap_tensors(args))
    ctx.replace(out, value)
    ctx.commit_update(out)
    ctx.sync(out)
    return out


def quantize_4bit(
    weight: torch.Tensor,
    blocksize: int = 64,
    quant_type: str = "nf4",
    double_quant: bool = False,
    *,
    check_finite: bool = True,
) -> QuantizedTensor:
    """Quantises a weight to 4 bits in blocks (QLoRA, arXiv:2305.14314; bytes as bitsandbytes writes them).

    code(i) = how many of the 15 midpoints between levels lie strictly below w[i] / absmax(block of i).

    weight        any shape (usually [N, K]), float32, float16 or bfloat16; copied if it is not contiguous
    blocksize     values per absmax over the flat weight: 32, 64, 128, … 4096
    quant_type    "nf4" or "fp4"
    double_quant  store absmax in 8 bits too (blocks of 256 around the mean): 0.127 instead of 0.5 bit per value at 64
    check_finite  raise for a value that has no code. On a GPU the check waits for the kernel; without it (in a CUDA
                  graph, say) nothing does, and the result for a weight with a NaN or infinity means nothing

    On a GPU the bytes are those of the CPU, but for double quantisation: torch.mean adds absmax up in another order
    there, so the offset may differ by some ulp, and a few codes of absmax with it.

    Returns a QuantizedTensor; it carries no gradient, whether or not the weight requires one.
    Raises ValueError for a NaN or infinity (naming its position), a wrong blocksize or quant_type; TypeError for the
    dtype.
    """
    packed, absmax = _quantize[check_finite](weight, blocksize, quant_type)
    nested_absmax = nested_map = offset = None
    if double_quant:
        absmax, nested_absmax, nested_map, offset = _quantize_absmax[check_finite](absmax)
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
        return _dequantize(*args)
    return _dequantize_out(*args, out=out)
