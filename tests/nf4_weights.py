"""Weights that try the 4-bit encoder where it could go wrong; used by the tests of the op and of its parity."""

import torch

from pyfastpeft.reference.nf4 import quant_map

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def _around(values: torch.Tensor, ulps: int = 2) -> torch.Tensor:
    """Each value with its neighbours up to `ulps` floats away."""
    bits = values.to(torch.float32).view(torch.int32)
    return torch.stack([bits + step for step in range(-ulps, ulps + 1)]).view(torch.float32).reshape(-1)


def thresholds(quant_type: str) -> torch.Tensor:
    """All thresholds, of both signs for FP4."""
    levels = quant_map(quant_type).unique()  # sorted; FP4's two zeros are one
    return (levels[:-1] + levels[1:]) / 2


def near_thresholds(quant_type: str, blocksize: int) -> torch.Tensor:
    """Blocks scaled by several absmax, filled with values on a threshold and within 2 ulp of it."""
    generator = torch.Generator().manual_seed(blocksize)
    values = _around(thresholds(quant_type))
    blocks = []
    for absmax in (1.0, 0.5, 2.0**-20, 0.02345678, 0.9999999, 1.0000001, 3.14159, 12345.678, 0.000123456):
        scaled = _around(values * absmax, 1)
        for chunk in scaled[torch.randperm(scaled.numel(), generator=generator)].split(blocksize - 1):
            block = torch.zeros(blocksize)
            block[: chunk.numel()] = chunk
            block[-1] = absmax if len(blocks) % 2 else -absmax
            blocks.append(block)
    return torch.cat(blocks)


def extremes(blocksize: int) -> torch.Tensor:
    """Whole blocks of zeros, subnormals, values around the floor of absmax, huge values, constants, single spikes."""
    generator = torch.Generator().manual_seed(blocksize)
    noise = torch.rand(blocksize, generator=generator) * 2 - 1
    largest = torch.finfo(torch.float32).max
    scales = [1e-45, 1e-44, 1e-40, 9e-39, 1e-38, 1.1e-38, 1.17549435e-38, 2e-38, 1e-30, 1e30, 8e37, 1.7e38, largest]
    blocks = [noise * scale for scale in scales]
    for value in (0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, largest, -largest, 0.1):
        blocks.append(torch.full((blocksize,), value))
        spike = torch.zeros(blocksize)
        spike[blocksize // 3] = value
        blocks.append(spike)
    return torch.cat(blocks)


def as_finite(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In that dtype, with what is too large for it at its largest value."""
    largest = torch.finfo(dtype).max
    return weight.clamp(-largest, largest).to(dtype)


def assert_same_bytes(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Bitwise equality; on a difference, how many and where the first ones are."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, (
        f"{what}: {actual.dtype} {tuple(actual.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    )
    a, e = actual.contiguous(), expected.contiguous()
    if a.is_floating_point():
        view = torch.int32 if a.dtype == torch.float32 else torch.int16
        a, e = a.view(view), e.view(view)
    wrong = (a != e).nonzero()
    if len(wrong):
        places = ", ".join(
            f"{tuple(i.tolist())}: {actual[tuple(i)].item()!r} != {expected[tuple(i)].item()!r}" for i in wrong[:5]
        )
        raise AssertionError(f"{what}: {len(wrong)} of {actual.numel()} differ; {places}")
