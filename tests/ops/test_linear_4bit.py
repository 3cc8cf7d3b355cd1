"""linear_4bit: values and gradients against fp64 of the dequantised weight, on every instruction set and size of M."""

import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from linear_cases import DTYPES, assert_as_exact_as_torch, inputs, run, torch_at_dtype, truth

import pyfastpeft as pf
from pyfastpeft._native import _C
from pyfastpeft.ops import nf4_matmul
from pyfastpeft.reference import nf4 as reference_nf4

SEED = torch.tensor([0x1234_5678_9ABC])
NAMES = ("y", "x", "bias", "lora_a", "lora_b")
# M, N, K, R, blocksize: one of everything; blocks that straddle rows; odd N·K; whole blocks; one block over many rows
CASES = [
    (1, 1, 1, 1, 32),
    (1, 33, 47, 3, 64),
    (4, 64, 128, 8, 64),
    (8, 130, 96, 16, 32),
    (9, 21, 35, 5, 64),
    (34, 22, 35, 5, 64),
    (70, 128, 192, 16, 64),
    (31, 50, 1100, 7, 4096),
    (300, 37, 65, 4, 128),
]


def _dense(q):
    return reference_nf4.dequantize_4bit(*q.flat()[:-1], torch.float32)


def _drop_weight(results):
    return [r for i, r in enumerate(results) if i != 2]


def _check(tensors, grad, q, options, wanted=None):
    """tensors: x, bias, lora_a, lora_b."""
    wanted = wanted or [t is not None for t in tensors]
    got = run(lambda x, *rest: pf.ops.linear_4bit(x, q, *rest, *options), tensors, grad, wanted)
    dtype = tensors[0].dtype
    assert got[0].dtype == dtype
    for tensor, gradient in zip(tensors, got[1:], strict=True):
        assert gradient is None or gradient.dtype == tensor.dtype
    x, bias, a, b = tensors
    dense, all_wanted = _dense(q), [wanted[0], False, *wanted[1:]]
    exact = _drop_weight(truth([x, dense, bias, a, b], grad, *options, wanted=all_wanted))
    peers = _drop_weight(torch_at_dtype([x, dense, bias, a, b], grad, *options, wanted=all_wanted))
    assert_as_exact_as_torch(got, peers, exact, dtype, NAMES)


def _case(case, dtype, double_quant=False, quant_type="nf4", kind="randn", lora_dtype=torch.float32):
    *shape, blocksize = case
    x, weight, bias, a, b, grad = inputs(shape, dtype, lora_dtype, kind)
    q = pf.ops.quantize_4bit(weight.float(), blocksize, quant_type, double_quant)
    return [x, bias, a, b], grad, q


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, isa):
    tensors, grad, q = _case(case, dtype, double_quant=case[0] % 2 == 0)
    _check(tensors, grad, q, (0.5, 0.3, SEED))
    _check([tensors[0], tensors[1], None, None], grad, q, (1.0, 0.0, None))
    _check([tensors[0], None, None, None], grad, q, (1.0, 0.0, None))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("M", [2, 40])
def test_every_format(quant_type, double_quant, M, isa):
    for blocksize in (32, 64, 256, 4096):
        tensors, grad, q = _case((M, 70, 260, 4, blocksize), torch.bfloat16, double_quant, quant_type)
        _check(tensors, grad, q, (1.0, 0.0, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 8, 40])
def test_inputs_with_a_mean(dtype, M, isa):
    tensors, grad, q = _case((M, 96, 256, 8, 64), dtype, kind="gelu")
    _check(tensors, grad + 0.5, q, (1.0, 0.1, SEED))


@pytest.mark.parametrize("M", range(1, 20))
def test_every_small_number_of_rows(M, isa):
    tensors, grad, q = _case((M, 66, 160, 2, 64), torch.bfloat16)
    _check(tensors, grad, q, (1.0, 0.0, None))


@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("M", [3, 20])
def test_dtypes_of_bias_and_adapter(bias_dtype, M):
    for lora_dtype in DTYPES:
        tensors, grad, q = _case((M, 37, 45, 4, 64), torch.bfloat16, lora_dtype=lora_dtype)
        tensors[1] = tensors[1].to(bias_dtype)
        _check(tensors, grad, q, (1.0, 0.2, SEED))


