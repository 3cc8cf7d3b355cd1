"""Facts about dense linear modules that the layers and quantize_model share."""

from __future__ import annotations

import torch
from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D (or a subclass), found by name so that transformers need not be imported."""
    return conv1d_class(type(module)) is not None


def conv1d_class(cls: type) -> type | None:
    """transformers' Conv1D among the classes `cls` derives from, or None."""
    for base in cls.__mro__:  # a plain loop: torch.compile of torch 2.6 cannot trace next(…, None)
        if base.__name__ == "Conv1D" and base.__module__.startswith("transformers."):
            return base
    return None


def has_own_forward(module: nn.Module, known: type | None) -> bool:
    """Whether calling the module does more than `known`'s forward: hooks, a forward of a subclass's own, or one on the
    instance (offloading puts it there)."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__ or known is None or type(module).forward is not known.forward


def first_non_finite(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The index of the first NaN or infinity in row-major order; None when all are finite, or on the meta device."""
    tensor = tensor.detach()
    if tensor.is_meta or tensor.numel() == 0:
        return None
    smallest, largest = torch.aminmax(tensor)  # NaN wins in both; no temporary of the tensor's size
    if torch.isfinite(smallest) and torch.isfinite(largest):
        return None
    return tuple((~torch.isfinite(tensor)).nonzero()[0].tolist())


def relative_error(stored: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖stored − wanted‖ / ‖wanted‖ (Frobenius, fp64, some rows at a time); 0.0 when equal, else inf for wanted 0."""
    rows = max(1, (1 << 20) // max(1, wanted.shape[-1]))
    error = norm = 0.0
    for a, b in zip(stored.split(rows), wanted.split(rows), strict=True):
        exact = b.to(device=a.device, dtype=torch.float64)
        error += (a.double() - exact).square().sum().item()
        norm += exact.square().sum().item()
    if error == 0.0:
        return 0.0
    return (error / norm) ** 0.5 if norm > 0.0 else float("inf")
