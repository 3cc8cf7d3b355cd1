"""The low-rank path of linear_lora and linear_4bit on the CPU, from the three products of csrc/lora/lora.h.

Small factors are read in whatever order they lie in; fp32 ones are not copied. The mask of a dropout is drawn once, in the
forward, as one bit a value: int32 words [M, ceil(K / 32)], or none of them where nothing is dropped.
"""

from __future__ import annotations

import torch

from pyfastpeft._native import _C
from pyfastpeft.ops._library import dtype_code


def _factor(tensor: torch.Tensor) -> torch.Tensor:
    """fp32 of any strides; the tensor must outlive the call that reads it."""
    return tensor.to(torch.float32)


def _bits(mask: torch.Tensor | None, p: float) -> tuple[int, int, float]:
    return (0, 0, 0.0) if mask is None else (mask.data_ptr(), mask.numel(), p)


def mask_words(K: int) -> int:
    """Words of a row of a mask."""
    return (K + 31) // 32


def draw_mask(rows: int, K: int, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor | None:
    """The bits of a dropout of [rows, K]; None without dropout."""
    if dropout_p == 0:
        return None
    mask = torch.empty(rows, mask_words(K), dtype=torch.int32)
    _C.lora_mask_cpu(0, rows, K, dropout_p, seed.item() & 0xFFFFFFFFFFFFFFFF, mask.data_ptr(), mask.numel())
    return mask


def kept_mask(mask: torch.Tensor | None, rows: int, K: int, dropout_p: float, seed) -> torch.Tensor | None:
    """The forward's mask for a backward, drawn again where the caller has not kept it; None without dropout."""
    if mask is None or dropout_p == 0:
        return draw_mask(rows, K, dropout_p, seed)
    return mask.contiguous()


def _shrink(x: torch.Tensor, a: torch.Tensor, alpha: float, mask=None, p: float = 0.0) -> torch.Tensor:
    """alpha · drop(x [M, D]) · a [R, D]ᵀ, fp32 [M, R]."""
    (M, D), R, a = x.shape, a.shape[0], _factor(a)
    s = torch.empty(M, R, dtype=torch.float32)
    _C.lora_shrink_cpu(
        x.data_ptr(), x.numel(), dtype_code(x.dtype, "linear_lora", "x"), M, D, a.data_ptr(), a.numel(), *a.stride(), R,
        alpha, *_bits(mask, p), s.data_ptr(), s.numel(),
    )  # fmt: skip
    return s


def expand_(y: torch.Tensor, s: torch.Tensor, c: torch.Tensor, mask=None, p: float = 0.0) -> None:
    """y [M, D] += drop(s [M, R] · c [R, D])."""
    (M, R), D, c = s.shape, c.shape[1], _factor(c)
    _C.lora_expand_cpu(
        s.data_ptr(), s.numel(), M, R, c.data_ptr(), c.numel(), *c.stride(), D, *_bits(mask, p),
        dtype_code(y.dtype, "linear_lora", "y"), y.data_ptr(), y.numel(),
    )  # fmt: skip


def _accumulate(s: torch.Tensor, x: torch.Tensor, out: torch.Tensor, mask=None, p: float = 0.0) -> None:
    """out [R, D] = s [M, R]ᵀ · drop(x [M, D]); fp32 and dense, of any strides."""
    (M, R), D = s.shape, x.shape[1]
    _C.lora_accumulate_cpu(
        s.data_ptr(), s.numel(), M, R, x.data_ptr(), x.numel(), dtype_code(x.dtype, "linear_lora", "x"), D,
        *_bits(mask, p), out.data_ptr(), out.numel(), *out.stride(),
    )  # fmt: skip


def shrink(x, lora_a, scaling, dropout_p, mask) -> torch.Tensor:
    """S = scaling · drop(x [M, K]) · Aᵀ, fp32 [M, R]; x contiguous."""
    return _shrink(x, lora_a, scaling, mask, dropout_p)


def add_lora_(y, x, lora_a, lora_b, scaling, dropout_p, mask) -> torch.Tensor:
    """y [M, N] += S · Bᵀ; returns S = scaling · drop(x [M, K]) · Aᵀ, fp32 [M, R]. x and y contiguous."""
    s = shrink(x, lora_a, scaling, dropout_p, mask)
    expand_(y, s, lora_b.t())
    return s


def lora_backward_(grad_x, grad, x, s, lora_a, lora_b, scaling, dropout_p, mask, need_a, need_b, ds=None):
    """Adds the low-rank part to grad_x (None: not wanted); returns (grad_lora_a, grad_lora_b), None where not wanted.

    grad [M, N], x [M, K] and the forward's s [M, R] are contiguous; x is read only for A's gradient, s only for B's. Where
    s is None it is computed again from x.
    ds: scaling · grad · B, where known.
    """
    grad_a = grad_b = None
    if grad_x is not None or need_a:
        ds = _shrink(grad, lora_b.t(), scaling) if ds is None else ds
        if grad_x is not None:
            expand_(grad_x, ds, lora_a, mask, dropout_p)
        if need_a:
            grad_a = torch.empty(lora_a.shape, dtype=torch.float32)
            _accumulate(ds, x, grad_a, mask, dropout_p)
            grad_a = grad_a.to(lora_a.dtype)
    if need_b:
        s = shrink(x, lora_a, scaling, dropout_p, mask) if s is None else s
        grad_b = torch.empty(lora_b.shape, dtype=torch.float32)
        _accumulate(s, grad, grad_b.t())
        grad_b = grad_b.to(lora_b.dtype)
    return grad_a, grad_b
