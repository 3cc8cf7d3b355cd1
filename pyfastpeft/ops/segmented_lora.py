"""segmented_lora: LoRA where each sample of a batch has its own adapter. Maths: pyfastpeft/reference/segmented_lora.py;
kernels: csrc/segmented_lora.

The samples of one adapter are a segment of `order`; the kernels read every adapter's A and B where they lie, through a
table of their addresses, and a whole batch takes two launches however many adapters it has, forward and backward.
"""

from __future__ import annotations

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


def _backward_outputs(grad_y, x, factors, mask_x, mask_a, mask_b, mask_bias):
    """Memory for the gradients: dX in zeros, the factors' in the dtype the kernels are handed; None where not wanted."""
    grad_x = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if mask_x else None
    grad_a, grad_b = (
        [torch.empty_like(t) if wanted else None for t, wanted in zip(tensors, mask, strict=True)]
        for tensors, mask in ((factors.a, mask_a), (factors.b, mask_b))
    )
    N, device = grad_y.shape[-1], x.device
    grad_bias = [torch.empty(N, dtype=torch.float32, device=device) if wanted else None for wanted in mask_bias]
    return grad_x, grad_a, grad_b, grad_bias


def _addresses(tensors) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _as_results(x, lora_a, lora_b, grad_x, grad_a, grad_b, grad_bias):
    """The gradients in their factors' dtypes, an empty tensor where one is not wanted."""

    def finished(gradients, factors):
        return [x.new_empty(0) if g is None else g.to(t.dtype) for g, t in zip(gradients, factors, strict=True)]

    grad_bias = [x.new_empty(0) if g is None else g for g in grad_bias]
    grad_x = x.new_empty(0) if grad_x is None else grad_x
    return grad_x, finished(grad_a, lora_a), finished(grad_b, lora_b), grad_bias


def _backward_cpu(grad_y, x, order, starts, lora_a, lora_b, scalings, mask_x, mask_a, mask_b, mask_bias):
    _check(grad_y, x, order, starts, lora_a, lora_b, [None] * len(lora_a), scalings)
    samples, rows, K, N = _sizes(grad_y, x)
    factors, rows_of_x = _Factors(x.dtype, lora_a, lora_b, []), as_rows(x)
    outputs = _backward_outputs(grad_y, x, factors, mask_x, mask_a, mask_b, mask_bias)
    a, b, _, ranks = factors.addresses()
    _C.segmented_lora_backward_cpu(
        grad_y.data_ptr(), rows_of_x.data_ptr(), *_addresses(outputs[:1]), dtype_code(x.dtype, _OP, "x"), K, N,
        order.data_ptr(), samples, starts.data_ptr(), rows, a, b, ranks, list(scalings),
        dtype_code(factors.dtype, _OP, "lora_a"), *map(_addresses, outputs[1:]),
    )  # fmt: skip
    return _as_results(x, lora_a, lora_b, *outputs)


def _backward_on_cuda(grad_y, x, order, starts, lora_a, lora_b, scalings, mask_x, mask_a, mask_b, mask_bias):
    _check(grad_y, x, order, starts, lora_a, lora_b, [None] * len(lora_a), scalings)
    samples, rows, K, N = _sizes(grad_y, x)
    factors, rows_of_x = _Factors(x.dtype, lora_a, lora_b, []), as_rows(x)
    outputs = _backward_outputs(grad_y, x, factors, mask_x, mask_a, mask_b, mask_bias)
    a, b, _, ranks = factors.addresses()
    module, device, stream = _cuda.target(x, _OP)
    size = module.segmented_lora_backward_workspace(samples * rows, K, N, max(ranks, default=0), len(ranks))
    workspace = torch.empty(size, dtype=torch.float32, device=x.device)
    module.segmented_lora_backward_cuda(
        grad_y.data_ptr(), rows_of_x.data_ptr(), *_addresses(outputs[:1]), dtype_code(x.dtype, _OP, "x"), K, N,
        order.data_ptr(), samples, starts.data_ptr(), rows, a, b, ranks, list(scalings),
        dtype_code(factors.dtype, _OP, "lora_a"), *map(_addresses, outputs[1:]), _cuda.capability(x) >= (8, 0),
        workspace.data_ptr(), size, device, stream,
    )  # fmt: skip
    return _as_results(x, lora_a, lora_b, *outputs)


def _backward_fake(grad_y, x, order, starts, lora_a, lora_b, scalings, mask_x, mask_a, mask_b, mask_bias):
    _check(grad_y, x, order, starts, lora_a, lora_b, [None] * len(lora_a), scalings)
    dense = torch.contiguous_format
    grad_x = torch.empty_like(x, memory_format=dense) if mask_x else x.new_empty(0)
    grad_a, grad_b = (
        [torch.empty_like(t, memory_format=dense) if m else x.new_empty(0) for t, m in zip(tensors, mask, strict=True)]
        for tensors, mask in ((lora_a, mask_a), (lora_b, mask_b))
    )
    N = grad_y.shape[-1]
    return grad_x, grad_a, grad_b, [x.new_empty(N if m else 0, dtype=torch.float32 if m else None) for m in mask_bias]


