"""linear_lora: a dense linear layer with its low-rank path, and what linear_4bit shares with it.

The maths is pyfastpeft/reference/lora.py, the kernels csrc/lora/. With S = drop(x)·Aᵀ [M, R]:

    y   = x·Wᵀ + b + s·S·Bᵀ

and for dy [M, N] (⊙ mask: the same dropout, recomputed from the seed; it is stored nowhere)

    dS  = s·dy·B                [M, R]
    dx  = dy·W + (dS·A) ⊙ mask  [M, K]
    dA  = dSᵀ·drop(x)           [R, K]
    dB  = s·dyᵀ·S               [N, R]       S is recomputed from x, which is read for dA anyway
    db  = Σ_m dy,   dW = dyᵀ·x

The base product is torch's own matmul; the low-rank path is added to its result in place, in fp32, and nothing of the
size of x or y is allocated for it.
"""

from __future__ import annotations

import torch

from pyfastpeft._native import _C
from pyfastpeft.ops._library import dtype_code, register_op

LORA_SCHEMA = "float scaling, float dropout_p, Tensor? seed"


# ---- the three products of csrc/lora/lora.h on CPU tensors ---------------------------------------------------------


def _seed(dropout_p: float, seed: torch.Tensor | None) -> int:
    return int(seed.item()) & 0xFFFFFFFFFFFFFFFF if dropout_p > 0 else 0


def _shrink(x: torch.Tensor, a: torch.Tensor, alpha: float, p: float, seed: int) -> torch.Tensor:
    """alpha · drop(x [M, D]) · a [R, D]ᵀ, fp32 [M, R]."""
    (M, D), R = x.shape, a.shape[0]
    s = torch.empty(M, R)
    _C.lora_shrink_cpu(
        x.data_ptr(), x.numel(), dtype_code(x.dtype, "linear_lora", "x"), M, D, a.data_ptr(), a.numel(), R, alpha, p, seed,
        s.data_ptr(), s.numel(),
    )  # fmt: skip
    return s


def _expand_(y: torch.Tensor, s: torch.Tensor, c: torch.Tensor, p: float, seed: int) -> None:
    """y [M, D] += drop(s [M, R] · c [R, D])."""
    (M, R), D = s.shape, c.shape[1]
    _C.lora_expand_cpu(
        s.data_ptr(), s.numel(), M, R, c.data_ptr(), c.numel(), D, p, seed,
        dtype_code(y.dtype, "linear_lora", "y"), y.data_ptr(), y.numel(),
    )  # fmt: skip


