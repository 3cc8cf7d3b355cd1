"""The gradients of segmented_lora on every device: against fp64, and each adapter's as if it had trained alone."""

import pytest
import torch

import pyfastpeft as pf
from pyfastpeft.ops import _cuda
from pyfastpeft.reference.segmented_lora import segmented_lora as reference
from tests.ops.test_segmented_lora import BF16, CASES, F16, F32, TOLERANCE, _case

MORE = [  # rows of a segment beyond a panel and beyond the tensor-core kernels' turn; a column group and its tail
    ([0, 1, 1], 50, 72, 136, [16, 9]),
    ([0], 150, 8, 80, [3]),
]


def _leaves(y, x, a, b, biases):
    return [y, x, *a, *b, *(t for t in biases if t is not None)]


def _gradients(function, y, x, order, starts, a, b, biases, scalings, cotangent):
    """function's gradients to (y, x, a…, b…, biases…) where the result is weighted by `cotangent`."""
    clone = lambda t: None if t is None else t.detach().clone().requires_grad_()  # noqa: E731
    y, x = clone(y), clone(x)
    a, b, biases = ([clone(t) for t in group] for group in (a, b, biases))
    out = function(y, x, order, starts, a, b, biases, scalings)
    leaves = _leaves(y, x, a, b, biases)
    return torch.autograd.grad(out, leaves, cotangent, materialize_grads=True)


def _run(case, device, dtype, factor_dtype=F32, bias=True):
    y, x, adapters, a, b, biases, scalings = _case(case, dtype, factor_dtype, bias)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    double = lambda group: [None if t is None else t.double() for t in group]  # noqa: E731
    order, starts = pf.ops.segments(adapters, len(a))
    exact = _gradients(
        reference, y.double(), x.double(), order, starts, double(a), double(b), double(biases), scalings,
        cotangent.double(),
    )  # fmt: skip
    move = lambda group: [None if t is None else t.to(device) for t in group]  # noqa: E731
    got = _gradients(
        pf.ops.segmented_lora, *move([y, x, order, starts]), move(a), move(b), move(biases), scalings,
        cotangent.to(device),
    )  # fmt: skip
    for leaf, ours, truth in zip(_leaves(y, x, a, b, biases), got, exact, strict=True):
        assert ours.dtype == leaf.dtype and ours.shape == leaf.shape and ours.is_contiguous()
        error = (ours.cpu().double() - truth).square().mean().sqrt()
        wide = leaf.dtype == F32 and dtype != F32  # tensor cores: both operands are rounded
        limit = (2 * TOLERANCE[dtype] if wide else TOLERANCE[leaf.dtype]) * truth.square().mean().sqrt().clamp_min(1e-3)
        assert leaf.numel() == 0 or error <= limit, (
            f"{tuple(leaf.shape)} {leaf.dtype}: error {error:.3g} of {limit:.3g}"
        )
    untouched = [i for i, n in enumerate(adapters.tolist()) if n < 0]
    assert not got[1][untouched].any()
    assert torch.equal(got[0].cpu(), cotangent)
    return got


@pytest.mark.parametrize("case", CASES + MORE, ids=lambda case: f"{len(case[0])}x{case[1]} {case[2]}-{case[3]}")
@pytest.mark.parametrize("dtype, factors", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)])
def test_against_the_reference(case, dtype, factors, device):
    _run(case, device, dtype, factors)


