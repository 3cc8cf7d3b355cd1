"""adamw_: bit for bit the reference on every instruction set; against torch and fp64; as a torch op; bad input."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

import pyfastpeft as pf
from pyfastpeft.reference import adamw as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 255, 256, 257, 1000, 5003]
OPTIONS = [
    {},
    {"decoupled": False},
    {"maximize": True, "weight_decay": 0.1},
    {"beta1": 0.3, "beta2": 0.9, "eps": 1e-4},
    {"weight_decay": 0.0, "beta1": 0.0},
]


def _lists(sizes, dtype=torch.float32, grad_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    grads = [torch.randn(n, generator=generator).to(grad_dtype or dtype) for n in sizes]
    zeros = [[torch.zeros(n) for n in sizes] for _ in range(2)]
    return params, grads, *zeros, [torch.zeros(()) for _ in sizes]


def _grads(like, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(g.shape, generator=generator).to(g.dtype) for g in like]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_reference(options, isa):
    params, grads, m, v, steps = _lists(SIZES)
    expected = [(p.clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    for t in range(1, 6):
        grads = _grads(grads, t)
        pf.ops.adamw_(params, grads, m, v, steps, lr=1e-2, **options)
        expected = [
            reference.adamw_step(p, g, a, b, t, lr=1e-2, **options)
            for (p, a, b), g in zip(expected, grads, strict=True)
        ]
    for i, (p, a, b) in enumerate(expected):
        assert torch.equal(params[i], p) and torch.equal(m[i], a) and torch.equal(v[i], b), SIZES[i]
    assert all(s == 5 for s in steps)


@pytest.mark.parametrize("grad_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_low_precision_parameters(dtype, grad_dtype, isa):
    """Every step is the fp32 step of the parameter as it is, rounded once; with a master, of the master."""
    for with_master in (False, True):
        params, grads, m, v, steps = _lists(SIZES, dtype, torch.float32 if grad_dtype == "float32" else None)
        masters = [p.float() for p in params] if with_master else []
        state = [(p.float(), torch.zeros(p.shape), torch.zeros(p.shape)) for p in params]
        for t in range(1, 4):
            grads = _grads(grads, t)
            pf.ops.adamw_(params, grads, m, v, steps, masters=masters, lr=1e-2)
            for i, (p, a, b) in enumerate(state):
                p, a, b = reference.adamw_step(p, grads[i], a, b, t, lr=1e-2)
                assert torch.equal(params[i], p.to(dtype)) and torch.equal(m[i], a) and torch.equal(v[i], b)
                assert not with_master or torch.equal(masters[i], p)
                state[i] = (p if with_master else p.to(dtype).float(), a, b)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_stochastic_rounding(dtype, isa):
    params, grads, m, v, steps = _lists(SIZES, dtype)
    params[4].mul_(1e-6)  # fp16: subnormals
    before = [p.clone() for p in params]
    seed = torch.tensor([0x1234567890ABCDE])
    pf.ops.adamw_(params, grads, m, v, steps, lr=1e-4, rounding_seed=seed)
    for i, p in enumerate(before):
        exact, *_ = reference.adamw_step(p, grads[i], torch.zeros(p.shape), torch.zeros(p.shape), 1, lr=1e-4)
        assert torch.equal(params[i], reference.round_stochastically(exact, dtype, seed.item(), i))
        assert ((params[i].float() - exact).abs() <= (torch.finfo(dtype).eps * exact.abs()).clamp(min=6e-8)).all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("value", [1.0 + 0.3 / 128, -3.3e-6, 1e-8, 0.1])
def test_stochastic_rounding_is_unbiased(dtype, value):
    n = 1 << 16
    got = reference.round_stochastically(torch.full((n,), value), dtype, 7, 3).double()
    low, high = got.min(), got.max()
    assert low <= torch.tensor(value).double() <= high and len(got.unique()) <= 2
    deviation = (high - low) / 2 / n**0.5
    assert abs(got.mean() - torch.tensor(value).double()) <= 5 * deviation


def test_small_updates_survive_only_stochastic_rounding():
    ones = torch.ones(4096, dtype=torch.bfloat16)
    moved = {}
    for seed in (None, torch.tensor([1])):
        p, m, v, step = ones.clone(), torch.zeros(4096), torch.zeros(4096), torch.zeros(())
        for t in range(50):
            each = None if seed is None else seed + t
            pf.ops.adamw_([p], [ones], [m], [v], [step], lr=1e-5, weight_decay=0.0, rounding_seed=each)
        moved[seed is None] = (1 - p.double()).mean().item()
    assert moved[True] == 0.0
    assert moved[False] == pytest.approx(50 * 1e-5, rel=0.1)


def test_same_bits_on_every_thread_count(isa):
    former = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            params, grads, m, v, steps = _lists([3, 70_001, 1, 40_000, 0, 256], torch.bfloat16)
            pf.ops.adamw_(params, grads, m, v, steps, lr=1e-2, rounding_seed=torch.tensor([5]))
            results.append([*params, *m, *v])
    finally:
        torch.set_num_threads(former)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_error_against_fp64_is_at_most_twice_torchs():
    torch.manual_seed(0)
    start = torch.randn(4096)
    ours, theirs, exact = start.clone(), torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.double())
    m, v, step = torch.zeros(4096), torch.zeros(4096), torch.zeros(())
    peers = [torch.optim.AdamW([p], lr=1e-2, foreach=False) for p in (theirs, exact)]
    for _ in range(100):
        grad = torch.randn(4096) + 0.2
        theirs.grad, exact.grad = grad.clone(), grad.double()
        for peer in peers:
            peer.step()
        pf.ops.adamw_([ours], [grad], [m], [v], [step], lr=1e-2)
    truth = exact.detach()
    assert (ours.double() - truth).norm() <= 2 * (theirs.detach().double() - truth).norm()


def test_grad_scaler_protocol():
    params, grads, m, v, steps = _lists([300])
    plain = [t.clone() for t in (params[0], m[0], v[0])]
    pf.ops.adamw_([plain[0]], grads, [plain[1]], [plain[2]], [torch.zeros(())], lr=1e-2)
    scaled = [grads[0] * 1024]
    kept = scaled[0].clone()
    before = params[0].clone()
    scale = torch.tensor(1024.0)
    pf.ops.adamw_(params, scaled, m, v, steps, lr=1e-2, grad_scale=scale, found_inf=torch.ones(1))
    assert torch.equal(params[0], before) and steps[0] == 0 and not m[0].any()
    pf.ops.adamw_(params, scaled, m, v, steps, lr=1e-2, grad_scale=scale, found_inf=torch.zeros(1))
    assert torch.equal(params[0], plain[0]) and torch.equal(m[0], plain[1]) and steps[0] == 1
    assert torch.equal(scaled[0], kept)


def test_layouts():
    base = torch.randn(6, 8, 4)
    dense = base.transpose(0, 2)
    p, g = dense.clone(), torch.randn(6, 8, 4).transpose(0, 2)
    assert p.stride() == g.stride() and not p.is_contiguous()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    expected, *_ = reference.adamw_step(p.clone(), g, m.clone(), v.clone(), 1, lr=1e-2)
    pf.ops.adamw_([p], [g], [m], [v], [torch.zeros(())], lr=1e-2)
    assert torch.equal(p, expected)
    gaps = torch.randn(8, 8)[:, :4]
    with pytest.raises(ValueError, match=r"grads\[0\] has strides \(4, 1\), expected params\[0\]'s \(8, 1\)"):
        pf.ops.adamw_([gaps], [torch.randn(8, 4)], [torch.zeros(8, 4)], [torch.zeros(8, 4)], [torch.zeros(())], lr=1)
    with pytest.raises(ValueError, match="without gaps"):
        pf.ops.adamw_([gaps], [gaps], [gaps], [gaps], [torch.zeros(())], lr=1)
    with pytest.raises(ValueError, match="expected params"):
        pf.ops.adamw_([p], [g.contiguous()], [m], [v], [torch.zeros(())], lr=1)


def test_nan_and_infinity_go_where_torchs_go(isa):
    grad = torch.randn(64)
    grad[[1, 20, 33]] = torch.tensor([float("nan"), float("inf"), 1e30])
    p = torch.nn.Parameter(torch.randn(64))
    ours, m, v, step = p.detach().clone(), torch.zeros(64), torch.zeros(64), torch.zeros(())
    peer = torch.optim.AdamW([p], foreach=False)
    for _ in range(2):
        p.grad = grad.clone()
        peer.step()
        pf.ops.adamw_([ours], [grad], [m], [v], [step], lr=1e-3)
    torch.testing.assert_close(ours, p.detach(), rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(m, peer.state[p]["exp_avg"], rtol=0, atol=0, equal_nan=True)


def test_nothing_to_do():
    pf.ops.adamw_([], [], [], [], [], lr=1e-3)
    params, grads, m, v, steps = _lists([0, 3, 0])
    pf.ops.adamw_(params, grads, m, v, steps, lr=1e-3)
    assert [s.item() for s in steps] == [1, 1, 1] and m[1].all()


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 600), max_size=6), seed=st.integers(0, 10**6), lr=st.floats(0, 1))
def test_any_list(sizes, seed, lr):
    params, grads, m, v, steps = _lists(sizes, torch.float32, seed=seed)
    before = [p.clone() for p in params]
    pf.ops.adamw_(params, grads, m, v, steps, lr=torch.tensor(lr, dtype=torch.float64))
    for i, p in enumerate(before):
        expected = reference.adamw_step(p, grads[i], torch.zeros_like(p), torch.zeros_like(p), 1, lr=lr)
        assert all(torch.equal(a, b) for a, b in zip((params[i], m[i], v[i]), expected, strict=True))


FLAT = dict(
    lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, decoupled=True, maximize=False, state_bits=32
)  # fmt: skip


def test_opcheck():
    torch.library.opcheck(torch.ops.pyfastpeft.adamw_, (*_lists([300, 0, 20]), [], [], []), FLAT)


def test_version_counters():
    params, grads, m, v, steps = _lists([10, 20])
    params = [torch.nn.Parameter(p) for p in params]
    y = (params[0] * params[0]).sum()  # saves the parameter for backward
    pf.ops.adamw_(params, grads, m, v, steps, lr=1e-3)
    assert all(t._version == 1 for t in [*params, *m, *v, *steps]) and all(g._version == 0 for g in grads)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_meta_fake_and_compile():
    meta = [[t.to("meta") for t in each] for each in _lists([10, 20])]
    pf.ops.adamw_(*meta, lr=1e-3)
    with FakeTensorMode():
        pf.ops.adamw_(*_fake_lists(), lr=1e-3)

    def run(*lists):
        torch.ops.pyfastpeft.adamw_(*lists, [], [], [], **FLAT)
        return lists[0][0] * 2

    eager = _lists([10, 20])
    compiled = copy.deepcopy(eager)
    expected = run(*eager)
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(*compiled), expected)
    assert all(torch.equal(a, b) for x, y in zip(eager, compiled, strict=True) for a, b in zip(x, y, strict=True))


def _fake_lists():
    return [torch.empty(3)], [torch.empty(3)], [torch.empty(3)], [torch.empty(3)], [torch.empty(())]


def test_bad_input():
    def call(replace=None, **options):
        lists = dict(zip(("params", "grads", "exp_avgs", "exp_avg_sqs", "steps"), _lists([8, 4]), strict=True))
        lists.update(replace or {})
        pf.ops.adamw_(**lists, **{"lr": 1e-3, **options})

    eight = torch.zeros(8)
    for replace, error, match in (
        ({"grads": [eight]}, ValueError, "grads has 1 tensors, expected 2"),
        ({"masters": [eight]}, ValueError, r"masters has 1 tensors, expected 2.*\(or none at all\)"),
        (
            {"grads": [eight, torch.zeros(2, 2)]},
            ValueError,
            r"grads\[1\] has shape \(2, 2\), expected params\[1\]'s \(4,\)",
        ),
        ({"exp_avgs": [eight, eight]}, ValueError, r"exp_avgs\[1\] has shape"),
        (
            {"grads": [eight.half(), torch.zeros(4)]},
            TypeError,
            r"grads\[0\] has dtype torch.float16, expected float32 or",
        ),
        ({"params": [eight.double(), torch.zeros(4)]}, TypeError, r"params\[0\] has dtype torch.float64"),
        ({"exp_avgs": [eight.bfloat16(), torch.zeros(4)]}, TypeError, r"exp_avgs\[0\] has dtype torch.bfloat16"),
        ({"exp_avgs": [eight.byte(), torch.zeros(4)]}, TypeError, r"exp_avgs\[0\] is 8-bit.*state_bits=8"),
        ({"steps": [torch.zeros(()), torch.zeros(2)]}, TypeError, r"steps\[1\] is torch.float32 with 2 values"),
        ({"steps": [torch.zeros(()), torch.zeros((), dtype=torch.int64)]}, TypeError, r"steps\[1\] is torch.int64"),
    ):
        with pytest.raises(error, match=match):
            call(replace)
    with pytest.raises(ValueError, match="state_bits is 16, expected 32 or 8"):
        call(state_bits=16)
    with pytest.raises(TypeError, match="rounding_seed is torch.float32 with 1 values"):
        call(rounding_seed=torch.zeros(1))
    p = torch.zeros(4)
    with pytest.raises(ValueError, match=r"params\[1\] is the same memory as params\[0\]"):
        call(
            {
                n: [p, p] if n == "params" else [p.clone(), p.clone()]
                for n in ("params", "grads", "exp_avgs", "exp_avg_sqs")
            }
        )
