"""linear_4bit on CUDA: which kernel takes a call, and the call itself. Kernels: csrc/nf4/nf4_matmul_cuda.h.

    few rows      matvec: fp32 dot products straight from the packed bytes; for float32 x too
    up to 64      matmul: tensor cores fed from the packed bytes, 16-bit x, compute capability 8.0 and newer
    more          W dequantised into one torch.empty, torch's matmul, the low-rank path in place of a bias

The fused kernels add S·Bᵀ, the bias and an (IA)³ scale before their one rounding. S = scaling · drop(x) · Aᵀ is made in
the matvec launch itself up to `shrink_ranks` ranks: each SM reads A then. Else it is a launch of its own
(ops/_linear_cuda.py: shrink). W whose rows are no multiple of 32 values takes the last way for every M: its rows do not
begin at a 16-byte address.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from pyfastpeft.ops import _cuda, _linear_cuda
from pyfastpeft.ops._library import dtype_code

ROW_MULTIPLE = 32  # values: 16 packed bytes
MATMUL_ROWS = 64  # the most rows of x that csrc/nf4/nf4_matmul_cuda.cu takes
MATVEC_ROWS = 4096  # of a launch of csrc/nf4/nf4_matvec_cuda.cu: they are its grid's second dimension
SHRINK_ROWS = 32  # up to which lora_shrink_cuda sums every row in the same order


class Switch(NamedTuple):
    """Up to how many rows of x each kernel is chosen, and up to how many ranks matvec makes S for one row."""

    matvec_16bit: int
    matvec_float32: int
    matmul: int
    shrink_ranks: int


# By compute capability, the newest one that is not newer than the GPU. Predicted from bytes and instruction counts, not
# yet measured on hardware: the matvec kernel reads the weights once per row of x, the matmul kernel once per 64; W in
# fp32 costs 17 times the packed bytes to write and read, so dot products win up to 8 rows. For 8 ranks of 4096 inputs the
# SMs together read 17 MB of A from the L2, about 3 us; two launches for S take 4.
SWITCHES = {
    # 64 KiB of shared memory: no room for the table
    (7, 5): Switch(matvec_16bit=0, matvec_float32=0, matmul=0, shrink_ranks=0),
    (8, 0): Switch(matvec_16bit=1, matvec_float32=8, matmul=64, shrink_ranks=8),
}

_batch_invariant = False


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Within it linear_4bit on CUDA gives a row of x the same bits whatever its place and the number of rows.

    One kernel and one way of cutting sums for every M: 64 rows at a time through the tensor cores (16-bit x), one by one
    for float32, the low-rank path included. Costs speed for one row and for many. The backward is not concerned; neither
    is dropout, whose mask belongs to a value's place. Raises RuntimeError for weights that the fused kernels cannot read
    (rows that are no multiple of 32 values) and before compute capability 8.0. A switch of the process, not of a thread.
    """
    global _batch_invariant
    former, _batch_invariant = _batch_invariant, enabled
    try:
        yield
    finally:
        _batch_invariant = former


def switch(capability: tuple[int, int]) -> Switch:
    return SWITCHES[max((c for c in SWITCHES if c <= capability), default=min(SWITCHES))]


def _kernel(x: torch.Tensor, N: int, K: int) -> str:
    """'matvec', 'matmul' or 'dequantise'."""
    limits = switch(_cuda.capability(x))
    wide = x.dtype == torch.float32
    if _batch_invariant:
        if K % ROW_MULTIPLE or limits.matmul == 0:
            got = f"a weight with rows of {K} values" if K % ROW_MULTIPLE else "a GPU before compute capability 8.0"
            raise RuntimeError(
                f"linear_4bit: batch_invariant is on and this is {got}; the kernels that promise it need rows of a "
                f"multiple of {ROW_MULTIPLE} values and compute capability 8.0; leave batch_invariant for this layer"
            )
        return "matvec" if wide else "matmul"
    M = x.shape[0]
    if K % ROW_MULTIPLE == 0:
        if M <= (limits.matvec_float32 if wide else limits.matvec_16bit):
            return "matvec"
        if not wide and M <= limits.matmul:
            return "matmul"
    return "dequantise"


def _address(tensor: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.numel())


class Weight:
    """A 4-bit weight [N, K] for the length of a call, dense, and how the bindings take it."""

    def __init__(
        self, packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, N: int, K: int
    ) -> None:
        tensors = [packed, absmax, nested_absmax, nested_map, offset]
        self.tensors = [None if t is None else t.contiguous() for t in tensors]
        self.blocksize, self.quant_type, self.N, self.K = blocksize, quant_type, N, K

    def arguments(self) -> tuple:
        packed, absmax, nested_absmax, nested_map, offset = map(_address, self.tensors)
        return (*packed, *absmax, *nested_absmax, *nested_map, offset[0])

    @property
    def aligned(self) -> bool:
        """The fused kernels read 16 bytes at a time."""
        return self.tensors[0].data_ptr() % 16 == 0

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(self.N, self.K, dtype=dtype, device=self.tensors[0].device)
        module, device, stream = _cuda.target(out, "linear_4bit")
        module.nf4_dequantize_cuda(
            *self.arguments(), self.N * self.K, self.blocksize, self.quant_type, dtype_code(dtype, "linear_4bit", "W"),
            *_address(out), device, stream,
        )  # fmt: skip
        return out