def _accumulate(s: torch.Tensor, x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """s [M, R]ᵀ · drop(x [M, D]), fp32 [R, D]."""
    (M, R), D = s.shape, x.shape[1]
    g = torch.empty(R, D)
    _C.lora_accumulate_cpu(
        s.data_ptr(), s.numel(), M, R, x.data_ptr(), x.numel(), dtype_code(x.dtype, "linear_lora", "x"), D, p, seed,
        g.data_ptr(), g.numel(),
    )  # fmt: skip
    return g


def _f32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def add_lora_(y, x, lora_a, lora_b, scaling, dropout_p, seed) -> None:
    """y [M, N] += s·drop(x [M, K])·Aᵀ·Bᵀ; x, y contiguous."""
    key = _seed(dropout_p, seed)
    s = _shrink(x, _f32(lora_a), scaling, dropout_p, key)
    _expand_(y, s, _f32(lora_b.T), 0.0, 0)


def add_lora_backward_(grad_x, grad, x, lora_a, lora_b, scaling, dropout_p, seed, need_a, need_b):
    """Adds the low-rank part to grad_x (None: not wanted) and returns (grad_lora_a, grad_lora_b), each or None."""
    key = _seed(dropout_p, seed)
    a = _f32(lora_a)
    ds = _shrink(grad, _f32(lora_b.T), scaling, 0.0, 0) if grad_x is not None or need_a else None
    if grad_x is not None:
        _expand_(grad_x, ds, a, dropout_p, key)
    grad_a = _accumulate(ds, x, dropout_p, key).to(lora_a.dtype) if need_a else None
    grad_b = None
    if need_b:
        s = _shrink(x, a, scaling, dropout_p, key)
        grad_b = _accumulate(s, grad, 0.0, 0).T.to(lora_b.dtype).contiguous()
    return grad_a, grad_b


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_linear(op: str, x, N: int, K: int, bias, lora_a, lora_b, dropout_p: float, seed) -> None:
    """What linear_lora and linear_4bit demand of their arguments, for real and fake tensors alike."""
    dtype_code(x.dtype, op, "x")
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected [..., {K}] for a weight [{N}, {K}]")
    if bias is not None:
        dtype_code(bias.dtype, op, "bias")
        if tuple(bias.shape) != (N,):
            raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, expected ({N},) for a weight [{N}, {K}]")
    if (lora_a is None) != (lora_b is None):
        raise ValueError(f"{op}: lora_a and lora_b are given together or not at all")
    if lora_a is not None:
        for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b)):
            dtype_code(tensor.dtype, op, name)
        if lora_a.dim() != 2 or lora_a.shape[1] != K:
            raise ValueError(f"{op}: lora_a has shape {tuple(lora_a.shape)}, expected (R, {K})")
        if lora_b.dim() != 2 or lora_b.shape[0] != N or lora_b.shape[1] != lora_a.shape[0]:
            raise ValueError(
                f"{op}: lora_b has shape {tuple(lora_b.shape)}, expected ({N}, {lora_a.shape[0]}): "
                f"[N, R] for lora_a {tuple(lora_a.shape)}"
            )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}, expected a probability from 0 to 1")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"{op}: seed is {seed.dtype} of shape {tuple(seed.shape)}, expected int64 of shape (1,)")
    if dropout_p > 0 and lora_a is not None and seed is None:
        raise ValueError(f"{op}: dropout_p is {dropout_p} and seed is None; give an int64 tensor of shape (1,)")
    for name, tensor in (("bias", bias), ("lora_a", lora_a), ("lora_b", lora_b), ("seed", seed)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x is on {x.device}; move one with .to(device)")


def draw_seed(x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor | None:
    """The dropout seed of a call: the caller's, or a fresh one from torch's generator (torch.manual_seed governs it)."""
    if seed is not None or dropout_p == 0:
        return seed
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)


# ---- the op -----------------------------------------------------------------------------------------------------------


def _check(x, weight, bias, lora_a, lora_b, dropout_p, seed) -> None:
    if weight.dim() != 2:
        raise ValueError(f"linear_lora: weight has shape {tuple(weight.shape)}, expected (N, K)")
    if weight.dtype != x.dtype:
        raise TypeError(f"linear_lora: weight is {weight.dtype} and x is {x.dtype}; convert one with .to(dtype)")
    if weight.device != x.device:
        raise ValueError(f"linear_lora: weight is on {weight.device}, x is on {x.device}")
    check_linear("linear_lora", x, *weight.shape, bias, lora_a, lora_b, dropout_p, seed)


def _forward_cpu(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed):
    _check(x, weight, bias, lora_a, lora_b, dropout_p, seed)
    N, K = weight.shape
    rows = x.reshape(-1, K).contiguous()
    y = torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    add_lora_(y, rows, lora_a, lora_b, scaling, dropout_p, seed)
    return y.view(*x.shape[:-1], N)


def _forward_fake(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed):
    _check(x, weight, bias, lora_a, lora_b, dropout_p, seed)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward_cpu(grad, x, weight, bias_dtype, lora_a, lora_b, scaling, dropout_p, seed, output_mask):
    N, K = weight.shape
    need_x, need_w, need_bias, need_a, need_b = output_mask
    rows, grad = x.reshape(-1, K).contiguous(), grad.reshape(-1, N).contiguous()
    empty = x.new_empty
    grad_x = torch.mm(grad, weight) if need_x else None
    grad_a, grad_b = add_lora_backward_(
        grad_x, grad, rows, lora_a, lora_b, scaling, dropout_p, seed, need_a, need_b
    )  # fmt: skip
    return (
        grad_x.view(x.shape) if need_x else empty(0),
        torch.mm(grad.T, rows) if need_w else empty(0),
        grad.sum(0, dtype=torch.float32).to(bias_dtype) if need_bias else empty(0, dtype=bias_dtype),
        grad_a if need_a else empty(0, dtype=lora_a.dtype),
        grad_b if need_b else empty(0, dtype=lora_b.dtype),
    )


def _backward_fake(grad, x, weight, bias_dtype, lora_a, lora_b, scaling, dropout_p, seed, output_mask):
    shapes = (x.shape, weight.shape, weight.shape[:1], lora_a.shape, lora_b.shape)
    dtypes = (x.dtype, weight.dtype, bias_dtype, lora_a.dtype, lora_b.dtype)
    return tuple(
        x.new_empty(shape if need else (0,), dtype=dtype)
        for shape, dtype, need in zip(shapes, dtypes, output_mask, strict=True)
    )


_backward_op = register_op(
    "linear_lora_backward(Tensor grad_output, Tensor x, Tensor weight, ScalarType bias_dtype, Tensor lora_a, "
    f"Tensor lora_b, {LORA_SCHEMA}, bool[5] output_mask) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, "
    "Tensor grad_lora_a, Tensor grad_lora_b)",
    cpu=_backward_cpu,
    fake=_backward_fake,
)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, lora_a, lora_b, ctx.scaling, ctx.dropout_p, seed = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, lora_a, lora_b, seed)


def _backward(ctx, grad):
    x, weight, lora_a, lora_b, seed = ctx.saved_tensors
    mask = [ctx.needs_input_grad[i] for i in range(5)]
    mask[2] = mask[2] and ctx.bias_dtype is not None
    grads = _backward_op(
        grad, x, weight, ctx.bias_dtype or x.dtype, lora_a, lora_b, ctx.scaling, ctx.dropout_p, seed, mask
    )
    return *(g if need else None for g, need in zip(grads, mask, strict=True)), None, None, None


def _autocast(dtype, x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed):
    return (x.to(dtype), weight.to(dtype), bias, lora_a, lora_b, scaling, dropout_p, seed), {}


_op = register_op(
    f"linear_lora(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, {LORA_SCHEMA}) -> Tensor",
    cpu=_forward_cpu,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


def linear_lora(x, weight, bias, lora_a, lora_b, scaling=1.0, dropout_p=0.0, seed=None):
    """y = x·Wᵀ + b + scaling · drop(x)·Aᵀ·Bᵀ   (LoRA, arXiv:2106.09685, eq. 3).

    x          [..., K] float32, float16 or bfloat16, any strides
    weight     [N, K] of x's dtype, dense;  bias [N] any float dtype, or None
    lora_a     [R, K], lora_b [N, R]: float32 or any float dtype; the path is computed in fp32 from x's values
    scaling    α / R (or α / √R)
    dropout_p  probability that a value of x is zeroed on the way into A; 0 outside training
    seed       int64 [1] on x's device; None: drawn from torch's generator when dropout_p > 0

    Returns [..., N] of x's dtype (under autocast: of its dtype, as F.linear). Gradients to x, weight, bias, lora_a and
    lora_b in their own dtypes. Raises ValueError / TypeError naming the argument that does not fit.
    """
    return _op(x, weight, bias, lora_a, lora_b, scaling, dropout_p, draw_seed(x, dropout_p, seed))
