"""linear_4bit: a linear layer whose weight is in 4 bits, with its low-rank path. Kernels: csrc/nf4/nf4_matmul.h, csrc/lora.

W [N, K] is frozen, so the gradients are those of ops/lora.py without dW. The whole of W is never dequantised:

    few rows of x    y straight from the packed bytes, bias and low-rank path in the same sums, one rounding; weights are
                     scaled in fp32 and, where the processor multiplies bf16 and x is bf16, rounded to it once
    many, bfloat16   where the processor multiplies bfloat16 (AVX-512 BF16, AMX): panels of W decoded once into the L2 cache and
                     multiplied with hundreds of tokens there; bias and low-rank path (S and B rounded to bfloat16
                     once) in the same sums, one rounding
    many, else       W in tiles of at most TILE_BYTES, each dequantised (rounded once to x's dtype) into one buffer that
                     stays in the cache, and multiplied there by torch's matmul:
                       y  [:, n : n + rows] = x  · W[n : n + rows, :]ᵀ        a tile is some rows of W
    float16          the same with fp32 tiles and some rows of x at a time in fp32: CPUs multiply fp16 slowly or not at all;
                     so too bfloat16 where the instruction set is AVX2 (torch: 108 ms for 64 rows of 4096 x 4096, fp32 40)

dX for any number of rows comes straight from the packed bytes too (csrc/nf4/nf4_backward_kernel.h), without dropout with its
low-rank part in the same sums. The scalar instruction set goes through tiles above a few rows there as well:

    dx [:, k : k + cols] = dy · W[:, k : k + cols]      a tile is some columns: no sum is cut into pieces rounded one by one
"""

from __future__ import annotations

import torch

from pyfastpeft._native import _C
from pyfastpeft.ops import nf4_matmul_cuda
from pyfastpeft.ops._library import dtype_code, register_op, register_vmap
from pyfastpeft.ops._linear import (
    LORA_SCHEMA,
    as_rows,
    autocasts,
    check_grad,
    check_mask,
    check_operands,
    check_s,
    check_x,
    draw_seed,
    empty_mask,
    register_token_vmap,
    shaped,
)
from pyfastpeft.ops._linear_cpu import draw_mask, expand_, kept_mask, lora_backward_, shrink
from pyfastpeft.ops.nf4 import check_flat
from pyfastpeft.quantized_tensor import QuantizedTensor, flat_schema

# Up to this many rows of x the packed bytes are read directly; by instruction set, as csrc/common/cpu_isa.h names them.
# Measured on Zen 4 at 4096 x 4096, one thread of a shared machine, milliseconds direct / panels: avx512 bf16 12 rows 2.6 / 3.2,
# 16 rows 3.5 / 3.3, 32 rows 7.1 / 5.8. Direct / tiles: avx512 fp32 128 rows 52.6 / 54.8, 192 rows 79.9 / 78.4 (fp16 alike); avx2
# fp32 64 rows 31.3 / 34.0, 96 rows 47.8 / 44.0; avx2 bf16 64 rows 31.3 / 32.4, 96 rows 47.3 / 44.2. The scalar kernel loses to
# torch's vectors from the start, but holds no tile: it serves the fewest rows.
_FEW_ROWS = {
    "scalar": {torch.float32: 8, torch.float16: 8, torch.bfloat16: 8},
    "avx2": {torch.float32: 64, torch.float16: 64, torch.bfloat16: 64},
    "avx512": {torch.float32: 128, torch.float16: 128, torch.bfloat16: 14},
}
# with AMX tokens cost a twentieth and decoding W stays: the cost model in csrc/nf4/nf4_matmul_cpu_amx.cpp puts the crossing
# between 8 and 16 tokens
_FEW_ROWS["amx"] = _FEW_ROWS["avx512"] | {torch.bfloat16: 12}
# Panels take 16 rows at a time, filled or not (2.5 ms, by AMX 0.3): up to this many that are left over are read directly
# instead (0.22 ms each).
_LEFT_OVER_ROWS = {"avx512": 10, "amx": 0}


def matvec_rows(dtype: torch.dtype) -> int:
    """The most rows of x for which the packed bytes are read directly: nf4_matvec_cpu."""
    return _FEW_ROWS[_C.cpu_isa()][dtype]


