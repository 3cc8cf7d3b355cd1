"""linear_4bit: a linear layer whose weight stays in 4 bits, with its low-rank path.

    y = x·Wᵀ + b + s·drop(x)·Aᵀ·Bᵀ,   W [N, K] the dequantised weight, of which only a tile exists at a time

The maths is pyfastpeft/reference/nf4.py and reference/lora.py, the kernels csrc/nf4/nf4_matmul*. Few tokens: dot products
straight from the packed bytes. Many: W is walked in tiles that stay in the cache, each decoded once and multiplied by
torch's matmul. For dy [M, N] the gradients are linear_lora's, with dx = dy·W over tiles of W's columns, so that every
element of dx is one complete sum over N and no partial result is ever rounded. W itself has no gradient: it is codes.
"""

from __future__ import annotations

import torch

from pyfastpeft._native import _C
from pyfastpeft.ops._library import dtype_code, register_op
from pyfastpeft.ops.lora import LORA_SCHEMA, add_lora_, add_lora_backward_, check_linear, draw_seed
from pyfastpeft.quantized_tensor import QuantizedTensor, flat_schema

_OP = "linear_4bit"
# Up to this many tokens the product is bound by reading W, and decoding it again for each call costs less than tiles.
MATVEC_MAX_TOKENS = 8
# Bytes of a decoded tile: it is written, then read by the matmul, so it should stay in the last-level cache.
TILE_BYTES = 4 << 20


