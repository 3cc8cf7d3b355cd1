"""linear_lora: values and gradients against fp64, on every instruction set and device; dropout; what it allocates and
saves. The CUDA kernels alone are in test_lora_products_cuda.py."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from linear_cases import DTYPES, SHAPES, assert_as_exact_as_torch, inputs, run, torch_at_dtype, truth

import pyfastpeft as pf
from pyfastpeft._native import _C
from pyfastpeft.reference import lora as reference
from pyfastpeft.reference.philox import philox

SEED = torch.tensor([0x1234_5678_9ABC])


def _check(tensors, grad, dtype, scaling, dropout_p, wanted=None, device="cpu"):
    options = (scaling, dropout_p, SEED)
    got = run(lambda *t: pf.ops.linear_lora(*t, scaling, dropout_p, SEED.to(device)), tensors, grad, wanted, device)
    assert got[0].dtype == dtype
    for tensor, gradient in zip(tensors, got[1:], strict=True):
        assert gradient is None or gradient.dtype == tensor.dtype
    exact = truth(tensors, grad, *options, wanted=wanted)
    assert_as_exact_as_torch(got, torch_at_dtype(tensors, grad, *options, wanted=wanted), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, isa):
    *tensors, grad = inputs(shape, dtype)
    _check(tensors, grad, dtype, 0.5, 0.0)
    _check(tensors, grad, dtype, 2.0, 0.3)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("R", [5, 16, 25])
def test_fp32_factors_are_not_rounded_to_bfloat16(R, dropout_p, isa):
    """bf16 x and dy are exact and A and B fp32: their gradients have an error of 2^-17 at most, where bf16 factors leave
    2^-9."""
    *tensors, grad = inputs((131, 70, 517, R), torch.bfloat16)
    options = (0.5, dropout_p, SEED)
    got = run(lambda *t: pf.ops.linear_lora(*t, *options), tensors, grad)
    exact = truth(tensors, grad, *options)
    for ours, true in zip(got[4:], exact[4:], strict=True):
        assert (ours.double() - true).norm() <= 2.0**-17 * true.norm()


# every side with and without a tail of the kernels' tiles; one and two turns of each sum; ranks of one and of two tiles
DEVICE_SHAPES = [
    (1, 1, 1, 1),
    (3, 5, 7, 3),
    (33, 40, 24, 8),
    (5, 72, 264, 16),
    (21, 33, 47, 17),
    (130, 19, 40, 64),
    (2, 16, 40, 70),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", DEVICE_SHAPES)
def test_values_and_gradients_on_devices(shape, dtype, device):
    *tensors, grad = inputs(shape, dtype)
    _check(tensors, grad, dtype, 0.5, 0.0, device=device)
    _check(tensors, grad, dtype, 2.0, 0.3, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_with_a_mean_on_devices(dtype, device):
    *tensors, grad = inputs((40, 24, 130, 8), dtype, kind="gelu")
    _check(tensors, grad + 0.5, dtype, 1.0, 0.1, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_with_a_mean(dtype, isa):
    *tensors, grad = inputs((40, 96, 260, 8), dtype, kind="gelu")
    _check(tensors, grad + 0.5, dtype, 1.0, 0.1)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8, 13, 31, 64])
def test_every_rank(rank, isa):
    *tensors, grad = inputs((6, 37, 45, rank), torch.bfloat16)
    _check(tensors, grad, torch.bfloat16, 1.0, 0.0)


@pytest.mark.parametrize("lora_dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
def test_dtypes_of_bias_and_adapter(lora_dtype, bias_dtype, device):
    *tensors, grad = inputs((6, 37, 45, 4), torch.bfloat16, lora_dtype)
    tensors[2] = None if bias_dtype is None else tensors[2].to(bias_dtype)
    _check(tensors, grad, torch.bfloat16, 1.0, 0.2, device=device)


@pytest.mark.parametrize("index", range(5))
def test_one_gradient_at_a_time(index, device):
    *tensors, grad = inputs((6, 37, 45, 4), torch.float32)
    _check(tensors, grad, torch.float32, 1.0, 0.2, wanted=[i == index for i in range(5)], device=device)


def test_finite_differences():
    x, weight, bias, a, b, grad = inputs((4, 5, 6, 2), torch.float32)

    def loss(*tensors):
        return (pf.ops.linear_lora(*tensors, 0.7, 0.25, SEED).double() * grad).sum()

    tensors = [x, weight, bias, a, b]
    gradients = run(lambda *t: pf.ops.linear_lora(*t, 0.7, 0.25, SEED), tensors, grad)[1:]
    for i, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(i))
        step = 2.0**-6
        moved = [[t + s * step * direction if j == i else t for j, t in enumerate(tensors)] for s in (1, -1)]
        slope = (loss(*moved[0]) - loss(*moved[1])) / (2 * step)
        torch.testing.assert_close(slope, (gradient.double() * direction).sum(), rtol=1e-4, atol=1e-4)


# ---- dropout ---------------------------------------------------------------------------------------------------------


def test_philox_known_answers():
    """The vectors of Random123's kat_vectors for philox4x32-10."""
    ones = 0xFFFFFFFFFFFFFFFF
    for low, high, key, expected in [
        (0, 0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (ones, ones, ones, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (0x85A308D3243F6A88, 0x0370734413198A2E, 0x299F31D0A4093822, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]:
        counter = torch.tensor([low - (1 << 64) if low >> 63 else low])
        assert philox(counter, high, key).tolist() == [expected]


def _kernel_mask(begin, M, D, p, seed):
    words = torch.full((M, (D + 31) // 32), -1, dtype=torch.int32)
    _C.lora_mask_cpu(begin, M, D, p, seed, words.data_ptr(), words.numel())
    bits = words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32) & 1
    return bits.view(M, -1).bool()


@pytest.mark.parametrize("begin", [0, 1, 2, 3, 4 * (2**32 - 3) + 1, 2**40 + 7])
def test_mask_is_philox_of_the_position(begin, isa):
    """Across the carry of the counter's low word too. Counter words of a position: i // 4; lane: i % 4."""
    seed, p = 0xDEADBEEF_12345678, 0.4
    for M, D in ((1, 77), (3, 5), (2, 32), (5, 289), (2, 1031)):
        position = torch.arange(begin, begin + M * D)
        random = philox(position // 4, 0, seed).gather(1, (position % 4).unsqueeze(1)).view(M, D)
        got = _kernel_mask(begin, M, D, p, seed)
        assert torch.equal(got[:, :D], random >= int(p * 2**32 + 0.5))
        assert not got[:, D:].any()
    assert not _kernel_mask(begin, 3, 70, 1.0, seed).any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 33), (130, 70), (5, 1101)])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_in_every_product(shape, p, isa):
    """With A and B the identity and W zero the op is dropout itself, and so is its gradient: exact, place by place."""
    M, K = shape
    x, grad = torch.randn(M, K), torch.randn(M, K)
    eye, zero = torch.eye(K), torch.zeros(K, K)
    y, grad_x, _, _, grad_a, grad_b = run(
        lambda *t: pf.ops.linear_lora(*t, 1.0, p, SEED), [x, zero, None, eye, eye], grad
    )
    kept = reference.dropout_mask((M, K), p, int(SEED))
    scale = torch.tensor(1 / (1 - p) if p < 1 else 0.0, dtype=torch.float64).float()
    assert torch.equal(y, torch.where(kept, x * scale, 0.0))
    assert torch.equal(grad_x, torch.where(kept, grad * scale, 0.0))
    dropped = reference.dropout(x.double(), p, int(SEED))
    torch.testing.assert_close(grad_a.double(), grad.double().t() @ dropped, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad_b.double(), grad.double().t() @ dropped, rtol=1e-5, atol=1e-4)
    share = kept.double().mean().item()
    assert p == 1.0 or M * K < 500 or abs(share - (1 - p)) < 5 * (p * (1 - p) / (M * K)) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 33), (2, 136), (35, 40)])