@pytest.mark.parametrize("index", range(4))
def test_one_gradient_at_a_time(index):
    tensors, grad, q = _case((12, 37, 45, 4, 64), torch.float32)
    _check(tensors, grad, q, (1.0, 0.2, SEED), wanted=[i == index for i in range(4)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [5, 600])
@pytest.mark.parametrize("isa", ["scalar", "avx2"], indirect=True)  # dX by tiles: scalar alone
def test_many_tiles(dtype, M, isa, monkeypatch):
    """Tiles of a few rows and columns, and of fewer than a block."""
    monkeypatch.setattr(nf4_matmul, "TILE_BYTES", 3000)
    for case in ((M, 70, 96, 3, 64), (M, 33, 200, 3, 512)):
        tensors, grad, q = _case(case, dtype)
        _check(tensors, grad, q, (1.0, 0.0, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, K, blocksize", [(7, 96, 32), (7, 97, 64), (5, 640, 64), (40, 3, 4096)])
def test_tiles_are_parts_of_the_dequantised_weight(N, K, blocksize, dtype, isa):
    q = pf.ops.quantize_4bit(torch.randn(N, K), blocksize, double_quant=True)
    whole = pf.ops.dequantize_4bit(q, dtype=dtype)
    weight = nf4_matmul._Weight(*q.flat()[:7], N, K)
    for row, rows, col, cols in ((0, N, 0, K), (1, 3, 0, K), (0, N, K // 2, K - K // 2), (2, 1, 1, 1), (3, 0, 0, K)):
        buffer = torch.full((rows * cols + 8,), torch.nan, dtype=dtype)
        tile = weight.tile(row, rows, col, cols, buffer)
        assert torch.equal(tile, whole[row : row + rows, col : col + cols])
        assert buffer[rows * cols :].isnan().all()


# K and blocksize of rows that are whole groups of 64 values: less than a vector, a half vector left over, blocks over
# several rows, more columns than are taken at a time; N = 77 is neither a multiple of a tile's rows nor of a panel's
WHOLE = [(64, 64), (192, 64), (256, 128), (320, 4096), (2176, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K, blocksize", WHOLE)
def test_rows_of_whole_groups(K, blocksize, dtype, isa):
    for M, double_quant in ((1, True), (3, False), (nf4_matmul.matvec_rows(dtype), True)):
        tensors, grad, q = _case((M, 77, K, 19, blocksize), dtype, double_quant, "nf4" if M != 3 else "fp4")
        _check(tensors, grad, q, (0.5, 0.3, SEED))
        _check([tensors[0], None, None, None], grad, q, (1.0, 0.0, None))


@pytest.mark.parametrize("M", [1, 8])
def test_long_rows(M, isa):
    """One lane's sum over all columns loses bits that torch's blocked sums keep."""
    x, weight = torch.randn(M, 28672), torch.randn(128, 28672) / 100
    q = pf.ops.quantize_4bit(weight, 64)
    exact = x.double() @ _dense(q).double().t()
    errors = [
        ((y.double() - exact).norm() / exact.norm()).item() for y in (pf.ops.linear_4bit(x, q), x @ _dense(q).t())
    ]
    assert errors[0] <= max(2 * errors[1], 5e-7)


@pytest.mark.parametrize("M", [1, 7, 30])
@pytest.mark.parametrize("K", [192, 517])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_every_thread_count(M, K, dtype, isa):
    tensors, grad, q = _case((M, 213, K, 9, 64), dtype, double_quant=True)
    former = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(pf.ops.linear_4bit(tensors[0], q, *tensors[1:], 1.0, 0.3, SEED))
    finally:
        torch.set_num_threads(former)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("K, blocksize, quant_type", [(192, 64, "nf4"), (517, 128, "fp4"), (1100, 4096, "nf4")])
@pytest.mark.parametrize("isa", ["avx512", "amx"], indirect=True)
def test_panels(K, blocksize, quant_type, isa):
    """Tails of token groups, panels and chunks; the same bits on every thread count and in every batch of panels."""
    tensors, grad, q = _case((560, 213, K, 35, blocksize), torch.bfloat16, True, quant_type, "gelu")
    x, rest = tensors[0], tensors[1:]
    for M in (50, 83):
        _check([x[:M], *rest], grad[:M], q, (0.5, 0.3, SEED))
    former = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(pf.ops.linear_4bit(x, q, *rest))
    finally:
        torch.set_num_threads(former)
    assert all(torch.equal(results[0], other) for other in results[1:])
    # the low-rank S has its own kernels by the number of rows (csrc/lora/lora_cpu.cpp): without it
    assert torch.equal(pf.ops.linear_4bit(x[512:], q, rest[0]), pf.ops.linear_4bit(x, q, rest[0])[512:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, K", [(70, 260), (70, 192), (35, 1152)])
def test_a_token_does_not_depend_on_its_batch(N, K, dtype, isa):
    tensors, _, q = _case((nf4_matmul.matvec_rows(dtype), N, K, 4, 64), dtype, double_quant=True)
    x, rest = tensors[0], tensors[1:]
    whole = pf.ops.linear_4bit(x, q, *rest)
    for M in range(1, x.shape[0]):
        assert torch.equal(pf.ops.linear_4bit(x[:M], q, *rest), whole[:M])
    for m in range(x.shape[0]):
        assert torch.equal(pf.ops.linear_4bit(x[m], q, *rest), whole[m])


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (6,), (2, 3, 4, 6), (3, 5, 6)])
def test_any_number_of_dimensions(shape):
    q = pf.ops.quantize_4bit(torch.randn(5, 6), 32)
    x, grad = torch.randn(shape), torch.randn(*shape[:-1], 5)
    tensors = [x, torch.randn(5), torch.randn(2, 6), torch.randn(5, 2)]
    got = run(lambda x, *rest: pf.ops.linear_4bit(x, q, *rest), tensors, grad)
    exact = _drop_weight(truth([x, _dense(q), *tensors[1:]], grad, 1.0))
    for ours, true in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("M, N, K", [(4, 0, 5), (4, 3, 0), (30, 0, 5), (30, 3, 0), (0, 3, 5), (0, 0, 0)])
def test_empty_sides(M, N, K):
    q = pf.ops.quantize_4bit(torch.randn(N, K), 64)
    tensors = [torch.randn(M, K), torch.randn(N), torch.randn(2, K), torch.randn(N, 2)]
    grad = torch.randn(M, N)
    got = run(lambda x, *rest: pf.ops.linear_4bit(x, q, *rest), tensors, grad)
    exact = _drop_weight(truth([tensors[0], _dense(q), *tensors[1:]], grad, 1.0))
    for ours, true in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("M", [1, 24, 60])
def test_no_columns_leave_the_bias(M):
    q, bias = pf.ops.quantize_4bit(torch.randn(20, 0), 64), torch.randn(20).bfloat16()
    for dirt in (7.0, float("nan")):
        torch.full((1 << 20,), dirt)  # what fresh memory holds
        y = pf.ops.linear_4bit(torch.randn(M, 0).bfloat16(), q, bias)
        assert torch.equal(y, bias.expand(M, 20))


def test_strided_views():
    big = torch.randn(40, 6, 70)
    q = pf.ops.quantize_4bit(torch.randn(9, 33), 64)
    tail = [torch.randn(18)[::2], torch.randn(33, 4).t(), torch.randn(4, 9).t()]
    for x in (big[:, ::2, :33], big.transpose(0, 1)[..., 1:67:2], big[0, :, :33], big[:1, :, :33].expand(5, 6, 33)):
        grad = torch.randn(1).expand(*x.shape[:-1], 9)
        got = run(lambda x, *rest: pf.ops.linear_4bit(x, q, *rest), [x, *tail], grad)
        exact = _drop_weight(truth([x, _dense(q), *tail], grad, 1.0))
        for ours, true in zip(got, exact, strict=True):
            torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-4)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_call(data):
    """Any shape, strides, dtype, format and instruction set, against fp64."""
    draw = data.draw
    former = _C.cpu_isa()
    names = ["scalar", "avx2", "avx512", "amx"]
    isa = draw(st.sampled_from(names[: names.index(_C.detected_cpu_isa()) + 1]))
    # dX is made for 128 tokens and 128 or 256 rows of W at a time
    M, N = (
        draw(st.one_of(st.integers(0, 70), st.integers(120, 270))),
        draw(st.one_of(st.integers(0, 80), st.integers(125, 260))),
    )
    K = draw(st.one_of(st.integers(0, 150), st.integers(0, 6).map(lambda groups: 64 * groups)))
    R = draw(st.sampled_from([0, 1, 7, 16, 19]))
    dtype, kind = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["randn", "gelu"]))
    q = pf.ops.quantize_4bit(
        torch.randn(N, K) / max(K, 1) ** 0.5, draw(st.sampled_from([32, 64, 128, 512])),
        draw(st.sampled_from(["nf4", "fp4"])), draw(st.booleans()),
    )  # fmt: skip
    step, offset = draw(st.sampled_from([1, 2])), draw(st.integers(0, 3))
    x = torch.randn(M, offset + step * K)
    x = (torch.nn.functional.gelu(x) if kind == "gelu" else x).to(dtype)[:, offset::step][:, :K]
    bias = torch.randn(N).to(draw(st.sampled_from(DTYPES))) if draw(st.booleans()) else None
    a, b = (torch.randn(R, K) / max(K, 1) ** 0.5, torch.randn(R, N).t()) if R else (None, None)
    options = (0.5, draw(st.sampled_from([0.0, 0.3])), SEED) if R else (1.0, 0.0, None)
    step, offset = draw(st.sampled_from([1, 2])), draw(st.integers(0, 3))
    grad, leaf = torch.randn(M, offset + step * N).to(dtype)[:, offset::step][:, :N], x.requires_grad_()
    _C.force_cpu_isa(isa)
    try:
        y = pf.ops.linear_4bit(leaf, q, bias, a, b, *options)
        (grad_x,) = torch.autograd.grad(y, leaf, grad)
    finally:
        _C.force_cpu_isa(former)
    # rounding W and y to the dtype costs half an eps each of the sum of magnitudes; grad_x is rounded twice
    # (an fp32 sum of 150 terms, torch's too: a little over one eps of it)
    factor = 4 if dtype == torch.float32 else 2
    limits = _results([t if t is None else t.abs() for t in (x, _dense(q), bias, a, b)], grad.abs(), options)
    exact = _results([x, _dense(q), bias, a, b], grad, options)
    for ours, true, limit in zip((y, grad_x), exact, limits, strict=True):
        assert ours.dtype == dtype
        excess = (ours.double() - true).abs() - factor * torch.finfo(dtype).eps * limit
        assert excess.numel() == 0 or excess.max() <= 1e-7


def _results(tensors, grad, options):
    """y and grad_x in fp64."""
    return truth([None if t is None else t.detach() for t in tensors], grad, *options)[:2]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("K", [1, 2, 17, 64, 100, 128, 192, 320])
def test_every_code_at_every_place(K, quant_type, isa):
    """x picks one column at a time out of a weight that has every level in every column: the result is that column."""
    levels = reference_nf4.quant_map(quant_type).unique()
    place = torch.arange(32)[:, None] * 5 + torch.arange(K)[None, :]
    weight = levels[place % len(levels)]
    weight[:, :1] = 1.0  # absmax of the first block
    q = pf.ops.quantize_4bit(weight, 64, quant_type)
    for dtype in DTYPES:
        dense = pf.ops.dequantize_4bit(q, dtype=dtype)
        one = torch.eye(K, dtype=dtype)
        for M in (1, 2, 7, 100):
            y = torch.cat([pf.ops.linear_4bit(rows, q) for rows in one.split(M)])
            assert torch.equal(y, dense.t())


# ---- what it keeps and allocates -------------------------------------------------------------------------------------


def test_saves_the_input_only_for_lora():
    tensors, _, q = _case((50, 20, 30, 4, 64), torch.bfloat16)
    x, bias, a, b = tensors
    x = x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pf.ops.linear_4bit(x, q, bias)
        pf.ops.linear_4bit(x, q, bias, a, b)
        assert x.data_ptr() not in {t.data_ptr() for t in saved}
        pf.ops.linear_4bit(x, q, bias, a, b.requires_grad_())  # B's gradient wants S, not x
        assert x.data_ptr() not in {t.data_ptr() for t in saved}
        assert (torch.float32, (50, 4)) in {(t.dtype, tuple(t.shape)) for t in saved}
        pf.ops.linear_4bit(x, q, bias, a.requires_grad_(), b)
        assert x.data_ptr() in {t.data_ptr() for t in saved}
    assert all(t.dtype != torch.float32 or t.numel() < 20 * 30 for t in saved)  # no dense weight


def _peak_growth(function) -> int:
    """Bytes the process's peak resident memory rises above what it holds before."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("this system does not let a process reset its memory peak")

    def status(key):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

    before = status("VmRSS")
    function()
    return status("VmHWM") - before


@pytest.mark.parametrize("M", [4, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_holds_the_dequantised_weight(M, dtype):
    N, K = 8192, 4096  # large beside the decoded tiles and torch's copy of them: 16 MiB, whatever the weight's size
    q = pf.ops.quantize_4bit(torch.randn(1024, K).to(torch.bfloat16).repeat(8, 1), 64)
    x, grad = torch.randn(M, K).to(dtype).requires_grad_(), torch.randn(M, N).to(dtype)
    a, b = torch.randn(8, K).requires_grad_(), torch.randn(N, 8).requires_grad_()

    def step():
        pf.ops.linear_4bit(x, q, None, a, b).backward(grad)

    step()  # the threads' own memory, torch's caches
    assert _peak_growth(step) < N * K * dtype.itemsize // 2


def test_the_weight_is_left_alone():
    tensors, grad, q = _case((40, 8, 70, 2, 64), torch.bfloat16, double_quant=True)
    copies = {name: t.clone() for name, t in q.tensors().items()}
    for M in (2, 12, 40):
        run(lambda x, *rest, M=M: pf.ops.linear_4bit(x[:M], q, *rest), tensors, grad[:M])
    assert all(torch.equal(t, copies[name]) for name, t in q.tensors().items())


def test_runs_in_a_forked_child():
    tensors, grad, q = _case((12, 213, 517, 4, 64), torch.bfloat16)
    expected = pf.ops.linear_4bit(tensors[0][:8], q)
    child = os.fork()
    if child == 0:  # as a DataLoader's worker: torch's own thread pool does not survive a fork
        torch.set_num_threads(1)
        good = torch.equal(pf.ops.linear_4bit(tensors[0][:8], q), expected)
        run(lambda x, *rest: pf.ops.linear_4bit(x, q, *rest), tensors, grad)
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(2, 64, dtype=torch.float64)}, TypeError, "x has dtype torch.float64, expected float32"),
        ({"x": torch.ones(2, 63)}, ValueError, r"x has shape \(2, 63\), expected \[..., 64\] for a weight \[3, 64\]"),
        ({"x": torch.ones(2, 64, device="meta")}, ValueError, "the weight is on cpu, x is on meta"),
        ({"q": torch.ones(3, 64)}, TypeError, "q is a Tensor, expected a QuantizedTensor"),
        ({"bias": torch.ones(4)}, ValueError, r"bias has shape \(4,\), expected \(3,\)"),
        ({"lora_a": None}, ValueError, "lora_a is None, expected both"),
        ({"lora_b": None}, ValueError, "lora_b is None, expected both"),
        ({"lora_a": torch.ones(64, 2)}, ValueError, r"lora_a has shape \(64, 2\), expected \[R, 64\]"),
        ({"lora_b": torch.ones(2, 3)}, ValueError, r"lora_b has shape \(2, 3\), expected \[3, 2\]"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5, expected a probability from 0 to 1"),
        ({"lora_a": None, "lora_b": None, "dropout_p": 0.5}, ValueError, "dropout_p is 0.5 without lora_a and lora_b"),
        ({"dropout_p": 0.5, "seed": torch.ones(1)}, ValueError, "seed is torch.float32"),
    ],
)
def test_bad_input(change, error, message):
    good = {
        "x": torch.ones(2, 64), "q": pf.ops.quantize_4bit(torch.ones(3, 64)), "bias": torch.ones(3),
        "lora_a": torch.ones(2, 64), "lora_b": torch.ones(3, 2),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        pf.ops.linear_4bit(**{**good, **change})


@pytest.mark.parametrize("M", [2, 40])
def test_bad_flat_weight(M):
    q = pf.ops.quantize_4bit(torch.ones(3, 64), double_quant=True)
    op = torch.ops.pyfastpeft.linear_4bit
    x, tail = torch.ones(M, 64), (None, None, None, 1.0, 0.0, None)
    good = list(q.flat())
    for index, value, error, message in [
        (0, q.packed[:-1], ValueError, "packed has 95 values, expected 96"),
        (0, q.packed.float(), TypeError, "linear_4bit: packed has dtype torch.float32, expected torch.uint8"),
        (1, q.absmax[:-1], ValueError, "absmax has 2 values, expected 3"),
        (2, q.nested_absmax.repeat(2), ValueError, "nested_absmax has 2 values, expected 1"),
        (3, q.nested_map[:-1], ValueError, "nested_map has 255 values, expected 256"),
        (4, None, ValueError, "given together"),
        (5, 48, ValueError, "blocksize is 48, expected a power of two"),
        (6, "int4", ValueError, "quant_type is 'int4', expected 'nf4' or 'fp4'"),
        (7, [192], ValueError, r"the weight's shape is \(192,\), expected \(N, K\)"),
        (7, [3, 65], ValueError, r"x has shape"),
        (7, [4, 64], ValueError, "packed has 96 values, expected 128"),
    ]:
        with pytest.raises(error, match=message):
            op(x, *good[:index], value, *good[index + 1 :], *tail)
    weight = nf4_matmul._Weight(*good[:7], 3, 64)
    with pytest.raises(ValueError, match=r"the tile \[2:4, 0:64\] is not inside the weight \[3, 64\]"):
        weight.tile(2, 2, 0, 64, torch.empty(128))
    with pytest.raises(ValueError, match="out has 10 values, expected 64"):
        _C.nf4_dequantize_tile_cpu(weight.view, 0, 1, 0, 64, 0, x.data_ptr(), 10)
