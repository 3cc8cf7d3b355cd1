"""linear_4bit's dX = dY·W + dS·A from the packed bytes: exact products, against fp64, its bits, its memory, bad input."""

import os

import pytest
import torch
from linear_cases import DTYPES, assert_as_exact_as_torch

import pyfastpeft as pf
from pyfastpeft._native import _C
from pyfastpeft.ops import nf4_matmul
from pyfastpeft.reference import nf4 as reference_nf4

NO_LORA = (None, None, 1.0, 0.0, None)
# M, N, K, R, blocksize: less than a tile of tokens, terms and columns; odd everything; whole groups of 64 columns and odd N;
# more terms than a chunk (128, 256); more tokens than a block (128) and a step (256); blocks over rows
CASES = [
    (1, 1, 1, 1, 32), (3, 7, 64, 0, 64), (13, 33, 65, 5, 64), (16, 257, 128, 16, 64), (37, 300, 320, 19, 128),
    (127, 64, 100, 33, 32), (128, 31, 64, 1, 4096), (131, 513, 130, 3, 64), (260, 40, 192, 8, 64), (525, 21, 192, 0, 512),
]  # fmt: skip


def _backward(grad, q, lora=NO_LORA):
    x = grad.new_empty(*grad.shape[:-1], q.shape[1])
    op = torch.ops.pyfastpeft.linear_4bit_backward
    return op(grad, x, *q.flat(), *lora, [True, False, False, False])[0]


def _case(case, dtype, kind="randn", nested=False, quant_type="nf4"):
    M, N, K, R, blocksize = case
    grad = torch.randn(M, N)
    grad = (torch.nn.functional.gelu(grad) if kind == "gelu" else grad).to(dtype)
    a, b = (torch.randn(R, K), torch.randn(N, R) / max(N, 1) ** 0.5) if R else (None, None)
    return grad, pf.ops.quantize_4bit(torch.randn(N, K) / max(N, 1) ** 0.5, blocksize, quant_type, nested), a, b


def _dense(q):
    return reference_nf4.dequantize_4bit(*q.flat()[:-1], torch.float32)


@pytest.mark.parametrize("kind", ["randn", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_against_fp64(case, dtype, kind, isa):
    grad, q, a, b = _case(case, dtype, kind, case[0] % 2 == 0, "nf4" if case[1] % 2 else "fp4")
    got, exact, peer = _backward(grad, q), grad.double() @ _dense(q).double(), grad @ _dense(q).to(dtype)
    assert_as_exact_as_torch([got], [peer], [exact], dtype, ["grad_x"])
    if a is not None:
        got = _backward(grad, q, (a, b, 0.5, 0.0, None))
        exact = exact + 0.5 * grad.double() @ b.double() @ a.double()
        peer = peer + 0.5 * (grad @ b.to(dtype)) @ a.to(dtype)
        assert_as_exact_as_torch([got], [peer], [exact], dtype, ["grad_x with LoRA"])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("K", [1, 2, 17, 64, 100, 192, 320])
def test_every_code_at_every_place(K, quant_type, isa):
    """dY picks one row at a time out of a weight that has every level in every column: the result is that row."""
    levels = reference_nf4.quant_map(quant_type).unique()
    N = 133
    weight = levels[(torch.arange(N)[:, None] * 5 + torch.arange(K)[None, :]) % len(levels)]
    weight[:, :1] = 1.0  # absmax of the first block
    for nested in (False, True):
        q = pf.ops.quantize_4bit(weight * torch.linspace(0.5, 2, N)[:, None], 64, quant_type, nested)
        for dtype in DTYPES:
            dense, one = pf.ops.dequantize_4bit(q, dtype=dtype), torch.eye(N, dtype=dtype)
            for M in (1, 7, 133):
                assert torch.equal(torch.cat([_backward(rows, q) for rows in one.split(M)]), dense)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [(7, 213, 192, 9, 64), (40, 70, 517, 3, 64), (300, 90, 130, 5, 128)])
def test_same_bits_on_every_thread_count(case, dtype, isa):
    grad, q, a, b = _case(case, dtype, nested=True)
    former, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 2):
            torch.set_num_threads(threads)
            results.append(_backward(grad, q, (a, b, 0.5, 0.0, None)))
    finally:
        torch.set_num_threads(former)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ["avx2", "avx512"], indirect=True)
