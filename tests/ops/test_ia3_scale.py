"""ia3_scale: forward and gradients against fp64, on every instruction set and device, as a torch op in every guise."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

import pyfastpeft as pf
from pyfastpeft.reference import ia3 as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1,),
    (7,),
    (1, 1),
    (1000, 1),
    (1000, 3),
    (513, 2),
    (5, 127),
    (130, 33),
    (3, 129, 64),
    (2, 3, 1025),
    (300, 2050),
    (7, 4099),  # rows by fours
    (130, 4096),
    (2, 17001),  # tiles beside one another
]


def _inputs(shape, dtype, scale_dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) + 0.5).to(dtype)
    scale = (torch.randn(shape[-1], generator=generator) + 1).to(scale_dtype)
    grad = (torch.randn(shape, generator=generator) - 0.25).to(dtype)
    return x, scale, grad


def _run(x, scale, grad, device="cpu"):
    x, scale = x.detach().to(device).requires_grad_(), scale.detach().to(device).requires_grad_()
    y = pf.ops.ia3_scale(x, scale)
    y.backward(grad.to(device))
    return y.detach().cpu(), x.grad.cpu(), scale.grad.cpu()


def _check(shape, dtype, device="cpu"):
    x, scale, grad = _inputs(shape, dtype)
    y, grad_x, grad_scale = _run(x, scale, grad, device)
    assert (y.dtype, grad_x.dtype, grad_scale.dtype) == (dtype, dtype, torch.float32)
    assert torch.equal(y, reference.ia3_scale(x, scale))
    expected_x, expected_scale = reference.ia3_scale_backward(grad, x, scale)
    assert torch.equal(grad_x, expected_x)
    # twice the error of torch's own fp32 sum of the same products
    products = (grad.float() * x.float()).reshape(-1, shape[-1])
    truth = (grad.double() * x.double()).reshape(-1, shape[-1]).sum(0)
    allowed = 2 * (products.sum(0).double() - truth).abs().max() + 1e-7 * truth.abs().max()
    assert (grad_scale.double() - truth).abs().max() <= allowed
    torch.testing.assert_close(grad_scale, expected_scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, isa):
    _check(shape, dtype)


# Columns: one, odd, whole vectors, more than a block's 32 bytes, more than 132 blocks of 32 bytes and of 64. Rows: one,
# more than the threads beside each other, more than a run of 32 each, more than one part (2048), parts of unlike length.
DEVICE_SHAPES = [(7,), (1, 1), (1500, 1), (5, 127), (33, 16), (2, 3, 72), (2, 2200), (1, 4328), (3, 1, 2125)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", DEVICE_SHAPES)
def test_values_and_gradients_on_devices(shape, dtype, device):
    _check(shape, dtype, device)


@pytest.mark.parametrize("shape", [(4130, 3), (2049, 8), (2048, 2)])
def test_long_sums_on_devices(shape, device):
    _check(shape, torch.bfloat16, device)


def test_more_rows_than_blocks(device):
    """The forward's blocks walk over the rows that the grid has no blocks for."""
    x, scale = torch.randn(1056 * 1024 + 5, 1), torch.tensor([3.0])
    y = pf.ops.ia3_scale(x.to(device), scale.to(device)).cpu()
    assert torch.equal(y, x * 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_storage(dtype, device):
    """Rows of whole vectors that begin between two of them: x, grad_output or both."""
    x, scale, grad = _inputs((9, 64), dtype)
    for shift_x, shift_grad in ((1, 0), (0, 1), (3, 3)):

        def shifted(t, by):
            return torch.cat([t.new_zeros(by), t.reshape(-1)]).to(device)[by:].view(t.shape)

        got = _run(shifted(x, shift_x), scale, shifted(grad, shift_grad), device)
        for ours, theirs in zip(got, _run(x, scale, grad), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_every_run(dtype, device):
    x, scale, grad = _inputs((700, 40), dtype)
    first, second = _run(x, scale, grad, device), _run(x, scale, grad, device)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_every_thread_count(dtype, isa):
    x, scale, grad = _inputs((700, 513), dtype)
    former = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_run(x, scale, grad))
    finally:
        torch.set_num_threads(former)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("columns", [65, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scale_in_the_dtype_of_x(columns, dtype, device):
    x, scale, grad = _inputs((9, columns), dtype, dtype)
    y, grad_x, grad_scale = _run(x, scale, grad, device)
    # one rounding of an exact product: torch's own result
    assert torch.equal(y, x * scale) and torch.equal(grad_x, grad * scale)
    assert grad_scale.dtype == dtype
    torch.testing.assert_close(grad_scale, (grad.double() * x.double()).sum(0).to(dtype))


def test_strided_views(device):
    base = torch.randn(40, 6, 70)
    for x in (base[:, ::2, :33], base.transpose(0, 1), base[..., 1::2], base[:, :, 5], base[:1].expand(4, 6, 70)):
        scale, grad = torch.randn(x.shape[-1]), torch.randn(1).expand(x.shape)
        y, grad_x, grad_scale = _run(x, scale, grad, device)
        expected_x, expected_scale = reference.ia3_scale_backward(grad, x, scale)
        assert torch.equal(y, reference.ia3_scale(x, scale)) and torch.equal(grad_x, expected_x)
        torch.testing.assert_close(grad_scale, expected_scale)
    y, _, grad_scale = _run(base[0], torch.randn(140)[::2], base[1], device)
    assert y.shape == base[0].shape and grad_scale.shape == (70,)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
def test_empty(shape, device):
    x, scale, grad = _inputs(shape, torch.float32)
    y, grad_x, grad_scale = _run(x, scale, grad, device)
    assert y.shape == grad_x.shape == shape and torch.equal(grad_scale, torch.zeros(shape[-1]))


def test_special_values(isa):
    x = torch.tensor([[float("nan"), float("inf"), -0.0, 1e-45, 3e38, -float("inf"), 1.0, 0.0, 65504.0]])
    scale = torch.tensor([1.0, 0.0, 2.0, 1.0, 2.0, -1.0, 1e-40, -1.0, 1.0])
    for dtype in DTYPES:
        torch.testing.assert_close(
            pf.ops.ia3_scale(x.to(dtype), scale),
            (x.to(dtype).float() * scale).to(dtype),
            rtol=0,
            atol=0,
            equal_nan=True,
        )


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 300), columns=st.integers(1, 70), seed=st.integers(0, 10**6))
def test_any_shape(rows, columns, seed):
    x, scale, grad = _inputs((rows, columns), torch.bfloat16, seed=seed)
    y, grad_x, grad_scale = _run(x, scale, grad)
    expected_x, expected_scale = reference.ia3_scale_backward(grad, x, scale)
    assert torch.equal(y, reference.ia3_scale(x, scale)) and torch.equal(grad_x, expected_x)
    torch.testing.assert_close(grad_scale, expected_scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [10, 16])
def test_special_values_on_devices(columns, device):
    x = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3e38, -float("inf"), 1.0, 0.0, 65504.0, 2.0])
    scale = torch.tensor([1.0, 0.0, 2.0, 1.0, 2.0, -1.0, 1e-40, -1.0, 1.0, 3e38])
    x, scale = x.repeat(2)[:columns], scale.repeat(2)[:columns]
    for dtype in DTYPES:
        y = pf.ops.ia3_scale(x.to(device, dtype), scale.to(device)).cpu()
        expected = (x.to(dtype).float() * scale).to(dtype)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_only_what_is_wanted(device):
    x, scale, grad = (t.to(device) for t in _inputs((6, 10), torch.float32))
    op = torch.ops.pyfastpeft.ia3_scale_backward
    assert [t.numel() for t in op(grad, x, scale, [False, True])] == [0, 10]
    assert [t.numel() for t in op(grad, x, scale, [True, False])] == [60, 0]
    y = pf.ops.ia3_scale(x.requires_grad_(), scale)  # a frozen scale does not keep x alive
    assert y.grad_fn is not None
    (grad_x,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(grad_x, grad * scale)


def test_opcheck():
    x, scale, grad = _inputs((4, 10), torch.float32)
    tests = torch.library.opcheck
    tests(torch.ops.pyfastpeft.ia3_scale, (x.clone().requires_grad_(), scale.clone().requires_grad_()))
    tests(torch.ops.pyfastpeft.ia3_scale, (x.bfloat16().requires_grad_(), scale))
    tests(torch.ops.pyfastpeft.ia3_scale_backward, (grad, x, scale, [True, True]))


def test_functional_transforms():
    x, scale, grad = _inputs((4, 10), torch.float32)

    def loss(x, scale):
        return (pf.ops.ia3_scale(x, scale) * grad).sum()

    grad_x, grad_scale = torch.func.grad(loss, argnums=(0, 1))(x, scale)
    torch.testing.assert_close(grad_x, grad * scale)
    torch.testing.assert_close(grad_scale, (grad * x).sum(0))
    torch.testing.assert_close(torch.func.vmap(pf.ops.ia3_scale, (0, None))(x, scale), x * scale)
    scales = torch.randn(3, 10)
    torch.testing.assert_close(torch.func.vmap(pf.ops.ia3_scale, (None, 0))(x, scales), x * scales[:, None])
    per_sample = torch.func.vmap(torch.func.grad(lambda s, x, g: (pf.ops.ia3_scale(x, s) * g).sum()), (None, 0, 0))
    torch.testing.assert_close(per_sample(scale, x, grad), grad * x)


def test_second_derivatives():
    x, scale, grad = (t.requires_grad_() for t in _inputs((4, 5), torch.float32))
    y = pf.ops.ia3_scale(x, scale)
    first = torch.autograd.grad(y, (x, scale), grad, create_graph=True)
    weights = [torch.randn_like(f) for f in first]
    got = torch.autograd.grad(first, (grad, x, scale), weights)
    y = x * scale
    first = torch.autograd.grad(y, (x, scale), grad, create_graph=True)
    for a, b in zip(got, torch.autograd.grad(first, (grad, x, scale), weights), strict=True):
        torch.testing.assert_close(a, b)


def test_meta_fake_autocast_and_checkpointing():
    assert pf.ops.ia3_scale(torch.empty(3, 4, device="meta"), torch.empty(4, device="meta")).shape == (3, 4)
    with FakeTensorMode():
        x = torch.empty(3, 4, dtype=torch.bfloat16, requires_grad=True)
        pf.ops.ia3_scale(x, torch.empty(4)).sum().backward()
        assert x.grad.dtype == torch.bfloat16
    x, scale, grad = _inputs((6, 10), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):  # as for torch's `*`: x keeps its dtype
        assert pf.ops.ia3_scale(x, scale).dtype == torch.bfloat16
        assert pf.ops.ia3_scale(x.float(), scale).dtype == torch.float32
    for reentrant in (False, True):
        a, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(pf.ops.ia3_scale, a, s, use_reentrant=reentrant).backward(grad)
        assert torch.equal(s.grad, _run(x, scale, grad)[2])


def test_compile():
    x, scale, grad = _inputs((6, 10), torch.float32)
    compiled = torch.compile(lambda x, s: pf.ops.ia3_scale(x, s) + 1, fullgraph=True, backend="aot_eager")
    s = scale.clone().requires_grad_()
    compiled(x, s).backward(grad)
    torch.testing.assert_close(s.grad, (grad * x).sum(0))


def test_tensors_on_different_devices():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for home, other in (("cpu", "cuda"), ("cuda", "cpu")):
        with pytest.raises(ValueError, match=r"scale is on \S+, expected x's device \S+; move it with"):
            pf.ops.ia3_scale(torch.ones(3, 4, device=home), torch.ones(4, device=other))


def test_bad_input():
    x, scale = torch.randn(3, 4), torch.ones(4)
    with pytest.raises(TypeError, match="x has dtype torch.float64, expected float32, float16 or bfloat16"):
        pf.ops.ia3_scale(x.double(), scale)
    with pytest.raises(TypeError, match="scale has dtype torch.float16, expected float32 or x's torch.float32"):
        pf.ops.ia3_scale(x, scale.half())
    for bad in (torch.ones(5), torch.ones(4, 1), torch.ones(1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"expected x \[..., D\] and scale \[D\]"):
            pf.ops.ia3_scale(x, bad)
    with pytest.raises(ValueError, match="expected x's"):
        torch.ops.pyfastpeft.ia3_scale_backward(torch.randn(4, 3), x, scale, [True, True])
