"""The low-rank path of linear_lora and linear_4bit on CUDA, from the three products of csrc/lora/lora.h.

The path comes first and the base product is added to it by a matmul with beta = 1: then y and dx are written by our
kernel and read and written by the matmul, whose reading hides behind its arithmetic, instead of the other way round, and
one rounding falls on the small term alone. Nothing here waits for the device or allocates anything of the size of x or y
but the results. Small factors are read in whatever order they lie in; fp32 ones are not copied.
"""

from __future__ import annotations

import torch

from pyfastpeft.ops import _cuda
from pyfastpeft.ops._library import dtype_code


def _factor(tensor: torch.Tensor) -> torch.Tensor:
    """fp32 and dense, rows or columns first: the kernels take both strides."""
    tensor = tensor.to(torch.float32)
    return tensor if tensor.is_contiguous() or tensor.t().is_contiguous() else tensor.contiguous()


def _seed(dropout_p: float, seed: torch.Tensor | None) -> int:
    return seed.data_ptr() if dropout_p > 0 else 0


def _tensor_cores(tensor: torch.Tensor) -> bool:
    return _cuda.capability(tensor) >= (8, 0)


def shrink(
    x: torch.Tensor, a: torch.Tensor, alpha: float = 1.0, dropout_p: float = 0.0, seed: torch.Tensor | None = None
) -> torch.Tensor:
    """alpha · drop(x [M, D]) · a [R, D]ᵀ, fp32 [M, R]. x contiguous, a of any strides."""
    (M, D), R, a = x.shape, a.shape[0], _factor(a)
    module, device, stream = _cuda.target(x, "linear_lora")
    s = torch.empty(M, R, dtype=torch.float32, device=x.device)
    workspace = torch.empty(module.lora_shrink_workspace(M, D, R), dtype=torch.float32, device=x.device)
    module.lora_shrink_cuda(
        x.data_ptr(), x.numel(), dtype_code(x.dtype, "linear_lora", "x"), M, D, a.data_ptr(), a.numel(), *a.stride(), R,
        alpha, dropout_p, _seed(dropout_p, seed), _tensor_cores(x), workspace.data_ptr(), workspace.numel(),
        s.data_ptr(), s.numel(), device, stream,
    )  # fmt: skip
    return s


def expand_(
    y: torch.Tensor,
    s: torch.Tensor,
    c: torch.Tensor,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    *,
    add: bool,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [M, D] += drop(s [M, R] · c [R, D]) with `add`, else y = bias + drop(s · c). y and s contiguous; returns y."""
    (M, R), D, c = s.shape, c.shape[1], _factor(c)
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    module, device, stream = _cuda.target(y, "linear_lora")
    module.lora_expand_cuda(
        s.data_ptr(), s.numel(), M, R, c.data_ptr(), c.numel(), *c.stride(), D, dropout_p, _seed(dropout_p, seed),
        _tensor_cores(y), add, 0 if bias is None else bias.data_ptr(), 0 if bias is None else D,
        dtype_code(y.dtype, "linear_lora", "y"), y.data_ptr(), y.numel(), device, stream,
    )  # fmt: skip
    return y


def accumulate(
    p: torch.Tensor,
    x: torch.Tensor,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """p [M, R]ᵀ · drop(x [M, D]), fp32 [R, D]; into `out`, dense of any strides, where one is given."""
    (M, R), D = p.shape, x.shape[1]
    g = torch.empty(R, D, dtype=torch.float32, device=x.device) if out is None else out
    module, device, stream = _cuda.target(x, "linear_lora")
    workspace = torch.empty(module.lora_accumulate_workspace(M, D, R), dtype=torch.float32, device=x.device)
    module.lora_accumulate_cuda(
        p.data_ptr(), p.numel(), M, R, x.data_ptr(), x.numel(), dtype_code(x.dtype, "linear_lora", "x"), D, dropout_p,
        _seed(dropout_p, seed), _tensor_cores(x), workspace.data_ptr(), workspace.numel(), g.data_ptr(), g.numel(),
        *g.stride(), device, stream,
    )  # fmt: skip
    return g


def lora_forward(x, bias, lora_a, lora_b, scaling, dropout_p, seed) -> tuple[torch.Tensor, torch.Tensor]:
    """(bias + S · Bᵀ, a new [M, N] of x's dtype; S = scaling · drop(x [M, K]) · Aᵀ, fp32 [M, R]).

    The caller adds the base: y.addmm_(x, Wᵀ).
    """
    y, s = x.new_empty(x.shape[0], lora_b.shape[0]), shrink(x, lora_a, scaling, dropout_p, seed)
    return expand_(y, s, lora_b.t(), add=False, bias=bias), s


def lora_backward(grad, x, s, lora_a, lora_b, scaling, dropout_p, seed, need_x, need_a, need_b):
    """(the low-rank part of grad_x, grad_lora_a, grad_lora_b), None where not wanted.

    grad [M, N], x [M, K] and the forward's s [M, R] are contiguous; x is read only for A's gradient, s only for B's. Where
    s is None it is computed again from x. The caller adds grad · W to the first.
    """
    grad_x = grad_a = grad_b = None
    if need_x or need_a:
        ds = shrink(grad, lora_b.t(), scaling)
        if need_x:
            grad_x = grad.new_empty(grad.shape[0], lora_a.shape[1])
            expand_(grad_x, ds, lora_a, dropout_p, seed, add=False)
        if need_a:
            grad_a = accumulate(ds, x, dropout_p, seed).to(lora_a.dtype)
    if need_b:
        s = shrink(x, lora_a, scaling, dropout_p, seed) if s is None else s
        grad_b = torch.empty(lora_b.shape, dtype=torch.float32, device=grad.device)
        accumulate(s, grad, out=grad_b.t())
        grad_b = grad_b.to(lora_b.dtype)
    return grad_x, grad_a, grad_b