def test_a_token_does_not_depend_on_its_batch(dtype, isa):
    grad, q, _, _ = _case((270, 150, 192, 0, 64), dtype)  # the low-rank dS has its own kernels by the number of rows
    whole = _backward(grad, q)
    for begin, end in ((0, 1), (3, 8), (11, 60), (0, 129), (256, 270)):
        assert torch.equal(_backward(grad[begin:end], q), whole[begin:end])


@pytest.mark.parametrize("M", [3, 40])
def test_strided_gradients(M, isa):
    q = pf.ops.quantize_4bit(torch.randn(33, 70), 64, double_quant=True)
    big = torch.randn(M, 6, 70).bfloat16()
    for grad in (big[:, ::2, :33], big.transpose(0, 1)[..., 1:67:2], big[:1, :, :33].expand(5, 6, 33), big[:0, 0, :33]):
        assert torch.equal(_backward(grad, q), _backward(grad.clone(memory_format=torch.contiguous_format), q))
        torch.testing.assert_close(_backward(grad, q).float(), grad.float() @ _dense(q), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("M, N, K", [(0, 5, 6), (4, 0, 70), (300, 0, 64), (4, 5, 0), (0, 0, 0)])
def test_empty_sides(M, N, K, isa):
    for dtype in DTYPES:
        q = pf.ops.quantize_4bit(torch.randn(N, K), 64)
        for dirt in (7.0, float("nan")):
            torch.full((1 << 16,), dirt)  # what fresh memory holds
            got = _backward(torch.ones(M, N, dtype=dtype), q, (torch.ones(2, K), torch.ones(N, 2), 1.0, 0.0, None))
            assert got.shape == (M, K) and got.dtype == dtype
            assert torch.equal(got, (torch.ones(M, N) @ (_dense(q) + 2)).to(dtype))


def test_what_is_not_finite_stays_in_its_token(isa):
    """Tokens and terms are filled up with zeros, never with what lay there; a NaN in dY reaches its own row alone."""
    grad, q, _, _ = _case((9, 37, 192, 0, 64), torch.bfloat16)
    expected = _backward(grad, q)
    grad[4, 36] = torch.nan
    got = _backward(grad, q)
    assert got[4].isnan().all()
    rest = [m for m in range(9) if m != 4]
    assert torch.equal(got[rest], expected[rest])


@pytest.mark.parametrize("M", [16, 600])
def test_dequantises_no_tile(M, monkeypatch):
    if _C.cpu_isa() == "scalar":
        pytest.skip("only the scalar instruction set goes through tiles")
    monkeypatch.setattr(nf4_matmul._Weight, "tile", None)
    grad, q, _, _ = _case((M, 70, 100, 0, 64), torch.float16)
    _backward(grad, q)


def test_runs_in_a_forked_child(isa):
    grad, q, a, b = _case((70, 213, 517, 4, 64), torch.bfloat16)
    expected = _backward(grad, q, (a, b, 1.0, 0.0, None))
    child = os.fork()
    if child == 0:  # as a DataLoader's worker: torch's own thread pool does not survive a fork
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(_backward(grad, q, (a, b, 1.0, 0.0, None)), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_bad_sizes():
    weight = nf4_matmul._Weight(*pf.ops.quantize_4bit(torch.ones(3, 64)).flat()[:7], 3, 64)
    t = torch.ones(300)
    good = [t.data_ptr(), 6, 2, t.data_ptr(), 4, t.data_ptr(), 128, 2, 0, t.data_ptr(), 128]
    for index, value, message in (
        (1, 5, "grad_output has 5 values, expected 6"),
        (4, 3, "ds has 3 values, expected 4"),
        (6, 127, "lora_a has 127 values, expected 128"),
        (8, 9, "dtype"),
        (9, 0, "grad_x"),
        (10, 127, "grad_x has 127 values, expected 128"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.nf4_backward_cpu(weight.view, *good[:index], value, *good[index + 1 :])
