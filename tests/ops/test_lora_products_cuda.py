"""The CUDA kernels of the low-rank path, one by one, on a GPU and on the host executor: both ways of computing (tensor
cores, and fp32 products as on sm_75), every order of the small factor, what is refused, and what is allocated."""

import pytest
import torch
from linear_cases import DTYPES, inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyfastpeft.ops import _cuda, _linear_cuda, lora
from pyfastpeft.reference import lora as reference

SEED = torch.tensor([0x1234_5678_9ABC])
# M, D, R: whole tiles and tails of each; rows of whole 16 bytes (tensor cores) and others; one and two pieces of a sum; one
# and two tiles of ranks; more than one block of everything
SHAPES = [
    (1, 1, 1),
    (1, 8, 1),
    (3, 7, 3),
    (33, 40, 16),
    (5, 520, 8),
    (40, 264, 17),
    (131, 33, 20),
    (131, 40, 64),
    (7, 16, 70),
]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.6e-3}  # three roundings

pytestmark = pytest.mark.parametrize("device", ["emulated", "cuda"], indirect=True)


def _ways():
    """(shape, dtype, tensor cores): every way of computing a shape, once."""
    for shape in SHAPES:
        for dtype in DTYPES:
            yield shape, dtype, False
            if dtype != torch.float32 and shape[1] % 8 == 0:
                yield shape, dtype, True


every_way = pytest.mark.parametrize("shape, dtype, tensor_cores", list(_ways()))


@pytest.fixture(autouse=True)
def _setup(request, monkeypatch):
    torch.manual_seed(0)
    if "tensor_cores" in request.fixturenames and not request.getfixturevalue("tensor_cores"):
        monkeypatch.setattr(_cuda, "capability", lambda tensor: (7, 5))


def _assert_close(got, exact, dtype, summands):
    """Root-mean-square error against the size of a sum of so many products of unit size, where it does not cancel."""
    error = (got.cpu().double() - exact).square().mean().sqrt()
    assert error <= TOLERANCE[dtype] * summands**0.5, f"error {error:.3g}"


def _drop(t, p):
    return reference.dropout(t.double(), p, int(SEED)) if p else t.double()


def _orders(factor, device):
    """The same [R, D] values with the rows, the columns and neither of them adjoining."""
    R, D = factor.shape
    spread = torch.full((R, 2 * D), torch.nan)
    spread[:, ::2] = factor
    factor = factor.to(device)
    return factor, factor.t().contiguous().t(), spread.to(device)[:, ::2]


@every_way
def test_shrink(shape, dtype, tensor_cores, device):
    M, D, R = shape
    x, a = torch.randn(M, D).to(dtype), torch.randn(R, D)
    for p, factor in zip((0.0, 0.3, 1.0), _orders(a, device), strict=True):
        got = _linear_cuda.shrink(x.to(device), factor, 1.5, p, SEED.to(device))
        assert got.dtype == torch.float32
        _assert_close(got / 1.5, _drop(x, p) @ a.double().t(), dtype, D)


@every_way
def test_expand(shape, dtype, tensor_cores, device):
    M, D, R = shape
    s, c, y, bias = torch.randn(M, R), torch.randn(R, D), torch.randn(M, D).to(dtype), torch.randn(D)
    for p, factor in zip((0.0, 0.3, 1.0), _orders(c, device), strict=True):
        exact = _drop(s.double() @ c.double(), p)
        arguments = (s.to(device), factor, p, SEED.to(device))
        got = _linear_cuda.expand_(y.clone().to(device), *arguments, add=True)
        _assert_close(got, exact + y.double(), dtype, R + 1)
        empty = torch.full_like(y, torch.nan, device=str(device))
        got = _linear_cuda.expand_(empty, *arguments, add=False, bias=bias.to(device))
        _assert_close(got, exact + bias.double(), dtype, R + 1)
        _assert_close(_linear_cuda.expand_(empty, *arguments, add=False), exact, dtype, R)