def _numel(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


def _ptr(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Weight:
    """The flat arguments of a quantised weight, contiguous and kept alive, with their checked C++ view."""

    def __init__(self, packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype) -> None:
        self.N, self.K = shape
        self.tensors = [None if t is None else t.contiguous() for t in (packed, absmax, nested_absmax, nested_map)]
        self.offset = offset
        flat = [value for t in self.tensors for value in (_ptr(t), _numel(t))]
        self.view = _C.PackedWeight(*flat, _ptr(offset), self.N, self.K, blocksize, quant_type)
        self.blocksize = blocksize

    def tile(self, row: int, rows: int, col: int, cols: int, buffer: torch.Tensor) -> torch.Tensor:
        """W[row : row + rows, col : col + cols] in the buffer's dtype, decoded into the front of the buffer."""
        out = buffer[: rows * cols].view(rows, cols)
        code = dtype_code(out.dtype, _OP, "x")
        _C.nf4_dequantize_tile_cpu(self.view, row, rows, col, cols, code, out.data_ptr(), out.numel())
        return out


def _check_weight(packed, absmax, nested_absmax, nested_map, offset, shape, device) -> None:
    if len(shape) != 2:
        raise ValueError(f"{_OP}: the quantised weight has shape {tuple(shape)}, expected [N, K]")
    nested = offset is not None
    if (nested_absmax is not None) != nested or (nested_map is not None) != nested:
        raise ValueError(f"{_OP}: nested_absmax, nested_map and offset are given together or not at all")
    for name, tensor, dtype in (
        ("packed", packed, torch.uint8),
        ("absmax", absmax, torch.uint8 if nested else torch.float32),
        ("nested_absmax", nested_absmax, torch.float32),
        ("nested_map", nested_map, torch.float32),
        ("offset", offset, torch.float32),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{_OP}: {name} has dtype {tensor.dtype}, expected {dtype}")
        if tensor.device != device:
            raise ValueError(f"{_OP}: {name} is on {tensor.device}, x is on {device}; move one with .to(device)")
    if nested and offset.numel() != 1:
        raise ValueError(f"{_OP}: offset has {offset.numel()} values, expected 1")


def _split(args):
    """(x, flat weight, bias, lora_a, lora_b, scaling, dropout_p, seed) from the op's arguments."""
    return args[0], args[1:10], *args[10:]


def _check(args) -> None:
    x, flat, bias, lora_a, lora_b, _, dropout_p, seed = _split(args)
    _check_weight(*flat[:5], flat[7], x.device)
    check_linear(_OP, x, *flat[7], bias, lora_a, lora_b, dropout_p, seed)


def _matmul(x: torch.Tensor, weight: _Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] · Wᵀ + bias, x contiguous."""
    M, N, K = x.shape[0], weight.N, weight.K
    y = x.new_empty(M, N)
    if M <= MATVEC_MAX_TOKENS:
        wide = None if bias is None else bias.float().contiguous()
        code = dtype_code(x.dtype, _OP, "x")
        _C.nf4_matvec_cpu(
            weight.view, x.data_ptr(), x.numel(), M, _ptr(wide), _numel(wide), code, y.data_ptr(), y.numel()
        )
        return y
    rows = min(N, max(1, TILE_BYTES // max(1, K * x.element_size())))
    buffer = x.new_empty(rows * K)
    bias = None if bias is None else bias.to(x.dtype)
    for row in range(0, N, rows):
        count = min(rows, N - row)
        tile = weight.tile(row, count, 0, K, buffer)
        part = bias[row : row + count] if bias is not None else None
        y[:, row : row + count] = torch.nn.functional.linear(x, tile, part)
    return y


def _matmul_transposed(grad: torch.Tensor, weight: _Weight) -> torch.Tensor:
    """grad [M, N] · W, over tiles of W's columns: whole blocks of columns where blocks end with the rows."""
    M, N, K = grad.shape[0], weight.N, weight.K
    cols = max(1, TILE_BYTES // max(1, N * grad.element_size()))
    cols = min(K, max(weight.blocksize, cols // weight.blocksize * weight.blocksize))
    buffer = grad.new_empty(N * cols)
    out = grad.new_empty(M, K)
    for col in range(0, K, max(1, cols)):
        count = min(cols, K - col)
        out[:, col : col + count] = grad @ weight.tile(0, N, col, count, buffer)
    return out


def _forward_cpu(*args):
    _check(args)
    x, flat, bias, lora_a, lora_b, scaling, dropout_p, seed = _split(args)
    weight = _Weight(*flat)
    rows = x.reshape(-1, weight.K).contiguous() if x.numel() else x.new_empty(x.shape[:-1].numel(), weight.K)
    y = _matmul(rows, weight, bias)
    if lora_a is not None:
        add_lora_(y, rows, lora_a, lora_b, scaling, dropout_p, seed)
    return y.view(*x.shape[:-1], weight.N)


def _forward_fake(*args):
    _check(args)
    x, flat, *_ = _split(args)
    return x.new_empty((*x.shape[:-1], flat[7][0]))


def _backward_cpu(grad, x, *args):
    flat, (bias_dtype, lora_a, lora_b, scaling, dropout_p, seed, output_mask) = args[:9], args[9:]
    need_x, need_bias, need_a, need_b = output_mask
    weight = _Weight(*flat)
    M = x.shape[:-1].numel()
    rows, grad = x.reshape(M, weight.K).contiguous(), grad.reshape(M, weight.N).contiguous()
    empty = x.new_empty
    grad_x = _matmul_transposed(grad, weight) if need_x else None
    grad_a = grad_b = None
    if lora_a is not None:
        grad_a, grad_b = add_lora_backward_(
            grad_x, grad, rows, lora_a, lora_b, scaling, dropout_p, seed, need_a, need_b
        )  # fmt: skip
    return (
        grad_x.view(x.shape) if need_x else empty(0),
        grad.sum(0, dtype=torch.float32).to(bias_dtype) if need_bias else empty(0, dtype=bias_dtype),
        grad_a if need_a else empty(0, dtype=x.dtype if lora_a is None else lora_a.dtype),
        grad_b if need_b else empty(0, dtype=x.dtype if lora_b is None else lora_b.dtype),
    )


def _backward_fake(grad, x, *args):
    flat, (bias_dtype, lora_a, lora_b, _, _, _, output_mask) = args[:9], args[9:]
    shapes = (x.shape, flat[7][:1], getattr(lora_a, "shape", (0,)), getattr(lora_b, "shape", (0,)))
    dtypes = (x.dtype, bias_dtype, getattr(lora_a, "dtype", x.dtype), getattr(lora_b, "dtype", x.dtype))
    return tuple(
        x.new_empty(shape if need else (0,), dtype=dtype)
        for shape, dtype, need in zip(shapes, dtypes, output_mask, strict=True)
    )


_backward_op = register_op(
    f"linear_4bit_backward(Tensor grad_output, Tensor x, {flat_schema}, ScalarType bias_dtype, Tensor? lora_a, "
    f"Tensor? lora_b, {LORA_SCHEMA}, bool[4] output_mask) -> (Tensor grad_x, Tensor grad_bias, Tensor grad_lora_a, "
    "Tensor grad_lora_b)",
    cpu=_backward_cpu,
    fake=_backward_fake,
)


def _setup_context(ctx, inputs, output) -> None:
    x, flat, bias, lora_a, lora_b, ctx.scaling, ctx.dropout_p, seed = _split(inputs)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.constants = flat[5:]
    ctx.save_for_backward(x, *flat[:5], lora_a, lora_b, seed)


def _backward(ctx, grad):
    x, *tensors, lora_a, lora_b, seed = ctx.saved_tensors
    need = ctx.needs_input_grad
    mask = [need[0], need[10] and ctx.bias_dtype is not None, need[11], need[12]]
    grad_x, *others = (
        g if wanted else None
        for g, wanted in zip(
            _backward_op(
                grad, x, *tensors, *ctx.constants, ctx.bias_dtype or x.dtype, lora_a, lora_b,
                ctx.scaling, ctx.dropout_p, seed, mask,
            ),
            mask,
            strict=True,
        )
    )  # fmt: skip
    return grad_x, *(None,) * 9, *others, None, None, None


def _autocast(dtype, x, *args):
    return (x.to(dtype), *args), {}


_op = register_op(
    f"linear_4bit(Tensor x, {flat_schema}, Tensor? bias, Tensor? lora_a, Tensor? lora_b, {LORA_SCHEMA}) -> Tensor",
    cpu=_forward_cpu,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


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
    """y = x·Wᵀ + b + scaling · drop(x)·Aᵀ·Bᵀ with W in 4 bits   (QLoRA, arXiv:2305.14314, eq. 5).

    x          [..., K] float32, float16 or bfloat16, any strides
    q          QuantizedTensor of shape [N, K]; frozen
    bias       [N] any float dtype, or None
    lora_a     [R, K], lora_b [N, R]: both or neither; float32 or any float dtype, computed in fp32
    scaling, dropout_p, seed   as in linear_lora

    Returns [..., N] of x's dtype (under autocast: of its dtype, as F.linear). Gradients to x, bias, lora_a and lora_b.
    W is rounded to x's dtype for many tokens, and taken in fp32 for up to MATVEC_MAX_TOKENS.
    Raises ValueError / TypeError naming the argument that does not fit.
    """
    seed = draw_seed(x, dropout_p, seed) if lora_a is not None else None
    return _op(x, *q.flat(), bias, lora_a, lora_b, scaling, dropout_p if lora_a is not None else 0.0, seed)
