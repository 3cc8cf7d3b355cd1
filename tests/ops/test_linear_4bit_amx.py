"""The AMX kernel's own source with its instructions in plain C++ (tests/native/amx_twin.cpp), on any machine, against fp64."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import pyfastpeft as pf
from pyfastpeft._native import _C
from pyfastpeft.build_info import CPU_ISAS
from pyfastpeft.reference import nf4 as reference_nf4

ROOT = Path(__file__).resolve().parents[2]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
FLAGS = {"avx2": AVX2, "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"]}


# without AVX-512 the columns are not shuffled and W is decoded value by value: both ways where the machine has it
@pytest.fixture(scope="module", params=list(FLAGS))
def twin(request, tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    if CPU_ISAS.index(request.param) > CPU_ISAS.index(_C.detected_cpu_isa()):
        pytest.skip(f"this machine has no {request.param}")
    out = tmp_path_factory.mktemp("twin") / "twin.so"
    flags = FLAGS[request.param]
    command = ["g++", "-std=c++17", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-shared", "-fPIC", *flags]
    source = ROOT / "tests" / "native" / "amx_twin.cpp"
    done = subprocess.run([*command, f"-I{ROOT / 'csrc'}", source, "-o", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(out))


def _address(t):
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def _size(value):
    return ctypes.c_int64(value)


def _panel(twin, x, q, bias, s, b, parts=1):
    N, K = q.shape
    y = torch.full((x.shape[0], N), torch.nan, dtype=torch.bfloat16)
    packed, absmax, nested_absmax, nested_map, offset = q.flat()[:5]
    nested = nested_absmax is not None
    twin.panel_amx_twin(
        _address(packed), _address(None if nested else absmax), _address(absmax if nested else None),
        _address(nested_absmax), _address(nested_map), _address(offset), _size(N), _size(K), _size(q.blocksize),
        ctypes.c_int(q.quant_type == "fp4"), _address(x), _size(x.shape[0]), _address(bias), _address(s), _address(b),
        _size(0 if s is None else s.shape[1]), _size(parts), _address(y),
    )  # fmt: skip
    return y


# M, N, K, R, blocksize: one tile; less than one; tails of every side; whole groups with half a chunk left; more than one
# panel and chunk; blocks over rows; odd K
CASES = [
    (16, 16, 128, 0, 64), (1, 1, 1, 1, 32), (17, 33, 64, 5, 64), (40, 50, 192, 16, 64), (70, 150, 576, 35, 128),
    (33, 20, 260, 4, 64), (5, 37, 65, 3, 128), (48, 130, 320, 7, 4096), (20, 9, 1100, 2, 256), (0, 5, 64, 1, 64),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["randn", "gelu"])
@pytest.mark.parametrize("case", CASES)
def test_against_fp64(twin, case, kind):
    M, N, K, R, blocksize = case
    x = torch.randn(M, K)
    x = (torch.nn.functional.gelu(x) if kind == "gelu" else x).bfloat16()
    for quant_type, nested in (("nf4", False), ("fp4", True)):
        q = pf.ops.quantize_4bit(torch.randn(N, K) / K**0.5, blocksize, quant_type, nested)
        dense = reference_nf4.dequantize_4bit(*q.flat()[:-1], torch.float32)
        bias = torch.randn(N) if N % 2 else None
        s, b = (torch.randn(M, R), torch.randn(N, R)) if R else (None, None)
        exact, limit = x.double() @ dense.double().t(), x.abs().double() @ dense.abs().double().t()
        torchs = x @ dense.bfloat16().t()
        for t, left, right in ((s, s, b), (bias, None, None)):
            if t is not None:
                add = bias.double() if left is None else left.double() @ right.double().t()
                exact, limit = exact + add, limit + (add.abs() if left is None else left.abs() @ right.abs().t())
                torchs = torchs + (bias.bfloat16() if left is None else left.bfloat16() @ right.bfloat16().t())
        y = _panel(twin, x, q, bias, s, b)
        assert ((y.double() - exact).abs() <= 2**-7 * limit + 1e-30).all()
        if y.numel() > 500:
            assert (y.double() - exact).norm() <= 2 * (torchs.double() - exact).norm()
        for parts in (2, 3):
            assert torch.equal(_panel(twin, x, q, bias, s, b, parts), y)


def _backward(twin, grad, q, ds, a, parts=1):
    N, K = q.shape
    grad_x = torch.full((grad.shape[0], K), torch.nan, dtype=torch.bfloat16)
    packed, absmax, nested_absmax, nested_map, offset = q.flat()[:5]
    nested = nested_absmax is not None
    twin.backward_amx_twin(
        _address(packed), _address(None if nested else absmax), _address(absmax if nested else None),
        _address(nested_absmax), _address(nested_map), _address(offset), _size(N), _size(K), _size(q.blocksize),
        ctypes.c_int(q.quant_type == "fp4"), _address(grad), _size(grad.shape[0]), _address(ds), _address(a),
        _size(0 if ds is None else ds.shape[1]), _size(parts), _address(grad_x),
    )  # fmt: skip
    return grad_x


@pytest.mark.parametrize("kind", ["randn", "gelu"])
@pytest.mark.parametrize("case", [*CASES, (150, 290, 192, 33, 64)])  # more tokens than a block, more terms than a chunk
def test_backward_against_fp64(twin, case, kind):
    M, N, K, R, blocksize = case
    grad = torch.randn(M, N)
    grad = (torch.nn.functional.gelu(grad) if kind == "gelu" else grad).bfloat16()
    for quant_type, nested in (("nf4", False), ("fp4", True)):
        q = pf.ops.quantize_4bit(torch.randn(N, K) / N**0.5, blocksize, quant_type, nested)
        dense = reference_nf4.dequantize_4bit(*q.flat()[:-1], torch.float32)
        ds, a = (torch.randn(M, R), torch.randn(R, K)) if R else (None, None)
        exact, limit = grad.double() @ dense.double(), grad.abs().double() @ dense.abs().double()
        torchs = grad @ dense.bfloat16()
        if R:
            exact, limit = exact + ds.double() @ a.double(), limit + ds.abs() @ a.abs()
            torchs = torchs + ds.bfloat16() @ a.bfloat16()
        got = _backward(twin, grad, q, ds, a)
        # half an eps of 2^-7 each: dS, A (or W) and the result
        assert ((got.double() - exact).abs() <= 1.02 * 3 * 2**-8 * limit + 1e-30).all()
        if got.numel() > 500:
            assert (got.double() - exact).norm() <= 2 * (torchs.double() - exact).norm()
        for parts in (2, 3):
            assert torch.equal(_backward(twin, grad, q, ds, a, parts), got)


def test_backward_of_every_code_at_every_place(twin):
    levels = reference_nf4.quant_map("nf4")
    for N, K in ((160, 320), (67, 70)):
        weight = levels[(torch.arange(N)[:, None] * 5 + torch.arange(K)[None, :]) % 16]
        q = pf.ops.quantize_4bit(weight, 64)
        grad_x = _backward(twin, torch.eye(N).bfloat16(), q, None, None)
        assert torch.equal(grad_x, pf.ops.dequantize_4bit(q, dtype=torch.bfloat16))


def test_every_code_at_every_place(twin):
    levels = reference_nf4.quant_map("nf4")
    K = 320
    weight = levels[(torch.arange(160)[:, None] * 5 + torch.arange(K)[None, :]) % 16]
    q = pf.ops.quantize_4bit(weight, 64)
    y = _panel(twin, torch.eye(K).bfloat16(), q, None, None, None)
    assert torch.equal(y, pf.ops.dequantize_4bit(q, dtype=torch.bfloat16).t())


def test_the_instruction(twin):
    """TDPBF16PS: sums of even and of odd products in the order of pairs, flushed subnormals, rounding to nearest even."""

    def dot(c, a, b):
        c, a, b = c.clone(), a.bfloat16().contiguous(), b.bfloat16().contiguous()
        twin.tdpbf16ps_twin(_address(c), _address(a), _address(b))
        return c

    c, a, b = torch.randn(16, 16), torch.randn(16, 32), torch.randn(16, 16, 2)
    exact = c.double() + torch.einsum("mkp,knp->mn", a.bfloat16().double().view(16, 16, 2), b.bfloat16().double())
    torch.testing.assert_close(dot(c, a, b).double(), exact, rtol=1e-5, atol=1e-5)
    zero, a, b = torch.zeros(16, 16), torch.zeros(16, 32), torch.ones(16, 16, 2)
    a[0, :4] = torch.tensor([2.0**24, -1.0, 1.0, 2.0**24])  # each half rounds away its 1: even 2^24 + 1, odd 2^24 - 1
    a[1, 14:16], b[7] = 2.0**-130, 2.0**100  # subnormal operands
    a[2, 0], b[0, 5, 0] = 2.0**-100, 2.0**-40  # a subnormal product
    a[3, 0] = 1.0
    got = dot(zero + (torch.arange(16) == 3)[:, None] * 2.0**24, a, b)
    assert got[0, 0] == 2.0**25 and not got[1].any() and got[2, 5] == 0 and got[2, 4] == 2.0**-100
    assert got[3, 0] == 2.0**24  # a tie goes to even