@every_way
def test_accumulate(shape, dtype, tensor_cores, device):
    M, D, R = shape
    s, x = torch.randn(M, R), torch.randn(M, D).to(dtype)
    for p in (0.0, 0.3, 1.0):
        arguments = (s.to(device), x.to(device), p, SEED.to(device))
        got = _linear_cuda.accumulate(*arguments)
        _assert_close(got, s.double().t() @ _drop(x, p), dtype, M)
        transposed = torch.full((D, R), torch.nan, device=str(device))
        assert _linear_cuda.accumulate(*arguments, out=transposed.t()).data_ptr() == transposed.data_ptr()
        assert torch.equal(transposed.t(), got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_s_do_not_depend_on_their_number_up_to_32(dtype, device):
    x, a = torch.randn(32, 520).to(device, dtype), torch.randn(5, 520).to(device)
    whole = _linear_cuda.shrink(x, a)
    for begin, end in ((0, 1), (7, 24), (31, 32)):
        assert torch.equal(_linear_cuda.shrink(x[begin:end], a), whole[begin:end])


@pytest.mark.parametrize("dtype, M", [(torch.bfloat16, 34_000), (torch.float32, 4_300)])
def test_expand_of_more_rows_than_blocks(dtype, M, device):
    """Blocks walk down the rows that the grid has no blocks for."""
    s, c = torch.randn(M, 1).bfloat16().float(), torch.randn(1, 5).bfloat16().float()
    y = torch.full((M, 5), torch.nan, dtype=dtype, device=str(device))
    _linear_cuda.expand_(y, s.to(device), c.to(device), add=False)
    assert torch.equal(y.cpu(), (s * c).to(dtype))


def test_large_values_of_the_factor_stay_finite_in_fp32(device):
    """Nothing is rounded to 16 bits in the fp32 kernels."""
    x, a = torch.full((3, 8), 1e-3), torch.full((2, 8), 1e30)
    got = _linear_cuda.shrink(x.to(device), a.to(device))
    torch.testing.assert_close(got.cpu(), torch.full((3, 2), 8e27))


class _Allocations(TorchDispatchMode):
    """The sizes of the new tensors that are no views."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if all(returned.alias_info is None for returned in func._schema.returns):
            self.sizes += [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        return result


def test_nothing_of_the_size_of_x_or_y_is_allocated(device):
    M, N, K, R = 40, 56, 48, 2
    *tensors, grad = (t.to(device) for t in inputs((M, N, K, R), torch.bfloat16))
    x, weight, _, a, b = tensors
    options = (0.5, 0.2, SEED.to(device))
    with _Allocations() as forward:
        lora._forward_cuda(*tensors, *options)
    assert [size for size in forward.sizes if size >= M * K] == [M * N]
    with _Allocations() as backward:
        lora._backward_cuda(grad, x, weight, a, b, *options, [True, False, True, True, True])
    assert [size for size in backward.sizes if size >= M * K] == [M * K]


def test_bindings_refuse_wrong_sizes(device):
    x, a, s = (t.to(device) for t in (torch.ones(2, 5), torch.ones(3, 5), torch.empty(2, 3)))
    module, index, stream = _cuda.target(x, "test")
    target = (index, stream)

    def shrink(x_numel=10, a_numel=15, p=0.0, seed=0, workspace=0, address=None):
        module.lora_shrink_cuda(
            x.data_ptr() if address is None else address, x_numel, 0, 2, 5, a.data_ptr(), a_numel, 5, 1, 3, 1.0, p, seed, True, 0, workspace, s.data_ptr(), 6,
            *target,
        )  # fmt: skip

    shrink()
    torch.testing.assert_close(s.cpu(), torch.full((2, 3), 5.0))
    with pytest.raises(ValueError, match="lora_shrink: x has 9 values, expected 2 x 5"):
        shrink(x_numel=9)
    with pytest.raises(ValueError, match="lora_shrink: a has 16 values, expected 3 x 5"):
        shrink(a_numel=16)
    with pytest.raises(ValueError, match="dropout_p is 1.5, expected a probability"):
        shrink(p=1.5)
    with pytest.raises(ValueError, match="seed has no memory"):
        shrink(p=0.5)
    with pytest.raises(ValueError, match="x has no memory"):
        shrink(address=0)
    with pytest.raises(ValueError, match="workspace has 6 values, expected 0 as lora_shrink_workspace says"):
        shrink(workspace=6)
    y = torch.ones(2, 5).to(device)
    with pytest.raises(ValueError, match="bias has 4 values, expected 5, or none where y is added to"):
        module.lora_expand_cuda(
            s.data_ptr(), 6, 2, 3, a.data_ptr(), 15, 5, 1, 5, 0.0, 0, True, False, a.data_ptr(), 4, 0, y.data_ptr(), 10,
            *target,
        )  # fmt: skip
    with pytest.raises(ValueError, match="lora_accumulate: g has 14 values, expected 3 x 5"):
        module.lora_accumulate_cuda(
            s.data_ptr(), 6, 2, 3, x.data_ptr(), 10, 0, 5, 0.0, 0, True, 0, 0, a.data_ptr(), 14, 5, 1, *target
        )
