"""linear_4bit's CUDA kernels: every tail of M, N and K, every format, the low-rank path, batch invariance, bad input."""

import pytest
import torch
from linear_cases import assert_as_exact_as_torch, inputs, run, torch_at_dtype, truth

import pyfastpeft as pf
from pyfastpeft.ops import _cuda, _linear_cuda, nf4_matmul_cuda
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


# One row and up to 8 ranks without dropout: S is made in the launch; up to 16, B's values are asked for ahead
@pytest.mark.parametrize("rank, dropout_p", [(1, 0.0), (8, 0.0), (8, 0.3), (13, 0.0), (17, 0.3), (64, 0.0)])
@pytest.mark.parametrize("M", [1, 4, 70])
def test_low_rank_path(device, M, rank, dropout_p):
    check(device, (M, 22, 64, rank, 64), torch.bfloat16, (0.5, dropout_p), kind="gelu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("K", [1056, 16 * 1024 + 96])
def test_s_made_by_the_matvec_launch(device, K, dtype, monkeypatch):
    """Of all chunks of x, also where a warp has several; the launch of its own is not called."""
    generator = torch.Generator().manual_seed(3)
    x, a = torch.randn(1, K, generator=generator).to(dtype), torch.randn(7, K, generator=generator) / K**0.5
    b, weight = torch.randn(6, 7, generator=generator), torch.zeros(6, K)
    x, a, b = (t.to(device) for t in (x, a, b))
    q = pf.ops.quantize_4bit(weight.to(device))
    truth = 0.5 * (x.double() @ a.double().t()) @ b.double().t()
    for factors in ((a, b), (a.double().to(dtype), b)):
        monkeypatch.setattr(_linear_cuda, "shrink", None)
        got = pf.ops.linear_4bit(x, q, None, *factors, 0.5)
        monkeypatch.undo()
        rounding = 2 * torch.finfo(dtype).eps
        assert (got.double() - truth).norm() <= rounding * truth.norm()
    apart = pf.ops.linear_4bit(x, q, None, a.t().contiguous().t(), b.t().contiguous().t(), 0.5)
    torch.testing.assert_close(apart.double(), truth, rtol=4 * rounding, atol=4 * rounding)


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
        with pytest.raises(RuntimeError, match="batch_invariant is on and this is a weight with rows of 33 values"):
            pf.ops.linear_4bit(torch.randn(1, 33).to(device, dtype), odd)


def test_batch_invariance_of_the_low_rank_path(device):
    generator = torch.Generator().manual_seed(1)
    K = 320
    q = pf.ops.quantize_4bit(torch.randn(6, K, generator=generator).to(device), double_quant=True)
    x = torch.randn(35, K, generator=generator).to(device, torch.bfloat16)
    factors = [t.to(device) for t in (torch.randn(5, K, generator=generator), torch.randn(6, 5, generator=generator))]
    with pf.ops.batch_invariant():
        together = pf.ops.linear_4bit(x, q, None, *factors)
        for m in (0, 33):
            assert torch.equal(pf.ops.linear_4bit(x[m : m + 1], q, None, *factors), together[m : m + 1])
        shifted = torch.empty(q.packed.numel() + 4, dtype=torch.uint8, device=device)[4:].view(-1, 1).copy_(q.packed)
        flat = (*q.flat()[1:], None, *factors, 1.0, 0.0, None)
        assert torch.equal(torch.ops.pyfastpeft.linear_4bit(x[:3], shifted, *flat), together[:3])
    assert not nf4_matmul_cuda._batch_invariant


def test_ia3_scale_in_the_epilogue(device):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(24, 64, generator=generator).to(device)
    q = pf.ops.quantize_4bit(weight, double_quant=True)
    flat = q.flat()
    scale, bias = torch.randn(24, generator=generator).to(device), torch.randn(24, generator=generator).to(device)
    for M in (1, 5, 70):
        x = torch.randn(M, 64, generator=generator).to(device, torch.bfloat16)
        w = nf4_matmul_cuda.Weight(*flat[:7], 24, 64)
        got, _ = nf4_matmul_cuda.forward(w, x, bias, None, None, 1.0, 0.0, None, scale)
        truth = (x.double() @ pf.ops.dequantize_4bit(q).double().t() + bias.double()) * scale.double()
        assert (got.double() - truth).norm() <= 6e-3 * truth.norm()


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_before_tensor_cores_w_is_dequantised(device, M, dtype, kernels, monkeypatch):
    monkeypatch.setattr(_cuda, "capability", lambda tensor: (7, 5))
    check(device, (M, 21, 64, 3, 32), dtype)
    assert set(kernels) == {"dequantise"}


def test_no_rows(device, kernels):
    q = pf.ops.quantize_4bit(torch.randn(5, 64).to(device))
    for shape in ((0, 64), (2, 0, 64)):
        assert pf.ops.linear_4bit(torch.randn(shape, device=device), q).shape == (*shape[:-1], 5)
    assert not kernels
    none = pf.ops.quantize_4bit(torch.randn(5, 0).to(device))
    bias = torch.randn(5, device=device)
    assert torch.equal(pf.ops.linear_4bit(torch.empty(2, 0, device=device), none, bias), bias.expand(2, 5))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"K": 48}, "the fused kernels take rows of a multiple of 32 values, got K = 48"),
        ({"M": 65, "x_numel": 65 * 64}, "M is 65, expected 0 to 64"),
        ({"x": 8}, "packed and x must begin at multiples of 16 bytes"),
        ({"x_numel": 63}, "x has 63 values, expected 64"),
        ({"y_numel": 7}, "y has 7 values, expected 5"),
        ({"dtype": 3}, "dtype code is 3"),
        ({"R": 2, "b_numel": 10, "b_row_stride": 2, "b_rank_stride": 1, "s_numel": 3}, "s has 3 values, expected 2"),
        (
            {"R": 2, "b_numel": 10, "b_row_stride": 3, "b_rank_stride": 1, "s": 16, "s_numel": 2},
            "lora_b has strides 3, 1",
        ),
        ({"R": 1, "b_numel": 5, "b_row_stride": 1, "b_rank_stride": 1, "a": 16, "a_numel": 64}, "lora_a of 1 ranks"),
        ({"bias": 16, "bias_numel": 4}, "bias has 4 values, expected 5"),
        ({"scale": 16, "scale_numel": 4}, "scale has 4 values, expected 5"),
        ({"workspace_numel": 9}, "workspace has 9 values, expected 0"),
        ({"packed_numel": 159}, "packed has 159 values, expected 160"),
        ({"blocksize": 48}, "blocksize is 48"),
    ],
)
def test_bad_sizes_at_the_binding(device, change, message):
    x, y = torch.zeros(1, 64, device=device), torch.zeros(1, 5, device=device)
    q = pf.ops.quantize_4bit(torch.zeros(5, 64, device=device))
    module, index, stream = _cuda.target(x, "linear_4bit")
    good = {
        "packed": q.packed.data_ptr(), "packed_numel": 160, "absmax": q.absmax.data_ptr(), "absmax_numel": 5,
        "nested_absmax": 0, "nested_numel": 0, "nested_map": 0, "map_numel": 0, "offset": 0, "N": 5, "K": 64,
        "blocksize": 64, "quant_type": "nf4", "x": x.data_ptr(), "x_numel": 64, "M": 1, "dtype": 0, "s": 0, "s_numel": 0,
        "a": 0, "a_numel": 0, "a_scaling": 1.0, "b": 0, "b_numel": 0, "b_row_stride": 0, "b_rank_stride": 0, "R": 0,
        "bias": 0, "bias_numel": 0, "scale": 0, "scale_numel": 0, "workspace": 0, "workspace_numel": 0,
        "y": y.data_ptr(), "y_numel": 5, "device": index, "stream": stream,
    }  # fmt: skip
    if change.get("K") == 48:
        change = {**change, "x_numel": 48, "packed_numel": 120, "absmax_numel": 4}
    with pytest.raises(ValueError, match=message):
        module.nf4_matmul_cuda(**{**good, **change})


def test_the_kernel_for_each_capability(device):
    assert nf4_matmul_cuda.switch((7, 5)).matmul == 0
    assert nf4_matmul_cuda.switch((9, 0)) == nf4_matmul_cuda.switch((8, 0))
    assert nf4_matmul_cuda.switch((12, 0)).matmul == 64
    assert nf4_matmul_cuda.switch((7, 0)) == nf4_matmul_cuda.switch((7, 5))