@pytest.mark.parametrize("p", [0.1, 1.0])
def test_dropout_in_every_product_on_devices(shape, p, dtype, device):
    """As above: the same bits of the mask on every device, and values scaled in fp32 and rounded once."""
    M, K = shape
    x, grad = torch.randn(M, K).to(dtype), torch.randn(M, K).to(dtype)
    eye, zero = torch.eye(K), torch.zeros(K, K, dtype=dtype)
    y, grad_x, _, _, grad_a, grad_b = run(
        lambda *t: pf.ops.linear_lora(*t, 1.0, p, SEED.to(device)), [x, zero, None, eye, eye], grad, device=device
    )
    kept = reference.dropout_mask((M, K), p, int(SEED))
    assert torch.equal(y != 0, kept & (x != 0)) and torch.equal(grad_x != 0, kept & (grad != 0))
    expected, expected_x = (reference.dropout(t.double(), p, int(SEED)) for t in (x, grad))
    # as tensor-core operands S, 1/(1-p) times x, is rounded before and y after
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(y, expected.to(dtype), **tolerance)
    torch.testing.assert_close(grad_x, expected_x.to(dtype), **tolerance)
    exact, peer = grad.double().t() @ expected, grad.float().t() @ expected.to(dtype).float()
    assert_as_exact_as_torch([grad_a, grad_b], [peer, peer], [exact, exact], dtype, ("lora_a", "lora_b"))


