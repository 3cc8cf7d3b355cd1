"""segmented_lora: LoRA where each sample of a batch has its own adapter. Maths: pyfastpeft/reference/segmented_lora.py;
kernels: csrc/segmented_lora.

The samples of one adapter are a segment of `order`; the kernels read every adapter's A and B where they lie, through a
table of their addresses, and a whole batch takes two launches however many adapters it has.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from pyfastpeft._native import _C
from pyfastpeft.ops import _cuda
from pyfastpeft.ops._library import DTYPE_CODES, dtype_code, register_op
from pyfastpeft.ops._linear import as_rows
from pyfastpeft.reference import segmented_lora as reference

_OP = "segmented_lora_"


def _check(y, x, order, starts, lora_a, lora_b, lora_bias, scalings) -> None:
    dtype_code(x.dtype, _OP, "x")
    if y.dtype != x.dtype:
        raise TypeError(f"{_OP}: y is {y.dtype} and x is {x.dtype}; convert one with .to(dtype)")
    if x.dim() < 2 or y.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{_OP}: x has shape {tuple(x.shape)} and y {tuple(y.shape)}, expected [samples, ..., K] and [samples, ..., N]"
        )
    if not y.is_contiguous():
        raise ValueError(f"{_OP}: y has strides {y.stride()}, expected a contiguous tensor, which is added to in place")
    for name, tensor in (("order", order), ("starts", starts)):
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise TypeError(f"{_OP}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected contiguous int32 [n]")
    if order.shape[0] != x.shape[0] or starts.shape[0] != len(lora_a) + 1:
        raise ValueError(
            f"{_OP}: order has {order.shape[0]} entries and starts {starts.shape[0]}, expected {x.shape[0]}, as many as "
            f"samples, and {len(lora_a) + 1}, one more than adapters"
        )
    if not len(lora_a) == len(lora_b) == len(lora_bias) == len(scalings):
        raise ValueError(
            f"{_OP}: {len(lora_a)} lora_a, {len(lora_b)} lora_b, {len(lora_bias)} lora_bias and {len(scalings)} scalings, "
            "expected as many of each"
        )
    K, N, device = x.shape[-1], y.shape[-1], x.device
    for i, (a, b, bias) in enumerate(zip(lora_a, lora_b, lora_bias, strict=True)):  # of many: names only for an error
        if a.dtype not in DTYPE_CODES or b.dtype not in DTYPE_CODES:
            dtype_code(a.dtype, _OP, f"lora_a[{i}]")
            dtype_code(b.dtype, _OP, f"lora_b[{i}]")
        if a.dim() != 2 or a.shape[1] != K or b.shape != (N, a.shape[0]):
            raise ValueError(
                f"{_OP}: lora_a[{i}] has shape {tuple(a.shape)} and lora_b[{i}] {tuple(b.shape)}, expected [R, {K}] and "
                f"[{N}, R]"
            )
        if bias is not None and bias.shape != (N,):
            raise ValueError(f"{_OP}: lora_bias[{i}] has shape {tuple(bias.shape)}, expected ({N},)")
        if a.device != device or b.device != device or (bias is not None and bias.device != device):
            devices = [str(tensor.device) for tensor in (a, b, bias) if tensor is not None]
            raise ValueError(
                f"{_OP}: lora_a, lora_b and lora_bias [{i}] are on {', '.join(devices)}, x is on {device}; move them with "
                ".to(device)"
            )
    for name, tensor in (("y", y), ("order", order), ("starts", starts)):
        if tensor.device != x.device:
            raise ValueError(f"{_OP}: {name} is on {tensor.device}, x is on {x.device}; move one with .to(device)")


class _Factors:
    """What the bindings are handed of the adapters: dense, of one dtype, x's own or fp32. Holds the tensors alive."""

    def __init__(self, dtype: torch.dtype, lora_a, lora_b, lora_bias) -> None:
        dtypes = {t.dtype for factors in (lora_a, lora_b) for t in factors if t.numel()}
        self.dtype = dtype if dtypes == {dtype} else torch.float32
        self.a, self.b = ([self._dense(t) for t in factors] for factors in (lora_a, lora_b))
        self.bias = [None if t is None else t.to(torch.float32).contiguous() for t in lora_bias]

    def _dense(self, t: torch.Tensor) -> torch.Tensor:
        # asked first: of many adapters, two calls that return their argument cost more than the kernels
        return t if t.dtype == self.dtype and t.is_contiguous() else t.to(self.dtype).contiguous()

    def addresses(self) -> tuple[list[int], ...]:
        ranks = [a.shape[0] for a in self.a]
        bias = [0 if t is None else t.data_ptr() for t in self.bias]
        return [t.data_ptr() for t in self.a], [t.data_ptr() for t in self.b], bias, ranks


def _sizes(y, x) -> tuple[int, int, int, int]:
    """samples, rows of a sample, K, N."""
    samples, K = x.shape[0], x.shape[-1]
    return samples, x.shape[1:-1].numel(), K, y.shape[-1]


