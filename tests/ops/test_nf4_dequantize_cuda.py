"""dequantize_4bit on every kind of device: the reference's bits, plain and nested, at any size and address."""

import pytest
import torch
from nf4_weights import BLOCKSIZES, DTYPES, assert_same_bytes

import pyfastpeft as pf
from pyfastpeft.reference import nf4 as reference

TILE = 8192  # values a thread block takes
SIZES = [1, 2, 31, 33, TILE - 1, TILE, TILE + 7]


def random_tensor(n, blocksize, quant_type, nested, device, dtype=torch.float32, offset=0):
    """Every code and any absmax, not only what quantise would make; packed begins `offset` bytes after a word."""
    generator = torch.Generator().manual_seed(n + blocksize)
    memory = torch.randint(0, 256, ((n + 1) // 2 + offset, 1), dtype=torch.uint8, generator=generator)
    blocks = -(n // -blocksize)
    absmax = torch.rand(blocks, generator=generator) * 0.1 + 1e-3
    parts = {}
    if nested:
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
        parts = {
            "nested_absmax": torch.rand(-(blocks // -256), generator=generator),
            "nested_map": reference.dynamic_map() * 1.01,  # a stored map is trusted
            "offset": torch.tensor(0.73),
        }
    parts = {name: part.to(device) for name, part in parts.items()}
    packed = memory.to(device)[offset:]
    return pf.QuantizedTensor(packed, absmax.to(device), blocksize, quant_type, torch.Size([n]), dtype, **parts)


def check(q, dtype, out):
    expected = reference.dequantize_4bit(*q.to("cpu").flat()[:-1], dtype)
    assert pf.ops.dequantize_4bit(q, dtype, out) is out
    what = f"{q.quant_type} {dtype} {tuple(q.shape)} blocksize {q.blocksize} nested {q.is_nested}"
    assert_same_bytes(out.cpu(), expected, what)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_every_tail(device, dtype, nested):
    for quant_type in ("nf4", "fp4"):
        for n in SIZES:
            q = random_tensor(n, 64, quant_type, nested, device)
            check(q, dtype, torch.full((n,), float("nan"), dtype=dtype, device=device))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_bits_of_every_blocksize(device, blocksize):
    for nested in (False, True):
        q = random_tensor(2 * TILE + 33, blocksize, "nf4", nested, device)
        check(q, torch.bfloat16, torch.full(q.shape, float("nan"), dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_at_any_address(device, dtype):
    n = TILE + 40
    for offset in (1, 2, 3):
        q = random_tensor(n, 32, "nf4", True, device, offset=offset)
        check(q, dtype, torch.full((n,), float("nan"), dtype=dtype, device=device))
    for first in (1, 2, 5):
        memory = torch.full((n + first + 1,), float("nan"), dtype=dtype, device=device)
        check(random_tensor(n, 32, "nf4", True, device), dtype, memory[first:-1])
        assert memory[:first].isnan().all() and memory[-1].isnan()  # nothing beside it was touched


def test_more_blocks_than_one_nested_block_holds(device):
    q = random_tensor(3 * TILE + 1, 32, "nf4", True, device)  # 769 blocks, 4 nested ones
    check(q, torch.bfloat16, torch.full(q.shape, float("nan"), dtype=torch.bfloat16, device=device))


def test_subnormal_huge_and_not_finite_absmax(device):
    absmax = torch.tensor([0, 1e-45, 3e-41, 1e-38, 2e-38, 6e-8, 1e-4, 65504, 65520, 7e4, 3.3e38, 3.4028235e38])
    n = absmax.numel() * 32 - 1
    q = random_tensor(n, 32, "nf4", False, device)
    q.absmax = absmax.to(device)
    for dtype in DTYPES:
        check(q, dtype, torch.full((n,), float("nan"), dtype=dtype, device=device))
    q.absmax = torch.tensor([float("inf"), float("-inf"), float("nan")] * 4).to(device)
    for dtype in DTYPES:
        back, expected = (
            pf.ops.dequantize_4bit(q, dtype).cpu(),
            reference.dequantize_4bit(*q.to("cpu").flat()[:-1], dtype),
        )
        assert torch.equal(back.isnan(), expected.isnan()) and torch.equal(back.isinf(), expected.isinf())


@pytest.mark.parametrize("nested", [False, True])
def test_out_of_any_stride(device, nested):
    q = pf.ops.quantize_4bit(torch.randn(33, 65, device=device), 32, double_quant=nested)
    expected = pf.ops.dequantize_4bit(q)
    assert expected.device == q.device
    for out in (
        torch.full((65, 33), float("nan"), device=device).t(),
        torch.full((66, 130), float("nan"), device=device)[::2, ::2],
        torch.full((34, 65), float("nan"), device=device)[1:],
    ):
        version = out._version
        assert pf.ops.dequantize_4bit(q, out=out) is out
        assert torch.equal(out, expected) and out._version > version


def test_strided_parts(device):
    q = pf.ops.quantize_4bit(torch.randn(70, 64, device=device), 32, double_quant=True)
    expected = pf.ops.dequantize_4bit(q)
    flat = list(q.flat())
    for index in (0, 1, 2, 3):
        flat[index] = torch.stack([flat[index], torch.zeros_like(flat[index])], -1)[..., 0]
    assert torch.equal(torch.ops.pyfastpeft.dequantize_4bit(*flat), expected)


def test_round_trip(device):
    weight = torch.randn(64, 130, device=device)
    q = pf.ops.quantize_4bit(weight, 64)
    absmax = q.absmax.cpu().repeat_interleave(64)[: weight.numel()].view(64, 130)
    levels = reference.quant_map("nf4")
    half_gap = (levels[1:] - levels[:-1]).max() / 2 + 1e-6
    assert ((pf.ops.dequantize_4bit(q).cpu() - weight.cpu()).abs() <= absmax * half_gap).all()