def test_seed(device):
    x, weight, bias, a, b, _ = (t.to(device) for t in inputs((16, 8, 64, 4), torch.float32))

    def op(seed=None):
        return pf.ops.linear_lora(x, weight, bias, a, b, 1.0, 0.5, None if seed is None else seed.to(device))

    assert torch.equal(op(torch.tensor([3])), op(torch.tensor([3])))
    assert not torch.equal(op(torch.tensor([3])), op(torch.tensor([4])))
    assert not torch.equal(op(torch.tensor([3])), op(torch.tensor([3 + 2**32])))  # the high half counts
    assert torch.isfinite(op(torch.tensor([-1]))).all()
    torch.manual_seed(5)
    first, second = op(), op()
    torch.manual_seed(5)
    assert torch.equal(first, op()) and not torch.equal(first, second)
    generator = torch.cuda if device == "cuda" else torch
    state = generator.get_rng_state()
    pf.ops.linear_lora(x, weight, bias, a, b)  # no dropout: the generator is left alone
    assert torch.equal(state, generator.get_rng_state())


# ---- shapes, layouts, threads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_same_bits_on_every_thread_count(dtype, dropout_p, isa):
    *tensors, grad = inputs((67, 130, 517, 9), dtype)
    tensors[1].zero_()  # the base product is torch's
    former = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(lambda *t: pf.ops.linear_lora(*t, 1.0, dropout_p, SEED), tensors, grad)[0:6])
    finally:
        torch.set_num_threads(former)
    for other in results[1:]:
        for i in (0, 1, 4, 5):
            assert torch.equal(results[0][i], other[i])


def test_subnormals_survive_flush_denormal(isa):
    """torch.set_flush_denormal sets a flag of the calling thread: our results must not depend on who computes them."""
    x, zero, one = torch.full((64, 64), 1e-40), torch.zeros(64, 64), torch.eye(64)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        y, grad_x, *_ = run(lambda *t: pf.ops.linear_lora(*t), [x, zero, None, one, one], x)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y, x) and torch.equal(grad_x, x)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,), (2, 3, 4, 5), (1, 1, 5)])
