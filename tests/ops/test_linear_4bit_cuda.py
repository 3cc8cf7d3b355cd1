"""linear_4bit's CUDA kernels: every tail of M, N and K, every format, the low-rank path, batch invariance, bad input."""

import pytest
import torch
from linear_cases import assert_as_exact_as_torch, inputs, run, torch_at_dtype, truth

import pyfastpeft as pf
from pyfastpeft.ops import nf4_matmul_cuda
from pyfastpeft.reference import nf4 as reference_nf4

pytestmark = pytest.mark.parametrize("device", ["emulated", "cuda"], indirect=True)
NAMES = ("y", "x", "bias", "lora_a", "lora_b")
SEED = 0x1234_5678_9ABC
HALVES = [torch.bfloat16, torch.float16]


def check(device, case, dtype, options=(1.0, 0.0), quant_type="nf4", double_quant=True, kind="randn", low_rank=True):
    """Values and every gradient of one shape, against fp64 of the dequantised weight; error at most twice torch's."""
    *shape, blocksize = case
    x, weight, bias, a, b, grad = inputs(shape, dtype, torch.float32, kind)
    q = pf.ops.quantize_4bit(weight.float().to(device), blocksize, quant_type, double_quant)
    tensors = [x, bias, a, b] if low_rank else [x, bias, None, None]
    seed = torch.tensor([SEED])
    moved = [None if t is None else t.detach().to(device).requires_grad_() for t in tensors]
    arguments = (*options, seed.to(device) if options[1] else None)
    wanted = [t is not None for t in tensors]
    got = run(lambda x, *rest: pf.ops.linear_4bit(x, q, *rest, *arguments), moved, grad.to(device), wanted)
    flat = (t.cpu() if isinstance(t, torch.Tensor) else t for t in q.flat()[:-1])
    dense = reference_nf4.dequantize_4bit(*flat, torch.float32)
    all_tensors, all_wanted = [x, dense, *tensors[1:]], [True, False, *wanted[1:]]
    options = (*options, seed if options[1] else None)
    exact, peers = (
        [r for i, r in enumerate(f(all_tensors, grad, *options, wanted=all_wanted)) if i != 2]
        for f in (truth, torch_at_dtype)
    )
    got = [None if g is None else g.cpu() for g in got]
    assert_as_exact_as_torch(got, peers, exact, dtype, NAMES)


@pytest.fixture
def kernels(monkeypatch):
    """The kernels that forward() chooses, in order."""
    chosen = []
    original = nf4_matmul_cuda._kernel

    def spy(*args):
        chosen.append(original(*args))
        return chosen[-1]

    monkeypatch.setattr(nf4_matmul_cuda, "_kernel", spy)
    return chosen


