"""linear_lora: a dense linear layer with its low-rank path. Maths: pyfastpeft/reference/lora.py; kernels: csrc/lora.

With S = s·drop(x)·Aᵀ [M, R] the layer is

    y   = x·Wᵀ + b + S·Bᵀ

and for the incoming dy [M, N], where mask is the same dropout (0 or 1/(1-p)):

    dS  = dy·B, dA = s·dSᵀ·drop(x)      [R, K]     since S = s·drop(x)·Aᵀ
    dB  = dyᵀ·S                         [N, R]     S is the forward's, kept: R values a token
    dx  = dy·W + s·(dS·A) ⊙ mask        [M, K]
    dW  = dyᵀ·x,  db = Σ_m dy                      only where they require grad

The base products are torch's own matmul; the low-rank path is added to their results in place (on CUDA they are added to
it), and nothing of the size of x or y is allocated or saved for it: what the backward keeps is x itself, S, the mask (on
the CPU, one bit a value; a GPU draws it again from the seed) and the parameters. Where a gradient is wanted the op that
runs is linear_lora_with_s, which returns S and the mask beside y; they have no gradient of their own.
"""

from __future__ import annotations

import torch

from pyfastpeft.ops import _linear_cuda
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
from pyfastpeft.ops._linear_cpu import add_lora_, draw_mask, kept_mask, lora_backward_


def _check(op, x, weight, bias, lora_a, lora_b, dropout_p, seed) -> None:
    """`x` is whatever stands for it: grad_output where the backward reads no x."""
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected [N, K]")
    dtype_code(x.dtype, op, "x")
    if weight.dtype != x.dtype:
        raise TypeError(f"{op}: weight is {weight.dtype} and x is {x.dtype}; convert one with .to(dtype)")
    if weight.device != x.device:
        raise ValueError(f"{op}: weight is on {weight.device}, x is on {x.device}; move one with .to(device)")
    check_operands(op, x.device, *weight.shape, bias, lora_a, lora_b, dropout_p, seed)


def _check_forward(x, weight, bias, lora_a, lora_b, dropout_p, seed) -> None:
    _check("linear_lora", x, weight, bias, lora_a, lora_b, dropout_p, seed)
    check_x("linear_lora", x, *weight.shape)


def _forward_cpu(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed):
    _check_forward(x, weight, bias, lora_a, lora_b, dropout_p, seed)
    rows = as_rows(x)
    y = torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    mask = draw_mask(*rows.shape, dropout_p, seed)
    return shaped(x, y, add_lora_(y, rows, lora_a, lora_b, scaling, dropout_p, mask), mask)


def _forward_cuda(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed):
    _check_forward(x, weight, bias, lora_a, lora_b, dropout_p, seed)
    rows = as_rows(x)
    y, s = _linear_cuda.lora_forward(rows, bias, lora_a, lora_b, scaling, dropout_p, seed)
    return shaped(x, y.addmm_(rows, weight.t()), s)


def _forward_fake(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed):
    _check_forward(x, weight, bias, lora_a, lora_b, dropout_p, seed)
    s = x.new_empty((*x.shape[:-1], lora_a.shape[0]), dtype=torch.float32)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), s, empty_mask(x, dropout_p)


def _check_backward(grad_output, x, s, weight, lora_a, lora_b, dropout_p, seed, output_mask) -> None:
    op = "linear_lora_backward"
    _check(op, grad_output, weight, None, lora_a, lora_b, dropout_p, seed)
    check_grad(op, grad_output, x, *weight.shape, output_mask[1] or output_mask[3] or (output_mask[4] and s is None))
    if s is not None and output_mask[4]:
        check_s(op, grad_output, s, lora_a)


def _backward_with(low_rank, grad_output, x, s, weight, lora_a, lora_b, dropout_p, seed, output_mask):
    """low_rank(grad, rows, s, need_x, need_a, need_b) gives grad_x whole, and the gradients of A and B."""
    _check_backward(grad_output, x, s, weight, lora_a, lora_b, dropout_p, seed, output_mask)
    need_x, need_w, need_bias, need_a, need_b = output_mask
    grad, empty = as_rows(grad_output), grad_output.new_empty
    rows = as_rows(x) if need_w or need_a or (need_b and s is None) else None
    s = as_rows(s) if need_b and s is not None else None
    grad_x, grad_a, grad_b = low_rank(grad, rows, s, need_x, need_a, need_b)
    return (
        grad_x.view(*grad_output.shape[:-1], weight.shape[1]) if need_x else empty(0),
        torch.mm(grad.t(), rows) if need_w else empty(0),
        grad.sum(0, dtype=torch.float32) if need_bias else empty(0, dtype=torch.float32),
        grad_a if need_a else lora_a.new_empty(0),
        grad_b if need_b else lora_b.new_empty(0),
    )


def _backward_cpu(grad_output, x, weight, lora_a, lora_b, scaling, dropout_p, seed, output_mask, s=None, mask=None):
    def low_rank(grad, rows, s, need_x, *needs):
        grad_x = torch.mm(grad, weight) if need_x else None
        check_mask("linear_lora_backward", grad_output, mask, weight.shape[1], dropout_p)
        bits = kept_mask(mask, grad.shape[0], weight.shape[1], dropout_p, seed)
        return grad_x, *lora_backward_(grad_x, grad, rows, s, lora_a, lora_b, scaling, dropout_p, bits, *needs)

    return _backward_with(low_rank, grad_output, x, s, weight, lora_a, lora_b, dropout_p, seed, output_mask)