def _fused_parts(M: int, dtype: torch.dtype) -> list:
    """(kernel, begin, end) of the rows of x that each fused product takes; none where tiles are better."""
    if matvec_rows(dtype) >= M:
        return [(_C.nf4_matvec_cpu, 0, M)]
    if dtype != torch.bfloat16 or not _C.nf4_panel_available():
        return []
    whole = M - M % 16
    if 0 < M - whole <= _LEFT_OVER_ROWS[_C.cpu_isa()]:
        return [(_C.nf4_panel_cpu, 0, whole), (_C.nf4_matvec_cpu, whole, M)]
    return [(_C.nf4_panel_cpu, 0, M)]


# Of 2, 4, 8, 16 and 32 MiB, 8 was best from 16 to 2048 tokens: below, each product reads x again and threads meet more
# often; above, a tile leaves the cache and its fresh pages are faulted in at every call.
TILE_BYTES = 8 << 20
WIDENED_ROWS = 256  # of x at a time


def _check(
    op, device, packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape
) -> tuple[int, int]:
    """N and K of the weight."""
    check_flat(packed, absmax, nested_absmax, nested_map, offset, op)
    _C.nf4_check(blocksize, quant_type, op)
    if len(shape) != 2:
        raise ValueError(f"{op}: the weight's shape is {tuple(shape)}, expected (N, K)")
    if packed.device != device:
        raise ValueError(f"{op}: the weight is on {packed.device}, x is on {device}; move one with .to(device)")
    return shape[0], shape[1]


class _Weight:
    """A 4-bit weight for the length of a call: the binding's view of it, and the tensors that view points into."""

    def __init__(self, packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, N, K) -> None:
        tensors = [packed, absmax, nested_absmax, nested_map, offset]
        tensors = [None if t is None else t.contiguous() for t in tensors]
        sizes = [(0, 0) if t is None else (t.data_ptr(), t.numel()) for t in tensors]
        self.tensors, self.N, self.K = tensors, N, K
        self.view = _C.PackedWeight(
            *sizes[0], *sizes[1], *sizes[2], *sizes[3], sizes[4][0], N, K, blocksize, quant_type
        )

    def tile(self, row: int, rows: int, col: int, cols: int, buffer: torch.Tensor) -> torch.Tensor:
        """W[row : row + rows, col : col + cols] in buffer's dtype, written into its beginning."""
        out = buffer[: rows * cols]
        code = dtype_code(buffer.dtype, "linear_4bit", "the tile")
        _C.nf4_dequantize_tile_cpu(self.view, row, rows, col, cols, code, out.data_ptr(), out.numel())
        return out.view(rows, cols)