@pytest.mark.parametrize("case", [*CASES[1:4], MORE[0]])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_without_tensor_cores(case, dtype, device, monkeypatch):
    monkeypatch.setattr(_cuda, "capability", lambda tensor: (7, 5))
    _run(case, device, dtype)
    _run(case, device, dtype, dtype, bias=False)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_more_adapters_than_a_launch_takes(device, dtype):
    ranks = [1 + i % 3 for i in range(83)]
    _run(([82, 3, -1, 80, 79, 0], 1, 16, 16, ranks), device, dtype, bias=False)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_instruction_sets_and_threads(dtype, isa):
    threads = torch.get_num_threads()
    try:
        for case in CASES + MORE:
            torch.set_num_threads(2)
            parallel = _run(case, "cpu", dtype)
            torch.set_num_threads(1)
            alone = _run(case, "cpu", dtype)
            assert all(torch.equal(one, other) for one, other in zip(parallel, alone, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_each_adapter_as_if_it_were_alone(device, dtype):
    """Its gradients, and its samples' of x, to the bit: nothing depends on who else is in the batch."""
    y, x, _, a, b, _, scalings = _case(([0, 1, 0, 1], 3, 48, 40, [4, 6]), dtype)
    y, x = y.to(device), x.to(device)
    a, b = ([t.to(device) for t in group] for group in (a, b))
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)

    def run(adapters):
        order, starts = pf.ops.segments(torch.tensor(adapters, device=str(device)), 2)
        return _gradients(pf.ops.segmented_lora, y, x, order, starts, a, b, [None] * 2, scalings, cotangent)

    together, first, second = run([0, 1, 0, 1]), run([0, -1, 0, -1]), run([-1, 1, -1, 1])
    for name, i in (("a", 2), ("b", 4)):
        assert torch.equal(together[i], first[i]) and torch.equal(together[i + 1], second[i + 1]), name
        assert not first[i + 1].any() and not second[i].any()
    assert torch.equal(together[1][::2], first[1][::2]) and torch.equal(together[1][1::2], second[1][1::2])


@pytest.mark.parametrize("wanted", ["x", "a0", "b1", "bias0", "y", "a0 b0 bias0"])
def test_only_what_is_wanted(device, wanted):
    y, x, adapters, a, b, biases, scalings = _case(([1, 0, -1, 1], 2, 24, 16, [3, 5]), F32)
    order, starts = pf.ops.segments(adapters, 2)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    named = {"y": y, "x": x} | {f"{kind}{i}": t for kind, group in (("a", a), ("b", b), ("bias", biases))
                                for i, t in enumerate(group) if t is not None}  # fmt: skip
    everything = dict(zip(
        ["y", "x", "a0", "a1", "b0", "b1", "bias0"],
        _gradients(reference, y, x, order, starts, a, b, biases, scalings, cotangent), strict=True,
    ))  # fmt: skip
    leaves = {name: t.to(device).detach().clone() for name, t in named.items()}
    for name in wanted.split():
        leaves[name].requires_grad_()
    out = pf.ops.segmented_lora(
        leaves["y"], leaves["x"], order.to(device), starts.to(device), [leaves["a0"], leaves["a1"]],
        [leaves["b0"], leaves["b1"]], [leaves["bias0"], None], scalings,
    )  # fmt: skip
    out.backward(cotangent.to(device))
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted.split()), name
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.cpu(), everything[name], msg=name)


def test_strided_inputs_and_several_dimensions(device):
    y, x, adapters, a, b, biases, scalings = _case(([1, 0], 6, 16, 8, [3, 5]), F32)
    order, starts = pf.ops.segments(adapters, 2)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    exact = _gradients(reference, y, x, order, starts, a, b, biases, scalings, cotangent)
    wide = torch.cat([x, x], dim=2).to(device)[:, :, :16].view(2, 2, 3, 16).requires_grad_()
    factors = [[t.t().contiguous().t().to(device).requires_grad_() for t in group] for group in (a, b)]
    biases = [None if t is None else t.to(device).requires_grad_() for t in biases]
    given = y.to(device).view(2, 2, 3, 8).requires_grad_()
    out = pf.ops.segmented_lora(given, wide, order.to(device), starts.to(device), *factors, biases, scalings)
    leaves = _leaves(given, wide, *factors, biases)
    strided = cotangent.to(device).view(2, 2, 3, 8).transpose(-1, -2).contiguous().transpose(-1, -2)
    for ours, theirs in zip(torch.autograd.grad(out, leaves, strided), exact, strict=True):
        torch.testing.assert_close(ours.cpu().reshape(theirs.shape), theirs)
    total = torch.autograd.grad(
        pf.ops.segmented_lora(given, wide, order.to(device), starts.to(device), *factors, biases, scalings).sum(),
        leaves,
    )  # a cotangent whose strides are zero
    assert all(torch.isfinite(t).all() for t in total)


def test_misaligned_memory(device):
    """Tensors that begin two bytes into their memory take the kernels without vectors."""
    y, x, adapters, a, b, _, scalings = _case(([1, 0, 1], 2, 32, 16, [3, 5]), BF16)
    order, starts = pf.ops.segments(adapters, 2)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(BF16)
    double = [t.double() for t in (y, x)], [t.double() for t in a], [t.double() for t in b]
    exact = _gradients(reference, *double[0], order, starts, *double[1:], [None] * 2, scalings, cotangent.double())

    def shifted(t):
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=str(device))
        memory[1:] = t.reshape(-1).to(device)
        return memory[1:].view(t.shape).detach().requires_grad_()

    leaves = [shifted(t) for t in (y, x, *a, *b)]
    out = pf.ops.segmented_lora(
        *leaves[:2], order.to(device), starts.to(device), leaves[2:4], leaves[4:], None, scalings
    )
    for ours, truth in zip(torch.autograd.grad(out, leaves, shifted(cotangent).detach()), exact, strict=True):
        assert (ours.cpu().double() - truth).norm() <= 1e-2 * truth.norm()


