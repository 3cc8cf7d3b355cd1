"""AddedWeight: W + L R as a tensor that is not computed unless something needs every value of it.

It stands for a Parameter while its module computes. Products keep the two parts apart, and so does picking experts:

    x (W + L R) = x W + (x L) R          (W + L R)[e] = W[e] + L[e] R[e]

so the experts of a mixture cost their own low-rank products, and no second stack of expert weights. Anything else that is
done with the tensor (an addition, a cast, a reshape) gets the sum, computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

_GRANULE = 16  # grouped products want rows of whole 16-byte pieces: ranks are padded with zeros to this


class AddedWeight(torch.Tensor):
    """weight [..., I, J] + left [..., I, R] @ right [..., R, J]; all of one dtype."""

    @staticmethod
    def __new__(cls, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> AddedWeight:
        return torch.Tensor._make_subclass(cls, weight.detach(), False)

    def __init__(self, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        self._weight, self._left, self._right, self._sum = weight, left, right, None

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            rule = _RULES.get(function) or _RULES_BY_NAME.get(getattr(function, "__name__", ""))
            if rule is not None:
                result = rule(function, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            args, kwargs = _summed(args), _summed(kwargs)
            return function(*args, **kwargs)


def _summed(value: Any) -> Any:
    if isinstance(value, AddedWeight):
        if value._sum is None:
            weight, left, right = value._weight, value._left, value._right
            value._sum = torch.baddbmm(weight, left, right) if weight.ndim == 3 else torch.addmm(weight, left, right)
        return value._sum
    if isinstance(value, (tuple, list)):
        return type(value)(_summed(item) for item in value)
    return {key: _summed(item) for key, item in value.items()} if isinstance(value, dict) else value


def _metadata(function: Callable, tensor: Any, *args, **kwargs) -> Any:
    return function(tensor._weight, *args, **kwargs) if isinstance(tensor, AddedWeight) else NotImplemented


def _pick(function: Callable, tensor: Any, index: Any) -> Any:
    """The experts that an integer, a slice, or a tensor of at most one dimension picks."""
    whole = isinstance(index, (int, slice)) and not isinstance(index, bool)
    listed = isinstance(index, torch.Tensor) and index.ndim <= 1 and index.dtype in (torch.int32, torch.int64)
    if not isinstance(tensor, AddedWeight) or tensor._weight.ndim != 3 or not (whole or listed):
        return NotImplemented
    return AddedWeight(*(function(part, index) for part in (tensor._weight, tensor._left, tensor._right)))


def _turn(function: Callable, tensor: Any, *dims: int) -> Any:
    """The two last dimensions exchanged."""
    if not isinstance(tensor, AddedWeight):
        return NotImplemented
    ndim = tensor._weight.ndim
    if {dim % ndim for dim in dims or (-1, -2)} != {ndim - 1, ndim - 2}:
        return NotImplemented
    return AddedWeight(tensor._weight.mT, tensor._right.mT, tensor._left.mT)


def _product(function: Callable, one: Any, other: Any) -> Any:
    """matmul, mm, bmm: whichever of the two it is."""
    if isinstance(one, AddedWeight) and isinstance(other, AddedWeight):
        return NotImplemented
    if isinstance(one, AddedWeight):
        return function(one._weight, other) + function(one._left, function(one._right, other))
    return function(one, other._weight) + function(function(one, other._left), other._right)


def _linear(function: Callable, x: Any, weight: Any, bias: torch.Tensor | None = None) -> Any:
    if isinstance(x, AddedWeight) or isinstance(bias, AddedWeight) or weight._weight.ndim != 2:
        return NotImplemented
    y = F.linear(x, weight._weight, bias)
    return y + F.linear(F.linear(x, weight._right), weight._left)


def _grouped(function: Callable, x: Any, weight: Any, *args, **kwargs) -> Any:
    """One product for each group of rows of x, with that group's matrix."""
    if isinstance(x, AddedWeight) or not isinstance(weight, AddedWeight) or weight._weight.ndim != 3:
        return NotImplemented
    padding = -weight._left.shape[-1] % _GRANULE
    left = F.pad(weight._left, (0, padding)).contiguous()
    right = F.pad(weight._right, (0, 0, 0, padding)).contiguous()
    low = function(function(x, left, *args, **kwargs), right, *args, **kwargs)
    return function(x, weight._weight, *args, **kwargs) + low


_RULES: dict[Any, Callable] = {
    torch.Tensor.__getitem__: _pick,
    torch.Tensor.transpose: _turn,
    torch.transpose: _turn,
    torch.Tensor.t: _turn,
    torch.Tensor.T.__get__: _turn,
    torch.Tensor.mT.__get__: _turn,
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.bmm), _product),
    **dict.fromkeys((torch.Tensor.mm, torch.Tensor.bmm), _product),
    **dict.fromkeys(
        (
            torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__, torch.Tensor.device.__get__, torch.Tensor.ndim.__get__,
            torch.Tensor.is_cuda.__get__, torch.Tensor.layout.__get__, torch.Tensor.is_sparse.__get__, torch.Tensor.size,
            torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.stride, torch.Tensor.is_floating_point,
            torch.Tensor.is_contiguous, torch.Tensor.element_size, torch.Tensor.data_ptr, torch.Tensor.__len__,
        ),
        _metadata,
    ),
}  # fmt: skip
# torch names this one in different places over its releases, and transformers has an operator of its own for CPUs
_RULES_BY_NAME: dict[str, Callable] = dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped)