def _backward_cuda(grad_output, x, weight, lora_a, lora_b, scaling, dropout_p, seed, output_mask, s=None, mask=None):
    def low_rank(grad, rows, s, *needs):
        grad_x, *grads = _linear_cuda.lora_backward(grad, rows, s, lora_a, lora_b, scaling, dropout_p, seed, *needs)
        return None if grad_x is None else grad_x.addmm_(grad, weight), *grads

    return _backward_with(low_rank, grad_output, x, s, weight, lora_a, lora_b, dropout_p, seed, output_mask)


def _backward_fake(grad_output, x, weight, lora_a, lora_b, scaling, dropout_p, seed, output_mask, s=None, mask=None):
    _check_backward(grad_output, x, s, weight, lora_a, lora_b, dropout_p, seed, output_mask)
    need_x, need_w, need_bias, need_a, need_b = output_mask
    return (
        grad_output.new_empty((*grad_output.shape[:-1], weight.shape[1]) if need_x else (0,)),
        grad_output.new_empty(weight.shape if need_w else (0,)),
        grad_output.new_empty(weight.shape[:1] if need_bias else (0,), dtype=torch.float32),
        lora_a.new_empty(lora_a.shape if need_a else (0,)),
        lora_b.new_empty(lora_b.shape if need_b else (0,)),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, lora_a, lora_b, ctx.scaling, ctx.dropout_p, seed = inputs
    _, s, mask = output
    ctx.mark_non_differentiable(s, mask)
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if bias is None else bias.dtype
    need = ctx.needs_input_grad
    ctx.save_for_backward(
        x if need[1] or need[3] else None,
        s if need[4] else None,
        mask if ctx.dropout_p > 0 and (need[0] or need[3]) else None,
        weight, lora_a, lora_b, seed,
    )  # fmt: skip


def _backward(ctx, grad_output, *_):
    if grad_output is None:  # nothing depends on y
        return (None,) * 8
    x, s, mask, weight, lora_a, lora_b, seed = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    x = grad_output if x is None else x  # not read then
    grads = _backward_op(grad_output, x, weight, lora_a, lora_b, ctx.scaling, ctx.dropout_p, seed, needs, s, mask)
    grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
    if needs[2]:
        grads[2] = grads[2].to(ctx.bias_dtype)
    return *grads, None, None, None


def _autocast(dtype, x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed):
    if autocasts(x) and autocasts(weight):
        x, weight = x.to(dtype), weight.to(dtype)
    return (x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed), {}


_backward_op = register_op(
    f"linear_lora_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, {LORA_SCHEMA}, "
    "bool[5] output_mask, Tensor? s=None, Tensor? mask=None) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, "
    "Tensor grad_lora_a, Tensor grad_lora_b)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
    no_gradient="second derivatives of linear_lora are not implemented; detach what should not be differentiated twice",
)
_ARGUMENTS = f"(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, {LORA_SCHEMA})"
_op_with_s = register_op(
    f"linear_lora_with_s{_ARGUMENTS} -> (Tensor y, Tensor s, Tensor mask)",
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)
_op = register_op(
    f"linear_lora{_ARGUMENTS} -> Tensor",
    cpu=lambda *args: _forward_cpu(*args)[0],
    cuda=lambda *args: _forward_cuda(*args)[0],
    fake=lambda *args: _forward_fake(*args)[0],
    gradient_by=_op_with_s,
    autocast=_autocast,
)


register_token_vmap(_op)
register_token_vmap(_op_with_s)
register_vmap(_backward_op)


def linear_lora(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x·Wᵀ + b + scaling · drop(x)·Aᵀ·Bᵀ: a dense linear layer and its LoRA in one op.

    x          [..., K] float32, float16 or bfloat16, any strides
    weight     [N, K] of x's dtype, any strides;  bias [N] of any of these dtypes, or None
    lora_a     [R, K] and lora_b [N, R], any of these dtypes; their products are taken and summed in fp32. On a GPU's tensor
               cores (16-bit x whose rows are whole 16 bytes) they are first rounded to x's dtype, as autocast would
    scaling    α/R, or α/√R (rsLoRA)
    dropout_p  probability from 0 to 1 that a value of x is zeroed on its way into A, the others times 1/(1-p)
    seed       int64 [1] on x's device, the key of the mask; None: drawn from torch's generator where dropout_p > 0

    Returns [..., N] in x's dtype; under autocast x and W are cast to its dtype, as F.linear's would be, and A and B are
    not. Gradients to x, weight, bias, lora_a and lora_b, each in its own dtype; ops/lora.py derives them. The same bits
    come out of the low-rank path for any number of threads.

    Raises TypeError for other dtypes, ValueError for shapes, devices or probabilities that do not fit.
    Source: Hu et al., "LoRA", arXiv:2106.09685, section 4.1; dropout as in its reference code, on the LoRA path alone.
    """
    return _op(x, weight, bias, lora_a, lora_b, scaling, dropout_p, draw_seed(x, dropout_p, seed))
