"""The CUDA quantise kernel gives the bits of the CPU's, which the format tests check."""

import pytest
import torch

import pyfastpeft
from pyfastpeft import ops

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not pyfastpeft.build_info()["cuda"], reason="built without CUDA"),
]


def assert_equal(weight, blocksize, quant_type):
    expected = ops.quantize_4bit(weight.cpu(), blocksize, quant_type)
    got = ops.quantize_4bit(weight, blocksize, quant_type)
    assert got.packed.device == weight.device
    assert torch.equal(got.absmax.cpu(), expected.absmax)
    different = (got.packed.cpu() != expected.packed).nonzero()
    assert not len(different), f"bytes differ first at {different[0].tolist()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_same_bits_as_the_cpu(dtype, quant_type):
    for n in (1, 7, 64, 255, 4096, 12345):
        weight = torch.randn(n + 1, generator=torch.Generator().manual_seed(n)).to("cuda", dtype)
        weight[: n // 3] = 0
        for blocksize in (32, 64, 128, 256, 512, 4096):
            assert_equal(weight[:n], blocksize, quant_type)
            assert_equal(weight[1:], blocksize, quant_type)  # not aligned to a vector load


def test_more_than_one_turn_of_the_grid():
    """The grid covers 2^27 values at a time; a larger weight takes several turns."""
    weight = torch.randn(1 << 20, device="cuda", dtype=torch.bfloat16).repeat((1 << 7) + 3)
    assert_equal(weight, 64, "nf4")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("blocksize", [64, 1024])
def test_first_bad_value_is_named(value, blocksize):
    weight = torch.randn(64, 100, device="cuda")
    weight[41, 7] = weight[41, 9] = weight[60, 0] = value
    with pytest.raises(ValueError, match=r"weight\[41, 7\] is"):
        ops.quantize_4bit(weight, blocksize)


def test_stream_and_device_of_the_caller_are_used():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        weight = torch.randn(1 << 24, device="cuda").mul_(2)
        assert_equal(weight, 64, "nf4")
    if torch.cuda.device_count() > 1:
        assert_equal(torch.randn(1000, device="cuda:1"), 64, "nf4")
        assert torch.cuda.current_device() == 0
