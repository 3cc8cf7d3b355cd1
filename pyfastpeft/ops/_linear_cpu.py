"""The low-rank path of linear_lora and linear_4bit on the CPU, from the three products of csrc/lora/lora.h."""

from __future__ import annotations

import torch

from pyfastpeft._native import _C
from pyfastpeft.ops._library import dtype_code


def _key(dropout_p: float, seed: torch.Tensor | None) -> int:
    return seed.item() & 0xFFFFFFFFFFFFFFFF if dropout_p > 0 else 0


def _f32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32).contiguous()


def _shrink(x: torch.Tensor, a: torch.Tensor, alpha: float, p: float, key: int) -> torch.Tensor:
    """alpha · drop(x [M, D]) · a [R, D]ᵀ, fp32 [M, R]."""
    (M, D), R = x.shape, a.shape[0]
    s = torch.empty(M, R, dtype=torch.float32)
    _C.lora_shrink_cpu(
        x.data_ptr(), x.numel(), dtype_code(x.dtype, "linear_lora", "x"), M, D, a.data_ptr(), a.numel(), R, alpha, p, key,
        s.data_ptr(), s.numel(),
    )  # fmt: skip
    return s


def _expand_(y: torch.Tensor, s: torch.Tensor, c: torch.Tensor, p: float, key: int) -> None:
    """y [M, D] += drop(s [M, R] · c [R, D])."""
    (M, R), D = s.shape, c.shape[1]
    _C.lora_expand_cpu(
        s.data_ptr(), s.numel(), M, R, c.data_ptr(), c.numel(), D, p, key,
        dtype_code(y.dtype, "linear_lora", "y"), y.data_ptr(), y.numel(),
    )  # fmt: skip


def _accumulate(s: torch.Tensor, x: torch.Tensor, p: float, key: int) -> torch.Tensor:
    """s [M, R]ᵀ · drop(x [M, D]), fp32 [R, D]."""
    (M, R), D = s.shape, x.shape[1]
    g = torch.empty(R, D, dtype=torch.float32)
    _C.lora_accumulate_cpu(
        s.data_ptr(), s.numel(), M, R, x.data_ptr(), x.numel(), dtype_code(x.dtype, "linear_lora", "x"), D, p, key,
        g.data_ptr(), g.numel(),
    )  # fmt: skip
    return g


def shrink(x, lora_a, scaling, dropout_p, seed) -> torch.Tensor:
    """S = scaling · drop(x [M, K]) · Aᵀ, fp32 [M, R]; x contiguous."""
    return _shrink(x, _f32(lora_a), scaling, dropout_p, _key(dropout_p, seed))


def add_lora_(y, x, lora_a, lora_b, scaling, dropout_p, seed) -> torch.Tensor:
    """y [M, N] += S · Bᵀ; returns S = scaling · drop(x [M, K]) · Aᵀ, fp32 [M, R]. x and y contiguous."""
    s = shrink(x, lora_a, scaling, dropout_p, seed)
    _expand_(y, s, _f32(lora_b.t()), 0.0, 0)
    return s


def lora_backward_(grad_x, grad, x, s, lora_a, lora_b, scaling, dropout_p, seed, need_a, need_b, ds=None):
    """Adds the low-rank part to grad_x (None: not wanted); returns (grad_lora_a, grad_lora_b), None where not wanted.

    grad [M, N], x [M, K] and the forward's s [M, R] are contiguous; x is read only for A's gradient, s only for B's.
    ds: scaling · grad · B, where known.
    """
    key = _key(dropout_p, seed)
    a = _f32(lora_a)
    grad_a = grad_b = None
    if grad_x is not None or need_a:
        ds = _shrink(grad, _f32(lora_b.t()), scaling, 0.0, 0) if ds is None else ds
        if grad_x is not None:
            _expand_(grad_x, ds, a, dropout_p, key)
        if need_a:
            grad_a = _accumulate(ds, x, dropout_p, key).to(lora_a.dtype)
    if need_b:
        grad_b = _accumulate(s, grad, 0.0, 0).t().to(lora_b.dtype).contiguous()
    return grad_a, grad_b
