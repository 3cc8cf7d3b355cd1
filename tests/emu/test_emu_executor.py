"""The executor runs the CUDA kernels of an op in the place of its CPU code."""

import torch

import pyfastpeft as pf


def test_an_op_runs_its_cuda_kernel(device):
    weight = torch.linspace(-1, 1, 100, device=device)
    q = pf.ops.quantize_4bit(weight, 32)
    back = pf.ops.dequantize_4bit(q)
    assert (back - weight).abs().max() < 0.2