def forward(w: Weight, x, bias, lora_a, lora_b, scaling, dropout_p, seed, ia3_scale=None, keep_s=False):
    """([M, N] in x's dtype: (x·Wᵀ + bias + S·Bᵀ) · ia3_scale, the last where one is given;
    S = scaling·drop(x)·Aᵀ, fp32 [M, R], or None where it was made inside another launch, which keep_s forbids, or there is
    no lora_a). x contiguous."""
    if x.shape[0] == 0 or w.N == 0:
        s = None if lora_a is None else _shrink(x, lora_a, scaling, dropout_p, seed)
        return x.new_empty(x.shape[0], w.N), s
    kernel = _kernel(x, w.N, w.K) if w.K > 0 else "dequantise"
    if not w.aligned and kernel != "dequantise":
        if _batch_invariant:
            w.tensors[0] = w.tensors[0].clone()
        else:
            kernel = "dequantise"
    if kernel == "dequantise":
        y, s = _dense(w, x, bias, lora_a, lora_b, scaling, dropout_p, seed)
        return (y if ia3_scale is None else y.mul_(ia3_scale)), s
    if x.data_ptr() % 16:
        x = x.clone()  # at most a few rows, or batch_invariant
    s = a = None
    if lora_a is not None:
        if kernel == "matvec" and not keep_s and _makes_s(x, lora_a, dropout_p):
            a = lora_a.to(torch.float32)
        else:
            s = _shrink(x, lora_a, scaling, dropout_p, seed)
    y = x.new_empty(x.shape[0], w.N)
    _fused(kernel, w, x, s, a, scaling, lora_b, bias, ia3_scale, y)
    return y, s


def _makes_s(x, lora_a, dropout_p: float) -> bool:
    """Whether the matvec launch makes S: for one row, few ranks, no dropout."""
    few = x.shape[0] == 1 and 0 < lora_a.shape[0] <= switch(_cuda.capability(x)).shrink_ranks
    readable = lora_a.is_contiguous() and (lora_a.dtype != torch.float32 or lora_a.data_ptr() % 16 == 0)
    return few and readable and dropout_p == 0 and not _batch_invariant


def _shrink(x, lora_a, scaling, dropout_p, seed) -> torch.Tensor:
    if not _batch_invariant or dropout_p > 0 or x.shape[0] <= SHRINK_ROWS:
        return _linear_cuda.shrink(x, lora_a, scaling, dropout_p, seed)
    return torch.cat([_linear_cuda.shrink(rows, lora_a, scaling) for rows in x.split(SHRINK_ROWS)])


def _fused(kernel: str, w: Weight, x, s, a, scaling, lora_b, bias, ia3_scale, y) -> None:
    module, device, stream = _cuda.target(x, "linear_4bit")
    code = dtype_code(x.dtype, "linear_4bit", "x")
    b, bias, ia3_scale = (None if t is None else t.to(torch.float32) for t in (lora_b, bias, ia3_scale))
    if b is not None and not (b.is_contiguous() or b.t().is_contiguous()):
        b = b.contiguous()
    bias, ia3_scale = (None if t is None else t.contiguous() for t in (bias, ia3_scale))
    rank = 0 if b is None else b.shape[1]
    strides = (0, 0) if b is None else b.stride()
    step = MATMUL_ROWS if kernel == "matmul" else MATVEC_ROWS
    for begin in range(0, x.shape[0], step):
        rows, out = x[begin : begin + step], y[begin : begin + step]
        low = None if s is None else s[begin : begin + step]
        M = rows.shape[0]
        workspace = module.nf4_matmul_workspace(M, w.N, w.K) if kernel == "matmul" else 0
        space = torch.empty(workspace, dtype=torch.float32, device=x.device)
        run = module.nf4_matmul_cuda if kernel == "matmul" else module.nf4_matvec_cuda
        run(
            *w.arguments(), w.N, w.K, w.blocksize, w.quant_type, *_address(rows), M, code, *_address(low), *_address(a),
            scaling, *_address(b), *strides, rank, *_address(bias), *_address(ia3_scale), *_address(space),
            *_address(out), device, stream,
        )  # fmt: skip


def _dense(w: Weight, x, bias, lora_a, lora_b, scaling, dropout_p, seed) -> tuple[torch.Tensor, torch.Tensor | None]:
    dense = w.dequantise(x.dtype)
    if lora_a is None:
        return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype)), None
    y, s = _linear_cuda.lora_forward(x, bias, lora_a, lora_b, scaling, dropout_p, seed)
    return y.addmm_(x, dense.t()), s


def backward(w: Weight, grad, x, s, lora_a, lora_b, scaling, dropout_p, seed, output_mask):
    """(grad_x [M, K], grad_bias, grad_lora_a, grad_lora_b), None where not wanted; grad [M, N] and x contiguous.

    W is decoded once, into the only tensor of its size; the low-rank part of grad_x is written first and the base's
    product added to it in the matmul.
    """
    need_x, need_bias, need_a, need_b = output_mask
    grad_x = grad_a = grad_b = None
    if lora_a is not None:
        grad_x, grad_a, grad_b = _linear_cuda.lora_backward(
            grad, x, s, lora_a, lora_b, scaling, dropout_p, seed, need_x, need_a, need_b
        )
    if need_x:
        dense = w.dequantise(grad.dtype)
        grad_x = torch.mm(grad, dense) if grad_x is None else grad_x.addmm_(grad, dense)
    grad_bias = grad.sum(0, dtype=torch.float32) if need_bias else None
    return grad_x, grad_bias, grad_a, grad_b