_backward_op = register_op(
    "segmented_lora_backward(Tensor grad_y, Tensor x, Tensor order, Tensor starts, Tensor[] lora_a, Tensor[] lora_b, "
    "float[] scalings, bool mask_x, bool[] mask_a, bool[] mask_b, bool[] mask_bias) "
    "-> (Tensor, Tensor[], Tensor[], Tensor[])",
    cpu=_backward_cpu,
    cuda=_backward_on_cuda,
    fake=_backward_fake,
)


def _setup_context(ctx, inputs, output) -> None:
    _, x, order, starts, lora_a, lora_b, lora_bias, scalings = inputs
    ctx.save_for_backward(x, order, starts, *lora_a, *lora_b, *lora_bias)
    ctx.scalings = scalings
    ctx.masks = [[t is not None and t.requires_grad for t in group] for group in (lora_a, lora_b, lora_bias)]


def _backward(ctx, grad_y):
    x, order, starts, *factors = ctx.saved_tensors
    count, mask_x = len(ctx.scalings), ctx.needs_input_grad[1]
    lora_a, lora_b, lora_bias = factors[:count], factors[count : 2 * count], factors[2 * count :]
    if not mask_x and not any(map(any, ctx.masks)):
        return grad_y, None, None, None, None, None, None, None
    if torch.is_grad_enabled():  # create_graph=True: what the kernels give has no history
        function = _backward_by_torch
    else:
        function = _backward_op
        grad_y = grad_y.contiguous()
    grad_x, a, b, bias = function(grad_y, x, order, starts, lora_a, lora_b, ctx.scalings, mask_x, *ctx.masks)
    bias = [g.to(t.dtype) if m else None for g, t, m in zip(bias, lora_bias, ctx.masks[2], strict=True)]
    a = [g if m else None for g, m in zip(a, ctx.masks[0], strict=True)]
    b = [g if m else None for g, m in zip(b, ctx.masks[1], strict=True)]
    return grad_y, grad_x if mask_x else None, None, None, a, b, bias, None


def _backward_by_torch(grad_y, x, order, starts, lora_a, lora_b, scalings, mask_x, *masks):
    """What _backward_op gives, by torch operations that can be differentiated again."""
    biases = [grad_y.new_zeros(grad_y.shape[-1], requires_grad=True) if wanted else None for wanted in masks[2]]
    y = reference.segmented_lora(torch.zeros_like(grad_y), x, order, starts, lora_a, lora_b, biases, scalings)
    leaves = [x] if mask_x else []
    for group, mask in zip((lora_a, lora_b, biases), masks, strict=True):
        leaves += [t for t, wanted in zip(group, mask, strict=True) if wanted]
    if y.requires_grad:
        found = iter(torch.autograd.grad(y, leaves, grad_y, create_graph=True, materialize_grads=True))
    else:  # no adapter has a sample
        found = iter([torch.zeros_like(t) for t in leaves])
    grad_x = next(found) if mask_x else None
    return grad_x, *([next(found) if wanted else None for wanted in mask] for mask in masks)


def _added(implementation):
    """The op that gives a tensor of its own: what autograd records."""

    def added(y, x, order, starts, lora_a, lora_b, lora_bias, scalings):
        y = y.clone(memory_format=torch.contiguous_format)
        implementation(y, x, order, starts, lora_a, lora_b, lora_bias, scalings)
        return y

    return added


_recorded_op = register_op(
    "segmented_lora(Tensor y, Tensor x, Tensor order, Tensor starts, Tensor[] lora_a, Tensor[] lora_b, "
    "Tensor?[] lora_bias, float[] scalings) -> Tensor",
    cpu=_added(_cpu),
    cuda=_added(_on_cuda),
    fake=_added(_fake),
    setup_context=_setup_context,
    backward=_backward,
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

    Where autograd records and something requires grad, the result is a new tensor with gradients to y, x and every factor,
    by two launches more for up to 80 adapters: with P_i = scalings[i] · dL/dy · B_i and S_i = scalings[i] · x · A_iᵀ, over
    adapter i's rows, dL/dx = P_i A_i, dL/dA_i = P_iᵀ x, dL/dB_i = dL/dyᵀ S_i and dL/dbias_i = scalings[i] Σ dL/dy. Sums
    are fp32, in the order of the rows; an adapter that no sample has gets zeros. fp64 is computed by torch operations.

    Raises TypeError for other dtypes, ValueError for shapes, devices or numbers of adapters that do not fit.
    Source: Chen et al. 2023 (Punica), arXiv:2310.18547; Sheng et al. 2023 (S-LoRA), arXiv:2311.03285.
    """
    lora_bias = [None] * len(lora_a) if lora_bias is None else list(lora_bias)
    scalings = [1.0] * len(lora_a) if scalings is None else list(scalings)
    recorded = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (y, x, *lora_a, *lora_b, *lora_bias)
    )
    if x.dtype == torch.float64:
        return reference.segmented_lora(y, x, order, starts, lora_a, lora_b, lora_bias, scalings)
    if recorded:
        return _recorded_op(y, x, order, starts, list(lora_a), list(lora_b), lora_bias, scalings)
    if not y.is_contiguous():
        y = y.contiguous()
    _op(y, x, order, starts, list(lora_a), list(lora_b), lora_bias, scalings)
    return y