@pytest.mark.parametrize("device", ["emulated", "cuda"], indirect=True)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_wrong_numbers_on_the_device_never_leave_the_tensors(dtype, device):
    y, x, _, a, b, biases, scalings = _case(([1, 0, 1], 2, 8, 8, [2, 3]), dtype)
    leaves = [t.to(device).requires_grad_() for t in _leaves(y, x, a, b, biases)]
    for order, starts in (
        ([7, 0, -1], [0, 1, 3]),
        ([0, 1, 2], [0, 1, 900]),
        ([0, 1, 2], [-5, 1, 3]),
        ([0, 1, 2], [3, 2, 1]),
    ):
        ints = [torch.tensor(values, dtype=torch.int32, device=str(device)) for values in (order, starts)]
        out = pf.ops.segmented_lora(*leaves[:2], *ints, leaves[2:4], leaves[4:6], [leaves[6], None], scalings)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_two_launches_whatever_the_number_of_adapters(device):
    module = _cuda.target(torch.empty(1), "test").module
    y, x, adapters, a, b, _, scalings = _case((list(range(20)), 1, 8, 8, [2] * 20), F32)
    order, starts = pf.ops.segments(adapters, 20)
    leaves = [t.requires_grad_() for t in (x, *a, *b)]
    out = pf.ops.segmented_lora(y, x, order, starts, a, b, None, scalings)
    before = sum(dict(module.emu_launches()).values())
    torch.autograd.grad(out.sum(), leaves)
    assert sum(dict(module.emu_launches()).values()) - before == 2


def test_no_samples_and_no_adapters(device):
    where = {"device": str(device)}
    y, x = torch.ones(0, 3, 4, **where).requires_grad_(), torch.ones(0, 3, 8, **where)
    order, starts = pf.ops.segments(torch.zeros(0, dtype=torch.int64, **where), 1)
    a, b = torch.ones(2, 8, **where).requires_grad_(), torch.ones(4, 2, **where).requires_grad_()
    pf.ops.segmented_lora(y, x, order, starts, [a], [b]).sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a)) and torch.equal(b.grad, torch.zeros_like(b))
    y, x = torch.ones(2, 4, **where).requires_grad_(), torch.ones(2, 8, **where).requires_grad_()
    order, starts = pf.ops.segments(torch.tensor([-1, -1], **where), 0)
    pf.ops.segmented_lora(y, x, order, starts, [], []).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x)) and torch.equal(y.grad, torch.ones_like(y))


def test_factors_of_several_dtypes(device):
    """Taken to fp32 on the way; the gradients come in the factors' own."""
    y, x, adapters, a, b, _, scalings = _case(([1, 0, 1], 2, 16, 8, [3, 5]), BF16)
    y, x, adapters = y.to(device), x.to(device), adapters.to(device)
    a, b = ([t.to(device) for t in group] for group in (a, b))
    a = [a[0].bfloat16().requires_grad_(), a[1].requires_grad_()]
    b = [t.half().requires_grad_() for t in b]
    order, starts = pf.ops.segments(adapters, 2)
    pf.ops.segmented_lora(y, x, order, starts, a, b, None, scalings).sum().backward()
    assert [t.grad.dtype for t in (*a, *b)] == [BF16, F32, F16, F16]


def test_gradients_by_finite_differences():
    """fp64, which torch computes: the reference's own gradients, and y's left as it was."""
    y, x, adapters, a, b, biases, scalings = _case(([1, -1, 0, 1], 2, 6, 5, [2, 3]), torch.float64, torch.float64)
    biases = [None if t is None else t.double() for t in biases]
    order, starts = pf.ops.segments(adapters, 2)
    leaves = [y, x, *a, *b]

    def f(y, x, a0, a1, b0, b1):
        return pf.ops.segmented_lora(y, x, order, starts, [a0, a1], [b0, b1], biases, scalings)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in leaves])
    former = y.detach().clone()
    assert f(*leaves) is not y and torch.equal(y, former)


def test_compiled_and_checked_as_an_op():
    y, x, adapters, a, b, biases, scalings = _case(CASES[1], F32)
    order, starts = pf.ops.segments(adapters, 3)
    leaves = [t.requires_grad_() for t in (y, x, *a, *b)]
    arguments = (y, x, order, starts, a, b, biases, scalings)
    torch.library.opcheck(torch.ops.pyfastpeft.segmented_lora.default, arguments)
    mask = [True, False, True]
    torch.library.opcheck(
        torch.ops.pyfastpeft.segmented_lora_backward.default,
        (torch.randn(y.shape), x.detach(), order, starts, [t.detach() for t in a], [t.detach() for t in b], scalings, True,
         mask, mask, mask), test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip

    def loss(y, x, *factors):
        return pf.ops.segmented_lora(y, x, order, starts, factors[:3], factors[3:], biases, scalings).square().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves), leaves)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_second_derivative():
    """By torch operations, where create_graph asks for one; the first is what the kernels give."""
    y, x, adapters, a, b, biases, scalings = _case(CASES[1], F32)
    order, starts = pf.ops.segments(adapters, 3)
    leaves = [t.requires_grad_() for t in (x, a[0], a[2], b[0], b[2], biases[0])]

    def second(function):
        out = function(y, x, order, starts, a, b, biases, scalings)
        first = torch.autograd.grad(out.pow(3).sum(), leaves, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for ours, theirs in zip(second(pf.ops.segmented_lora), second(reference), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    order, starts = pf.ops.segments(torch.full_like(adapters, -1), 3)
    out = pf.ops.segmented_lora(y, x, order, starts, a, b, biases, scalings)
    assert not any(g.any() for g in torch.autograd.grad(out.pow(3).sum(), leaves, create_graph=True))