# N, K, blocksize: less than a warp's share; beyond one chunk of 1024; more chunks than warps; steps of the grid
@pytest.mark.parametrize("shape", [(5, 32, 32), (70, 1056, 64), (3, 17 * 1024 + 64, 64), (300, 96, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matvec(device, shape, dtype, kernels):
    N, K, blocksize = shape
    M = 1 if dtype != torch.float32 or device.emulated else 3
    check(device, (M, N, K, 8, blocksize), dtype, low_rank=dtype == torch.bfloat16)
    assert set(kernels) == {"matvec"}


# M, N, K, blocksize: one row too many for matvec; tails of every tile; parts of K; all rows a launch takes
@pytest.mark.parametrize("case", [(2, 5, 32, 32), (9, 130, 288, 64), (17, 33, 2080, 128), (64, 20, 96, 64)])
@pytest.mark.parametrize("dtype", HALVES)
def test_matmul(device, case, dtype, kernels):
    M, N, K, blocksize = case
    check(device, (M, N, K, 5, blocksize), dtype)
    assert set(kernels) == {"matmul"}


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_formats(device, M, quant_type, double_quant):
    for blocksize in (32, 256) if device.emulated else (32, 64, 256, 4096):
        check(device, (M, 20, 320, 2, blocksize), torch.bfloat16, (1.0, 0.0), quant_type, double_quant, low_rank=False)


@pytest.mark.parametrize("rank", [1, 8, 17])
@pytest.mark.parametrize("M", [1, 4, 70])
def test_low_rank_path(device, M, rank):
    check(device, (M, 24, 64, rank, 64), torch.bfloat16, (0.5, 0.3), kind="gelu")


@pytest.mark.parametrize("M", [1, 4, 66])
def test_inputs_whose_mean_is_not_zero(device, M):
    check(device, (M, 24, 512, 4, 64), torch.bfloat16, kind="gelu", low_rank=False)


@pytest.mark.parametrize("K", [33, 47, 48])
def test_rows_that_are_no_multiple_of_32_values_are_dequantised(device, K, kernels):
    for M in (1, 5):
        check(device, (M, 21, K, 3, 32), torch.bfloat16)
    assert set(kernels) == {"dequantise"}


def test_strided_and_misaligned_inputs(device):
    generator = torch.Generator().manual_seed(0)
    q = pf.ops.quantize_4bit(torch.randn(24, 96, generator=generator).to(device), double_quant=True)
    for M in (1, 5):
        x = torch.randn(M, 2 * 96, generator=generator).to(device, torch.bfloat16)[:, ::2]
        expected = pf.ops.linear_4bit(x.contiguous(), q)
        assert torch.equal(pf.ops.linear_4bit(x, q), expected)
        shifted = torch.empty(M * 96 + 1, dtype=torch.bfloat16, device=device)[1:].view(M, 96).copy_(x)
        assert shifted.data_ptr() % 16 and torch.equal(pf.ops.linear_4bit(shifted, q), expected)
        bytes_ = torch.empty(q.packed.numel() + 4, dtype=torch.uint8, device=device)[4:].view(-1, 1).copy_(q.packed)
        got = torch.ops.pyfastpeft.linear_4bit(x, bytes_, *q.flat()[1:], None, None, None, 1.0, 0.0, None)
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)  # another kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batch_invariance(device, dtype):
    generator = torch.Generator().manual_seed(1)
    q = pf.ops.quantize_4bit(torch.randn(20, 1088, generator=generator).to(device), double_quant=True)
    x = torch.randn(66, 1088, generator=generator).to(device, dtype)
    with nf4_matmul_cuda.batch_invariant():
        together = pf.ops.linear_4bit(x[:3] if dtype == torch.float32 else x, q, None)
        for m in (0, 2) if dtype == torch.float32 else (0, 7, 65):
            assert torch.equal(pf.ops.linear_4bit(x[m : m + 1], q, None), together[m : m + 1])
        odd = pf.ops.quantize_4bit(torch.randn(4, 33).to(device))
        with pytest.raises(RuntimeError, match="batch_invariant is on, and rows of 33 values"):
            pf.ops.linear_4bit(torch.randn(1, 33).to(device, dtype), odd)


def test_ia3_scale_in_the_epilogue(device):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(24, 64, generator=generator).to(device)
    q = pf.ops.quantize_4bit(weight, double_quant=True)
    flat = q.flat()
    scale, bias = torch.randn(24, generator=generator).to(device), torch.randn(24, generator=generator).to(device)
    for M in (1, 5, 70):
        x = torch.randn(M, 64, generator=generator).to(device, torch.bfloat16)
        w = nf4_matmul_cuda.Weight(*flat[:7], 24, 64)
        got = nf4_matmul_cuda.forward(w, x, bias, None, None, 1.0, 0.0, None, scale)
        truth = (x.double() @ pf.ops.dequantize_4bit(q).double().t() + bias.double()) * scale.double()
        assert (got.double() - truth).norm() <= 6e-3 * truth.norm()


def test_the_kernel_for_each_capability(device):
    assert nf4_matmul_cuda.switch((7, 5)).matmul == 0
    assert nf4_matmul_cuda.switch((9, 0)) == nf4_matmul_cuda.switch((8, 0))
    assert nf4_matmul_cuda.switch((12, 0)).matmul == 64
    assert nf4_matmul_cuda.switch((7, 0)) == nf4_matmul_cuda.switch((7, 5))
