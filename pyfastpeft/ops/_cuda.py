"""What the CUDA implementations of ops share: where a call runs."""

from __future__ import annotations

import types
from typing import NamedTuple

import torch

from pyfastpeft._native import require_cuda


class Target(NamedTuple):
    """The compiled module, and the device index and stream to hand its launchers."""

    module: types.ModuleType
    device: int
    stream: int


def target(tensor: torch.Tensor, op: str) -> Target:
    """Where a call on `tensor` runs: its own device, that device's current stream.

    Every CUDA implementation asks here and nowhere else. RuntimeError if this build has no CUDA kernels; ValueError if
    the tensor is not on a GPU, which the op's own check of its tensors' devices says in more detail where it has one.
    """
    if not tensor.is_cuda:
        raise ValueError(
            f"{op}: a tensor is on {tensor.device} and another on a GPU, expected one device; move them with .to()"
        )
    module = require_cuda(op)
    return Target(module, tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream)


def capability(tensor: torch.Tensor) -> tuple[int, int]:
    """The compute capability of the GPU that `tensor` is on."""
    return torch.cuda.get_device_capability(tensor.device)


def multiprocessors(tensor: torch.Tensor) -> int:
    """How many multiprocessors the GPU that `tensor` is on has."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def is_capturing(tensor: torch.Tensor) -> bool:
    """Whether calls on the device of `tensor` are being captured in a CUDA graph instead of run."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
