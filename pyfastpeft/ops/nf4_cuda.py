"""The CUDA implementations of the 4-bit quantisation ops: outputs on the tensor's device, one launch on its stream.

Nothing here waits for the GPU but the check for values without a code, where it is asked for. Kernels: csrc/nf4.
"""

from __future__ import annotations

import torch

from pyfastpeft.ops._cuda import target
from pyfastpeft.ops._library import dtype_code
from pyfastpeft.ops._nf4 import (
    absmax_not_finite,
    ceil_div,
    check_absmax,
    check_out,
    check_weight,
    dequantize_into,
    not_finite,
)
from pyfastpeft.reference.nf4 import NESTED_BLOCKSIZE, dynamic_map

_NONE = torch.iinfo(torch.int64).max


class _FirstBad:
    """Where a kernel notes the position of the first value that has no code; without `wanted`, nowhere."""

    def __init__(self, wanted: bool, device: torch.device):
        self.tensor = torch.full((1,), _NONE, dtype=torch.int64, device=device) if wanted else None

    def data_ptr(self) -> int:
        return 0 if self.tensor is None else self.tensor.data_ptr()

    def position(self) -> int | None:
        """None: there is none. Waits for the stream: once per weight, when a model is loaded."""
        if self.tensor is None:
            return None
        position = self.tensor.item()
        return None if position == _NONE else position


def quantize(check_finite: bool):
    """quantize_4bit's implementation; without check_finite it neither raises for a NaN nor waits for the GPU."""

    def run(weight: torch.Tensor, blocksize: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
        code = check_weight(weight)
        weight = weight.contiguous()
        n = weight.numel()
        module, device, stream = target(weight, "quantize_4bit")
        packed = torch.empty(((n + 1) // 2, 1), dtype=torch.uint8, device=weight.device)
        absmax = torch.empty(ceil_div(n, max(blocksize, 1)), dtype=torch.float32, device=weight.device)
        bad = _FirstBad(check_finite, weight.device)
        module.nf4_quantize_cuda(
            weight.data_ptr(), code, n, blocksize, quant_type,
            packed.data_ptr(), packed.numel(), absmax.data_ptr(), absmax.numel(), bad.data_ptr(), device, stream,
        )  # fmt: skip
        if (position := bad.position()) is not None:
            raise not_finite(weight, position)
        return packed, absmax

    return run


def quantize_absmax(check_finite: bool):
    """quantize_absmax's implementation; check_finite as in quantize()."""

    def run(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        check_absmax(absmax)
        absmax = absmax.detach().contiguous()
        blocks = absmax.numel()
        module, device, stream = target(absmax, "quantize_absmax")
        # torch's own mean, on the GPU: its summation order there is not the CPU's, nor then is the last bit of the offset
        offset = absmax.mean() if blocks else torch.zeros((), device=absmax.device)
        host_map = dynamic_map()
        codes = torch.empty(blocks, dtype=torch.uint8, device=absmax.device)
        nested_absmax = torch.empty(ceil_div(blocks, NESTED_BLOCKSIZE), dtype=torch.float32, device=absmax.device)
        nested_map = torch.empty(host_map.numel(), dtype=torch.float32, device=absmax.device)
        bad = _FirstBad(check_finite, absmax.device)
        module.nf4_quantize_absmax_cuda(
            absmax.data_ptr(), blocks, offset.data_ptr(), host_map.data_ptr(), host_map.numel(),
            codes.data_ptr(), codes.numel(), nested_absmax.data_ptr(), nested_absmax.numel(), nested_map.data_ptr(),
            bad.data_ptr(), device, stream,
        )  # fmt: skip
        if (position := bad.position()) is not None:
            raise absmax_not_finite(absmax, position, offset)
        return codes, nested_absmax, nested_map, offset

    return run


def _launch_for(out: torch.Tensor):
    module, device, stream = target(out, "dequantize_4bit")
    return module.nf4_dequantize_cuda, (device, stream)


def dequantize(packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype) -> torch.Tensor:
    dtype_code(dtype, "dequantize_4bit", "the output")
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    flat = (packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype)
    dequantize_into(_launch_for, out, *flat)
    return out


def dequantize_out(
    packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype, *, out
) -> torch.Tensor:
    check_out(out, packed, shape, dtype)
    flat = (packed, absmax, nested_absmax, nested_map, offset, blocksize, quant_type, shape, dtype)
    if out.is_contiguous():
        dequantize_into(_launch_for, out, *flat)
        torch.autograd.graph.increment_version(out)
    else:
        out.copy_(dequantize(*flat))
    return out