def _tiles(length: int, other: int, itemsize: int, multiple: int):
    """(begin, count) of the tiles along `length`, each count · other · itemsize bytes or little more."""
    step = max(1, TILE_BYTES // max(1, other * itemsize) // multiple) * multiple
    return [(begin, min(step, length - begin)) for begin in range(0, length, step)]


def _fused(kernel, w: _Weight, x, bias, s, lora_b, y) -> None:
    """y = x·Wᵀ + bias + s·lora_bᵀ, by _C.nf4_matvec_cpu or _C.nf4_panel_cpu; s [M, R] float32 or None."""
    added = [None if t is None else t.to(torch.float32).contiguous() for t in (bias, s, lora_b)]
    addresses = [(0, 0) if t is None else (t.data_ptr(), t.numel()) for t in added]
    code = dtype_code(x.dtype, "linear_4bit", "x")
    kernel(
        w.view, x.data_ptr(), x.numel(), x.shape[0], *addresses[0], *addresses[1], *addresses[2],
        0 if s is None else s.shape[1], code, y.data_ptr(), y.numel(),
    )  # fmt: skip


def _fused_backward(w: _Weight, grad, ds, lora_a, grad_x) -> None:
    """grad_x = grad·W + ds·lora_a from the packed bytes; ds [M, R] float32 or None."""
    added = [None if t is None else t.to(torch.float32).contiguous() for t in (ds, lora_a)]
    addresses = [(0, 0) if t is None else (t.data_ptr(), t.numel()) for t in added]
    code = dtype_code(grad.dtype, "linear_4bit_backward", "grad_output")
    _C.nf4_backward_cpu(
        w.view, grad.data_ptr(), grad.numel(), grad.shape[0], *addresses[0], *addresses[1],
        0 if ds is None else ds.shape[1], code, grad_x.data_ptr(), grad_x.numel(),
    )  # fmt: skip


def _tile_dtype(dtype: torch.dtype) -> torch.dtype:
    slow = dtype == torch.float16 or (dtype == torch.bfloat16 and _C.cpu_isa() == "avx2")
    return torch.float32 if slow else dtype


def _row_chunks(M: int, widened: bool):
    step = WIDENED_ROWS if widened else max(1, M)
    return [(begin, min(step, M - begin)) for begin in range(0, M, step)]


def _matmul(w: _Weight, x, bias, y) -> None:
    """y [M, N] = x [M, K] · Wᵀ + bias, by tiles of W's rows."""
    dtype = _tile_dtype(x.dtype)
    bias = None if bias is None else bias.to(dtype)
    tiles = _tiles(w.N, w.K, dtype.itemsize, 16)
    buffer = torch.empty(max(count for _, count in tiles) * w.K, dtype=dtype)
    for n, count in tiles:
        tile = w.tile(n, count, 0, w.K, buffer).t()
        for m, rows in _row_chunks(x.shape[0], x.dtype != dtype):
            _product(
                x[m : m + rows], tile, None if bias is None else bias[n : n + count], y[m : m + rows, n : n + count]
            )


def _matmul_backward(w: _Weight, grad, grad_x) -> None:
    """grad_x [M, K] = grad [M, N] · W, by tiles of W's columns."""
    dtype = _tile_dtype(grad.dtype)
    tiles = _tiles(w.K, w.N, dtype.itemsize, 64)
    buffer = torch.empty(max(count for _, count in tiles) * w.N, dtype=dtype)
    for k, count in tiles:
        tile = w.tile(0, w.N, k, count, buffer)
        for m, rows in _row_chunks(grad.shape[0], grad.dtype != dtype):
            _product(grad[m : m + rows], tile, None, grad_x[m : m + rows, k : k + count])


def _product(x, tile, bias, out) -> None:
    """out = x · tile + bias, where out may be a strided part of a matrix and of another dtype than the tile."""
    if out.dtype != tile.dtype:
        x = x.to(tile.dtype)
        out.copy_(torch.mm(x, tile) if bias is None else torch.addmm(bias, x, tile))
    elif bias is None:
        torch.mm(x, tile, out=out)
    else:
        torch.addmm(bias, x, tile, out=out)


def _check_forward(op, x, flat, shape, bias, lora_a, lora_b, dropout_p, seed) -> tuple[int, int]:
    N, K = _check(op, x.device, *flat, shape)
    check_operands(op, x.device, N, K, bias, lora_a, lora_b, dropout_p, seed)
    check_x(op, x, N, K)
    return N, K


def _forward_cpu(
    x, packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype, bias, lora_a, lora_b,
    scaling, dropout_p, seed,
):  # fmt: skip
    flat = (packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type)
    N, K = _check_forward("linear_4bit", x, flat, shape, bias, lora_a, lora_b, dropout_p, seed)
    rows, w = as_rows(x), _Weight(*flat, N, K)
    y = x.new_empty(rows.shape[0], N)
    mask = draw_mask(*rows.shape, dropout_p, seed)
    s = None if lora_a is None else shrink(rows, lora_a, scaling, dropout_p, mask)
    if y.numel():
        parts = _fused_parts(rows.shape[0], x.dtype)
        if parts:
            for kernel, begin, end in parts:
                part = slice(begin, end)
                _fused(kernel, w, rows[part], bias, None if s is None else s[part], lora_b, y[part])
        else:
            _matmul(w, rows, bias, y)
            if s is not None:
                expand_(y, s, lora_b.t())
    return shaped(x, y, s, mask)


def _forward_cuda(
    x, packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype, bias, lora_a, lora_b,
    scaling, dropout_p, seed, keep_s=True,
):  # fmt: skip
    flat = (packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type)
    N, K = _check_forward("linear_4bit", x, flat, shape, bias, lora_a, lora_b, dropout_p, seed)
    w = nf4_matmul_cuda.Weight(*flat, N, K)
    y, s = nf4_matmul_cuda.forward(w, as_rows(x), bias, lora_a, lora_b, scaling, dropout_p, seed, keep_s=keep_s)
    return shaped(x, y, s)


def _forward_fake(
    x, packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype, bias, lora_a, lora_b,
    scaling, dropout_p, seed,
):  # fmt: skip
    flat = (packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type)
    N, _ = _check_forward("linear_4bit", x, flat, shape, bias, lora_a, lora_b, dropout_p, seed)
    s = (0,) if lora_a is None else (*x.shape[:-1], lora_a.shape[0])
    return x.new_empty((*x.shape[:-1], N)), x.new_empty(s, dtype=torch.float32), empty_mask(x, dropout_p)


def _check_backward(grad_output, x, s, flat, shape, lora_a, lora_b, dropout_p, seed, output_mask) -> tuple[int, int]:
    op = "linear_4bit_backward"
    N, K = _check(op, grad_output.device, *flat, shape)
    check_operands(op, grad_output.device, N, K, None, lora_a, lora_b, dropout_p, seed)
    if (output_mask[2] or output_mask[3]) and lora_a is None:
        raise ValueError(f"{op}: output_mask {list(output_mask)} asks for LoRA gradients, and lora_a is None")
    check_grad(op, grad_output, x, N, K, output_mask[2] or (output_mask[3] and s is None))
    if s is not None and output_mask[3]:
        check_s(op, grad_output, s, lora_a)
    return N, K


def _backward_cpu(
    grad_output, x, packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype, lora_a, lora_b,
    scaling, dropout_p, seed, output_mask, s=None, mask=None,
):  # fmt: skip
    flat = (packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type)
    N, K = _check_backward(grad_output, x, s, flat, shape, lora_a, lora_b, dropout_p, seed, output_mask)
    need_x, need_bias, need_a, need_b = output_mask
    grad, empty = as_rows(grad_output), grad_output.new_empty
    grad_x = grad_a = grad_b = ds = None
    added = False  # whether grad_x has its low-rank part
    if need_x:
        grad_x = empty(grad.shape[0], K)
        direct = _C.cpu_isa() != "scalar" or grad.shape[0] <= matvec_rows(grad.dtype)
        if grad_x.numel() and direct:
            added = lora_a is not None and dropout_p == 0  # a mask belongs to the low-rank part alone
            ds = shrink(grad, lora_b.t(), scaling, 0.0, None) if added else None
            _fused_backward(_Weight(*flat, N, K), grad, ds, lora_a if added else None, grad_x)
        elif grad_x.numel():
            _matmul_backward(_Weight(*flat, N, K), grad, grad_x)
    if lora_a is not None:
        rows = as_rows(x) if need_a or (need_b and s is None) else None
        s = as_rows(s) if need_b and s is not None else None
        check_mask("linear_4bit_backward", grad_output, mask, K, dropout_p)
        mask = kept_mask(mask, grad.shape[0], K, dropout_p, seed)
        grad_a, grad_b = lora_backward_(
            None if added else grad_x, grad, rows, s, lora_a, lora_b, scaling, dropout_p, mask, need_a, need_b, ds
        )
    return (
        grad_x.view(*grad_output.shape[:-1], K) if need_x else empty(0),
        grad.sum(0, dtype=torch.float32) if need_bias else empty(0, dtype=torch.float32),
        grad_a if need_a else empty(0, dtype=torch.float32 if lora_a is None else lora_a.dtype),
        grad_b if need_b else empty(0, dtype=torch.float32 if lora_b is None else lora_b.dtype),
    )


def _backward_cuda(
    grad_output, x, packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype, lora_a, lora_b,
    scaling, dropout_p, seed, output_mask, s=None, mask=None,
):  # fmt: skip
    flat = (packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type)
    N, K = _check_backward(grad_output, x, s, flat, shape, lora_a, lora_b, dropout_p, seed, output_mask)
    grad, empty = as_rows(grad_output), grad_output.new_empty
    rows = as_rows(x) if output_mask[2] or (output_mask[3] and s is None) else None
    s = as_rows(s) if output_mask[3] and s is not None else None
    grad_x, grad_bias, grad_a, grad_b = nf4_matmul_cuda.backward(
        nf4_matmul_cuda.Weight(*flat, N, K), grad, rows, s, lora_a, lora_b, scaling, dropout_p, seed, output_mask
    )
    return (
        empty(0) if grad_x is None else grad_x.view(*grad_output.shape[:-1], K),
        empty(0, dtype=torch.float32) if grad_bias is None else grad_bias,
        empty(0, dtype=torch.float32 if lora_a is None else lora_a.dtype) if grad_a is None else grad_a,
        empty(0, dtype=torch.float32 if lora_b is None else lora_b.dtype) if grad_b is None else grad_b,
    )


def _backward_fake(
    grad_output, x, packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype, lora_a, lora_b,
    scaling, dropout_p, seed, output_mask, s=None, mask=None,
):  # fmt: skip
    flat = (packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type)
    N, K = _check_backward(grad_output, x, s, flat, shape, lora_a, lora_b, dropout_p, seed, output_mask)
    need_x, need_bias, need_a, need_b = output_mask
    empty = grad_output.new_empty
    return (
        empty((*grad_output.shape[:-1], K) if need_x else (0,)),
        empty((N,) if need_bias else (0,), dtype=torch.float32),
        empty(lora_a.shape if need_a else (0,), dtype=torch.float32 if lora_a is None else lora_a.dtype),
        empty(lora_b.shape if need_b else (0,), dtype=torch.float32 if lora_b is None else lora_b.dtype),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, *flat = inputs[:10]
    bias, lora_a, lora_b, ctx.scaling, ctx.dropout_p, seed = inputs[10:]
    _, s, mask = output
    ctx.mark_non_differentiable(s, mask)
    ctx.set_materialize_grads(False)
    ctx.rest = flat[5:]
    ctx.bias_dtype = None if bias is None else bias.dtype
    need = ctx.needs_input_grad
    # a frozen layer without LoRA keeps no activation alive
    ctx.save_for_backward(
        x if need[11] else None,
        s if need[12] else None,
        mask if ctx.dropout_p > 0 and (need[0] or need[11]) else None,
        *flat[:5], lora_a, lora_b, seed,
    )  # fmt: skip


def _backward(ctx, grad_output, *_):
    if grad_output is None:  # nothing depends on y
        return (None,) * 16
    x, s, mask, *tensors, lora_a, lora_b, seed = ctx.saved_tensors
    need = ctx.needs_input_grad
    needs = [need[0], need[10], need[11], need[12]]
    grads = _backward_op(
        grad_output, grad_output if x is None else x, *tensors, *ctx.rest, lora_a, lora_b, ctx.scaling, ctx.dropout_p, seed,
        needs, s, mask,
    )  # fmt: skip
    grad_x, grad_bias, grad_a, grad_b = (g if wanted else None for g, wanted in zip(grads, needs, strict=True))
    if grad_bias is not None:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_x, *(None,) * 9, grad_bias, grad_a, grad_b, None, None, None


def _autocast(dtype, x, *rest):
    return (x.to(dtype) if autocasts(x) else x, *rest), {}


_backward_op = register_op(
    f"linear_4bit_backward(Tensor grad_output, Tensor x, {flat_schema}, Tensor? lora_a, Tensor? lora_b, {LORA_SCHEMA}, "
    "bool[4] output_mask, Tensor? s=None, Tensor? mask=None) -> (Tensor grad_x, Tensor grad_bias, Tensor grad_lora_a, "
    "Tensor grad_lora_b)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
    no_gradient="second derivatives of linear_4bit are not implemented; detach what should not be differentiated twice",
)
_ARGUMENTS = f"(Tensor x, {flat_schema}, Tensor? bias, Tensor? lora_a, Tensor? lora_b, {LORA_SCHEMA})"
_op_with_s = register_op(
    f"linear_4bit_with_s{_ARGUMENTS} -> (Tensor y, Tensor s, Tensor mask)",
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)
_op = register_op(
    f"linear_4bit{_ARGUMENTS} -> Tensor",
    cpu=lambda *args: _forward_cpu(*args)[0],
    cuda=lambda *args: _forward_cuda(*args, keep_s=False)[0],
    fake=lambda *args: _forward_fake(*args)[0],
    gradient_by=_op_with_s,
    autocast=_autocast,
)

register_token_vmap(_op)
register_token_vmap(_op_with_s)
register_vmap(_backward_op)


def linear_4bit(
    x: torch.Tensor,
    q: QuantizedTensor,
    bias: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x·Wᵀ + b + scaling · drop(x)·Aᵀ·Bᵀ with W = dequantize_4bit(q): QLoRA's layer in one op.

    x          [..., K] float32, float16 or bfloat16, any strides
    q          QuantizedTensor of shape [N, K] on x's device, NF4 or FP4, plain or double-quantised; read only
    bias       [N] of any of these dtypes, or None
    lora_a, lora_b, scaling, dropout_p, seed   as in linear_lora; without lora_a and lora_b the layer alone

    Returns [..., N] in x's dtype; under autocast x is cast to its dtype, as F.linear's would be. Gradients to x, bias,
    lora_a and lora_b, each in its own dtype; W is frozen. The weight is never dequantised as a whole, forward or
    backward. What is kept for it is as in linear_lora, by linear_4bit_with_s: x only where lora_a requires grad.

    Raises TypeError for other dtypes, ValueError for shapes, devices or probabilities that do not fit.
    Source: Dettmers et al., "QLoRA", arXiv:2305.14314, equations 5 and 6.
    """
    if not isinstance(q, QuantizedTensor):
        raise TypeError(
            f"linear_4bit: q is a {type(q).__name__}, expected a QuantizedTensor (pf.ops.quantize_4bit makes one)"
        )
    return _op(x, *q.flat(), bias, lora_a, lora_b, scaling, dropout_p, draw_seed(x, dropout_p, seed))
