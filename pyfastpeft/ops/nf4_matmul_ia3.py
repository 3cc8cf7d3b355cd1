"""linear_4bit_ia3: a linear layer in 4 bits and the (IA)³ scale of its outputs, in one op.

With u = x·Wᵀ + b, y = u · s, and for the incoming dy:

    du = dy · s,  ds = Σ_m dy · u      [N]     u is computed again from x, so that it need not be kept: [M, N]
    dx = du·W,    db = Σ_m du
"""

from __future__ import annotations

import torch

from pyfastpeft.ops import nf4_matmul_cuda
from pyfastpeft.ops._library import dtype_code, register_op, register_vmap
from pyfastpeft.ops._linear import as_rows
from pyfastpeft.ops.nf4_matmul import _autocast, _check_forward
from pyfastpeft.quantized_tensor import QuantizedTensor, flat_schema

_NO_LORA = (None, None, 1.0, 0.0, None)


def _check(x, flat, shape, bias, scale) -> tuple[int, int]:
    op = "linear_4bit_ia3"
    N, K = _check_forward(op, x, flat, shape, bias, *_NO_LORA[:2], *_NO_LORA[3:])
    dtype_code(scale.dtype, op, "scale")
    if scale.dim() != 1 or scale.shape[0] != N:
        raise ValueError(f"{op}: scale has shape {tuple(scale.shape)}, expected ({N},) for a weight [{N}, {K}]")
    if scale.device != x.device:
        raise ValueError(f"{op}: scale is on {scale.device}, x is on {x.device}; move one with .to(device)")
    return N, K


def _forward_cpu(
    x, packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype, bias, scale
):
    flat = (packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type)
    _check(x, flat, shape, bias, scale)
    y = torch.ops.pyfastpeft.linear_4bit.default(x, *flat, shape, dtype, bias, *_NO_LORA)
    return y.mul_(scale)


def _forward_cuda(
    x, packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype, bias, scale
):
    flat = (packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type)
    N, K = _check(x, flat, shape, bias, scale)
    y, _ = nf4_matmul_cuda.forward(nf4_matmul_cuda.Weight(*flat, N, K), as_rows(x), bias, *_NO_LORA, scale)
    return y.view(*x.shape[:-1], N)


def _forward_fake(
    x, packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype, bias, scale
):
    flat = (packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type)
    N, _ = _check(x, flat, shape, bias, scale)
    return x.new_empty((*x.shape[:-1], N))


def _setup_context(ctx, inputs, output) -> None:
    x, *flat = inputs[:10]
    bias, scale = inputs[10:]
    ctx.rest = flat[5:]
    ctx.bias_dtype = None if bias is None else bias.dtype
    needs_u = ctx.needs_input_grad[11]
    ctx.save_for_backward(x if needs_u else None, *flat[:5], bias if needs_u else None, scale)


def _backward(ctx, grad_output):
    x, *tensors, bias, scale = ctx.saved_tensors
    need_x, need_bias, need_scale = (ctx.needs_input_grad[i] for i in (0, 10, 11))
    flat, ops = (*tensors, *ctx.rest), torch.ops.pyfastpeft
    u = ops.linear_4bit.default(x, *flat, bias, *_NO_LORA) if need_scale else grad_output
    same = scale if scale.dtype == u.dtype else scale.float()
    grad_u, grad_scale = ops.ia3_scale_backward.default(grad_output, u, same, [need_x or need_bias, need_scale])
    grad_x = grad_bias = None
    if need_x or need_bias:
        mask = [need_x, need_bias, False, False]
        grad_x, grad_bias, _, _ = ops.linear_4bit_backward.default(grad_u, grad_u, *flat, *_NO_LORA, mask)
    return (
        grad_x if need_x else None,
        *(None,) * 9,
        grad_bias.to(ctx.bias_dtype) if need_bias else None,
        grad_scale.to(scale.dtype) if need_scale else None,
    )


_op = register_op(
    f"linear_4bit_ia3(Tensor x, {flat_schema}, Tensor? bias, Tensor scale) -> Tensor",
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)
register_vmap(_op)


def linear_4bit_ia3(
    x: torch.Tensor, q: QuantizedTensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y[..., n] = (x·Wᵀ + b)[..., n] · scale[n] with W = dequantize_4bit(q): a quantised layer under (IA)³.

    x      [..., K] float32, float16 or bfloat16, any strides
    q      QuantizedTensor of shape [N, K] on x's device; read only
    scale  [N] and bias [N] (or None), of any of these dtypes

    Returns [..., N] in x's dtype. On CUDA, up to 64 rows of x, one launch and one rounding; else the scale is multiplied
    into linear_4bit's result. Gradients to x, bias and scale; for the last, x·Wᵀ is computed once more in the backward
    instead of being kept.

    Raises TypeError for other dtypes, ValueError for shapes or devices that do not fit.
    Source: Liu et al., arXiv:2205.05638, section 3.3.
    """
    if not isinstance(q, QuantizedTensor):
        raise TypeError(
            f"linear_4bit_ia3: q is a {type(q).__name__}, expected a QuantizedTensor (pf.ops.quantize_4bit makes one)"
        )
    return _op(x, *q.flat(), bias, scale)