def _cpu(y, x, order, starts, lora_a, lora_b, lora_bias, scalings) -> None:
    _check(y, x, order, starts, lora_a, lora_b, lora_bias, scalings)
    samples, rows, K, N = _sizes(y, x)
    x, factors = as_rows(x), _Factors(x.dtype, lora_a, lora_b, lora_bias)
    _C.segmented_lora_cpu(
        x.data_ptr(), y.data_ptr(), dtype_code(x.dtype, _OP, "x"), K, N, order.data_ptr(), samples, starts.data_ptr(),
        rows, *factors.addresses(), list(scalings), dtype_code(factors.dtype, _OP, "lora_a"),
    )  # fmt: skip
    torch.autograd.graph.increment_version(y)


def _on_cuda(y, x, order, starts, lora_a, lora_b, lora_bias, scalings) -> None:
    _check(y, x, order, starts, lora_a, lora_b, lora_bias, scalings)
    samples, rows, K, N = _sizes(y, x)
    x, factors = as_rows(x), _Factors(x.dtype, lora_a, lora_b, lora_bias)
    a, b, bias, ranks = factors.addresses()
    module, device, stream = _cuda.target(x, _OP)
    size = module.segmented_lora_workspace(samples * rows, K, max(ranks, default=0), len(ranks))
    workspace = torch.empty(size, dtype=torch.float32, device=x.device)
    module.segmented_lora_cuda(
        x.data_ptr(), y.data_ptr(), dtype_code(x.dtype, _OP, "x"), K, N, order.data_ptr(), samples, starts.data_ptr(),
        rows, a, b, bias, ranks, list(scalings), dtype_code(factors.dtype, _OP, "lora_a"),
        _cuda.capability(x) >= (8, 0), workspace.data_ptr(), size, device, stream,
    )  # fmt: skip
    torch.autograd.graph.increment_version(y)


def _fake(y, x, order, starts, lora_a, lora_b, lora_bias, scalings) -> None:
    _check(y, x, order, starts, lora_a, lora_b, lora_bias, scalings)


_op = register_op(
    "segmented_lora_(Tensor(a!) y, Tensor x, Tensor order, Tensor starts, Tensor[] lora_a, Tensor[] lora_b, "
    "Tensor?[] lora_bias, float[] scalings) -> ()",
    cpu=_cpu,
    cuda=_on_cuda,
    fake=_fake,
)


def segments(adapters: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order, starts) of a batch: its samples sorted by adapter, and where each adapter's begin in that order.

    adapters   int [samples], each sample's adapter from 0 to count - 1; -1: none
    Returns int32 [samples] and [count + 1] on its device, without waiting for it: samples order[starts[i]:starts[i + 1]]
    have adapter i. Make them once a batch, for all of a model's layers.
    """
    if adapters.dim() != 1 or adapters.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"segments: adapters is {adapters.dtype} {tuple(adapters.shape)}, expected int64 [samples]")
    ordered, order = torch.sort(adapters, stable=True)
    bounds = torch.arange(count + 1, device=adapters.device, dtype=ordered.dtype)
    return order.to(torch.int32), torch.searchsorted(ordered, bounds, out_int32=True)


def segmented_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    lora_bias: Sequence[torch.Tensor | None] | None = None,
    scalings: Sequence[float] | None = None,
) -> torch.Tensor:
    """y[m] + scalings[i] · (x[m] · A_iᵀ · B_iᵀ + bias_i), i the adapter of sample m: several adapters in one batch.

    y              [samples, ..., N] float32, float16 or bfloat16, what the base gave; added to in place and returned
    x              [samples, ..., K] of y's dtype
    order, starts  the samples by adapter, from segments()
    lora_a[i]      [R_i, K] and lora_b[i] [N, R_i] of any of these dtypes; ranks may differ, and rank 0 adds nothing. Read
                   where they lie when all are fp32, or all of x's dtype. Products are summed in fp32; on a GPU's tensor
                   cores (16-bit x and y with rows of whole 16 bytes) the factors are first rounded to x's dtype
    lora_bias[i]   [N] or None;  None: no adapter has one
    scalings[i]    α/R or α/√R;  None: 1
    Samples of no adapter stay as they are. On CUDA `order` and `starts` may change without a new capture; a sample that
    is not there is left out (on the CPU it is a ValueError), and one that is twice in order gives any of its results.

    Where autograd records and something requires grad, torch operations compute each adapter's rows apart, with gradients
    to y, x and every factor, into a new tensor; a warning says so once, since inference does not want that. fp64 goes the
    same way.

    Raises TypeError for other dtypes, ValueError for shapes, devices or numbers of adapters that do not fit.
    Source: Chen et al. 2023 (Punica), arXiv:2310.18547; Sheng et al. 2023 (S-LoRA), arXiv:2311.03285.
    """
    lora_bias = [None] * len(lora_a) if lora_bias is None else list(lora_bias)
    scalings = [1.0] * len(lora_a) if scalings is None else list(scalings)
    recorded = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (y, x, *lora_a, *lora_b, *lora_bias)
    )
    if recorded or x.dtype == torch.float64:
        if recorded:
            _warn_recorded()
        return reference.segmented_lora(y, x, order, starts, lora_a, lora_b, lora_bias, scalings)
    if not y.is_contiguous():
        y = y.contiguous()
    _op(y, x, order, starts, list(lora_a), list(lora_b), lora_bias, scalings)
    return y


_warned = False


def _warn_recorded() -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            "segmented_lora: autograd is recording, so each adapter's rows are computed apart by torch operations; for "
            "inference use torch.inference_mode() or torch.no_grad(), where one kernel serves all adapters",
            stacklevel=3,
        )