def test_any_number_of_dimensions(shape, device):
    _, weight, bias, a, b, _ = inputs((1, 3, 5, 2), torch.float32)
    x, grad = torch.randn(shape), torch.randn(*shape[:-1], 3)
    tensors = [x, weight, bias, a, b]
    got = run(lambda *t: pf.ops.linear_lora(*t, 1.5), tensors, grad, device=device)
    for ours, true in zip(got, truth(tensors, grad, 1.5), strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("M, N, K, R", [(4, 0, 5, 2), (4, 3, 0, 2), (4, 3, 5, 0), (0, 3, 5, 2), (0, 0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_sides(M, N, K, R, dtype, device):
    tensors = [torch.randn(M, K), torch.randn(N, K), torch.randn(N), torch.randn(R, K), torch.randn(N, R)]
    tensors = [tensors[0].to(dtype), tensors[1].to(dtype), *tensors[2:]]
    grad = torch.randn(M, N).to(dtype)
    got = run(lambda *t: pf.ops.linear_lora(*t, 1.0, 0.1, SEED.to(device)), tensors, grad, device=device)
    if dtype != torch.float32:
        return assert_as_exact_as_torch(
            got, torch_at_dtype(tensors, grad, 1.0, 0.1, SEED), truth(tensors, grad, 1.0, 0.1, SEED), dtype
        )
    for ours, true in zip(got, truth(tensors, grad, 1.0, 0.1, SEED), strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)


def test_strided_views(device):
    big = torch.randn(40, 6, 70)
    a, b, weight = (
        torch.randn(66, 4).t(),
        torch.randn(4, 9).t(),
        torch.randn(33, 9).t(),
    )  # Conv1D's weight is a transpose
    for x in (big[:, ::2, :33], big.transpose(0, 1)[..., 1:67:2], big[..., 3, 4:37], big[:1, :, :33].expand(5, 6, 33)):
        tensors = [x, weight, torch.randn(18)[::2], a[:, ::2], b]
        grad = torch.randn(1).expand(*x.shape[:-1], 9)
        got = run(lambda *t: pf.ops.linear_lora(*t, 0.5, 0.2, SEED.to(device)), tensors, grad, device=device)
        for ours, true in zip(got, truth(tensors, grad, 0.5, 0.2, SEED), strict=True):
            torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_storage(dtype, device):
    """Rows of whole vectors that begin between two of them, in x, grad and the adapter."""

    def shifted(*size, dtype=torch.float32):
        return torch.randn(size[0] * size[1] + 1).to(dtype)[1:].view(size).to(device)

    x, grad = shifted(9, 32, dtype=dtype), shifted(9, 40, dtype=dtype)
    tensors = [x, shifted(40, 32, dtype=dtype), None, shifted(8, 32), shifted(40, 8)]
    got = run(lambda *t: pf.ops.linear_lora(*t, 0.5, 0.2, SEED.to(device)), tensors, grad, device=device)
    tensors, grad = [None if t is None else t.cpu() for t in tensors], grad.cpu()
    options = (0.5, 0.2, SEED)
    assert_as_exact_as_torch(got, torch_at_dtype(tensors, grad, *options), truth(tensors, grad, *options), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_every_run(dtype, device):
    *tensors, grad = inputs((37, 24, 300, 9), dtype)
    first, second = (
        run(lambda *t: pf.ops.linear_lora(*t, 1.0, 0.3, SEED.to(device)), tensors, grad, device=device)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_with_fp32_adapters(device):
    """x and W are cast, A and B are not; the gradients of A and B stay in fp32, and are those of the casted x."""
    *tensors, grad = inputs((9, 24, 40, 4), torch.float32)
    kind = torch.device(device).type

    def under_autocast(*t):
        with torch.autocast(kind, torch.bfloat16):
            return pf.ops.linear_lora(*t, 0.5, 0.2, SEED.to(device))

    got = run(under_autocast, tensors, grad.bfloat16(), device=device)
    assert [t.dtype for t in got] == [torch.bfloat16] + [torch.float32] * 5
    cast = [t.bfloat16() for t in tensors[:2]] + tensors[2:]
    expected = run(lambda *t: pf.ops.linear_lora(*t, 0.5, 0.2, SEED.to(device)), cast, grad.bfloat16(), device=device)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))


def test_captured_in_a_cuda_graph():
    """Nothing waits for the device, and each replay draws its own mask."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    *tensors, grad = (t.cuda() for t in inputs((40, 48, 64, 8), torch.bfloat16))
    leaves = [t.requires_grad_() for t in tensors]

    def step():
        y = pf.ops.linear_lora(*leaves, 0.5, 0.5)
        return y, *torch.autograd.grad(y, leaves, grad)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # warms up cuBLAS outside of the capture
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    first = [t.clone() for t in results]
    graph.replay()
    assert not torch.equal(first[0], results[0])
    assert torch.equal(first[2], results[2]) and torch.equal(first[3], results[3])  # dW and dbias know no dropout
    assert all(torch.isfinite(t).all() for t in results)


@settings(max_examples=30, deadline=None)
@given(
    M=st.integers(0, 20), N=st.integers(0, 40), K=st.integers(0, 70), R=st.integers(0, 9), p=st.sampled_from([0, 0.4])
)
def test_any_shape(M, N, K, R, p):
    tensors = [torch.randn(M, K), torch.randn(N, K), torch.randn(N), torch.randn(R, K), torch.randn(N, R)]
    grad = torch.randn(M, N)
    got = run(lambda *t: pf.ops.linear_lora(*t, 1.0, p, SEED), tensors, grad)
    for ours, true in zip(got, truth(tensors, grad, 1.0, p, SEED), strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-4)


# ---- what it keeps and allocates -------------------------------------------------------------------------------------


def test_saves_the_input_s_and_parameters_alone():
    x, weight, bias, a, b, _ = inputs((50, 20, 30, 4), torch.bfloat16)
    x, a, b = x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pf.ops.linear_lora(x, weight, bias, a, b, 1.0, 0.1)
        own = {t.data_ptr() for t in (x, weight, a, b)}
        assert own < {t.data_ptr() for t in saved}
        others = [t for t in saved if t.data_ptr() not in own]
        kept = {(t.dtype, tuple(t.shape)) for t in others if t.dim() == 2}
        assert kept == {(torch.float32, (50, 4)), (torch.int32, (50, 1))}  # S and a bit for each value of x
        assert sum(t.dim() != 2 for t in others) == 1  # the seed
        saved.clear()
        pf.ops.linear_lora(x, weight, bias, a.detach(), b, 1.0, 0.1)  # B alone wants S, and not x
        assert x.data_ptr() not in {t.data_ptr() for t in saved} and any(t.shape == (50, 4) for t in saved)
        saved.clear()
        pf.ops.linear_lora(x, weight, bias, a.detach(), b.detach(), 1.0, 0.1)  # a frozen adapter keeps no activation
        assert x.data_ptr() not in {t.data_ptr() for t in saved}


def test_inputs_are_left_alone(device):
    *tensors, grad = (t.to(device) for t in inputs((9, 8, 7, 2), torch.bfloat16))
    copies = [t.clone() for t in tensors]
    run(lambda *t: pf.ops.linear_lora(*t, 1.0, 0.5, SEED.to(device)), tensors, grad, device=device)
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(2, 5, dtype=torch.float64)}, TypeError, "x has dtype torch.float64, expected float32"),
        ({"x": torch.ones(2, 5, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"x": torch.ones(2, 4)}, ValueError, r"x has shape \(2, 4\), expected \[..., 5\] for a weight \[3, 5\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\)"),
        ({"x": torch.ones(2, 5, device="meta")}, ValueError, "weight is on cpu, x is on meta"),
        ({"weight": torch.ones(3, 5).half()}, TypeError, "weight is torch.float16 and x is torch.float32"),
        ({"weight": torch.ones(15)}, ValueError, r"weight has shape \(15,\), expected \[N, K\]"),
        ({"bias": torch.ones(4)}, ValueError, r"bias has shape \(4,\), expected \(3,\)"),
        ({"bias": torch.ones(3, dtype=torch.int32)}, TypeError, "bias has dtype torch.int32"),
        ({"lora_a": torch.ones(5, 2)}, ValueError, r"lora_a has shape \(5, 2\), expected \[R, 5\]"),
        ({"lora_b": torch.ones(2, 3)}, ValueError, r"lora_b has shape \(2, 3\), expected \[3, 2\]"),
        ({"lora_a": torch.ones(2, 5).double()}, TypeError, "lora_a has dtype torch.float64"),
        ({"lora_b": torch.ones(3, 2).long()}, TypeError, "lora_b has dtype torch.int64"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5, expected a probability from 0 to 1"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p is nan"),
        (
            {"dropout_p": 0.5, "seed": torch.ones(1)},
            ValueError,
            r"seed is torch.float32 of shape \(1,\), expected int64",
        ),
        ({"dropout_p": 0.5, "seed": torch.ones(2).long()}, ValueError, r"seed is torch.int64 of shape \(2,\)"),
    ],
)
def test_bad_input(change, error, message):
    good = {
        "x": torch.ones(2, 5), "weight": torch.ones(3, 5), "bias": torch.ones(3), "lora_a": torch.ones(2, 5),
        "lora_b": torch.ones(3, 2),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        pf.ops.linear_lora(**{**good, **change})


@pytest.mark.parametrize("name", ["x", "weight", "bias", "lora_a", "lora_b", "seed"])
def test_tensors_on_different_devices(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    good = dict(zip(("x", "weight", "bias", "lora_a", "lora_b"), inputs((2, 3, 5, 2), torch.float32), strict=False))
    good |= {"dropout_p": 0.5, "seed": SEED}
    for home, other in (("cpu", "cuda"), ("cuda", "cpu")):
        moved = {k: v.to(home) if isinstance(v, torch.Tensor) else v for k, v in good.items()}
        moved[name] = moved[name].to(other)
        with pytest.raises(ValueError, match=r"is on \S+, x is on \S+ move one|is on \S+, x is on \S+; move one"):
            pf.ops.linear_lora(**moved)


def test_bad_input_of_the_flat_ops():
    x, weight, a, b = torch.ones(2, 5), torch.ones(3, 5), torch.ones(2, 5), torch.ones(3, 2)
    with pytest.raises(ValueError, match="dropout_p is 0.5 but seed is None"):
        torch.ops.pyfastpeft.linear_lora(x, weight, None, a, b, 1.0, 0.5, None)
    backward = torch.ops.pyfastpeft.linear_lora_backward
    with pytest.raises(ValueError, match=r"grad_output has shape \(2, 4\), expected \[..., 3\]"):
        backward(torch.ones(2, 4), x, weight, a, b, 1.0, 0.0, None, [True] * 5)
    with pytest.raises(ValueError, match=r"x is torch.float32 \(3, 5\) on cpu, expected torch.float32 \(2, 5\)"):
        backward(torch.ones(2, 3), torch.ones(3, 5), weight, a, b, 1.0, 0.0, None, [True] * 5)
    s, bits = torch.ones(2, 2), torch.ones(2, 1, dtype=torch.int32)
    for wrong, got in ((s[:1], r"torch.float32 \(1, 2\) on cpu"), (s.half(), "torch.float16")):
        with pytest.raises(ValueError, match=rf"s is {got}.*, expected torch.float32 \(2, 2\) on cpu"):
            backward(torch.ones(2, 3), x, weight, a, b, 1.0, 0.0, None, [True] * 5, wrong)
    for wrong, got in ((bits[:1], r"torch.int32 \(1, 1\) on cpu"), (bits.long(), "torch.int64")):
        with pytest.raises(ValueError, match=rf"mask is {got}.*, expected torch.int32 \(2, 1\) on cpu"):
            backward(torch.ones(2, 3), x, weight, a, b, 1.0, 0.5, SEED, [True] * 5, s, wrong)
    with pytest.raises(ValueError, match="lora_shrink: a has 4 values, expected 2 x 5"):
        _C.lora_shrink_cpu(x.data_ptr(), 10, 0, 2, 5, a.data_ptr(), 4, 5, 1, 2, 1.0, 0, 0, 0.0, b.data_ptr(), 4)
    with pytest.raises(ValueError, match="x has no memory"):
        _C.lora_shrink_cpu(0, 10, 0, 2, 5, a.data_ptr(), 10, 5, 1, 2, 1.0, 0, 0, 0.0, b.data_ptr(), 4)
    with pytest.raises(ValueError, match="lora_shrink: mask has 1 values, expected 2 x 1"):
        _C.lora_shrink_cpu(
            x.data_ptr(), 10, 0, 2, 5, a.data_ptr(), 10, 5, 1, 2, 1.0, bits.data_ptr(), 1, 0.5, b.data_ptr(), 4
        )
    with pytest.raises(ValueError, match="lora_mask: mask has 3 values, expected 2 x 1"):
        _C.lora_mask_cpu(0, 2, 5, 0.5, 1, bits.data_ptr(), 3)
