"""Lion and SGD: the written rule, torch's SGD, and the same bits in pages."""

import os

import pytest
import torch
from torch import nn

import pyfastpeft as pf

SHAPES = [(300, 130), (7,), (20000,), (1,), (0,), (33, 100), (256,)]
KINDS = {
    "Lion": (pf.optim.Lion, pf.optim.PagedLion, {"weight_decay": 0.1}),
    "SGD": (pf.optim.SGD, pf.optim.PagedSGD, {"weight_decay": 0.1, "dampening": 0.2}),
    "SGD, nesterov, maximize": (pf.optim.SGD, pf.optim.PagedSGD, {"nesterov": True, "maximize": True}),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def _params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def _step(params, optimizer, t, skip=()):
    generator = torch.Generator().manual_seed(1000 + t)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if i in skip else grad
    optimizer.step()


def test_lion_is_the_papers():
    params = _params()
    optimizer = pf.optim.Lion(params, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    p, m = [q.detach().double() for q in params], [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    for t in range(20):
        _step(params, optimizer, t)
        for i, q in enumerate(params):
            g = q.grad.double()
            p[i] = p[i] * (1 - 1e-2 * 0.1) - 1e-2 * torch.sign(0.9 * m[i] + 0.1 * g)
            m[i] = 0.99 * m[i] + 0.01 * g
    for q, expected, moment in zip(params, p, m, strict=True):
        torch.testing.assert_close(q.double(), expected, rtol=1e-6, atol=1e-6)
        if q.numel():
            torch.testing.assert_close(optimizer.state[q]["exp_avg"].double(), moment, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("cls", "scale"), [(pf.optim.Lion, 1.0), (pf.optim.SGD, 0.5)])
def test_low_precision_parameters_are_rounded_once_a_step(cls, scale):
    p = nn.Parameter(torch.ones(300, dtype=torch.bfloat16))
    optimizer = cls([p], lr=2.0**-6)
    p.grad = torch.full_like(p, scale)
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, 1 - scale * 2.0**-6)), (
        "the first step is lr times the gradient, or its sign"
    )
    assert next(v for k, v in optimizer.state[p].items() if k != "step").dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"dampening": 0.3, "weight_decay": 0.1}, {"nesterov": True, "maximize": True}])
def test_sgd_is_torchs_and_state_dicts_interchange(tmp_path, options):
    a, b = _params(), _params()
    theirs = torch.optim.SGD(a, lr=1e-2, momentum=0.9, foreach=False, **options)
    ours = pf.optim.PagedSGD(b, lr=1e-2, momentum=0.9, resident_bytes=131072, spill_dir=tmp_path, **options)
    for t in range(10):
        _step(a, theirs, t)
        _step(b, ours, t)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    c, d = ([nn.Parameter(p.detach().clone()) for p in a] for _ in range(2))
    from_torch, into_torch = pf.optim.PagedSGD(c, resident_bytes=131072), torch.optim.SGD(d, foreach=False)
    from_torch.load_state_dict({k: v for k, v in theirs.state_dict().items()})
    into_torch.load_state_dict(ours.state_dict())
    for t in range(10, 13):
        for params, optimizer in ((a, theirs), (c, from_torch), (d, into_torch)):
            _step(params, optimizer, t)
    for p, q, r in zip(a, c, d, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(p, r, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [131072, 200_000, None])
@pytest.mark.parametrize("kind", KINDS)
def test_paged_and_unpaged_give_the_same_bits(tmp_path, kind, budget, dtype):
    unpaged, paged, options = KINDS[kind]
    a, b = _params(dtype), _params(dtype)
    plain = unpaged(a, lr=1e-2, **options)
    pages = paged(b, lr=1e-2, resident_bytes=budget, spill_dir=tmp_path, **options)
    for t in range(30):
        skip = {t % 7} if t % 4 == 3 else ()
        _step(a, plain, t, skip)
        _step(b, pages, t, skip)
        if t == 15:
            saved = pages.state_dict()
            pages = paged(b, lr=1.0, resident_bytes=150_000, spill_dir=tmp_path, **options)
            pages.load_state_dict(saved)
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p, q)
        values = pages.state[q].read()
        assert plain.state[p].keys() == values.keys()
        assert all(torch.equal(value, values[key]) for key, value in plain.state[p].items())
    report = pages.memory_report()
    assert report["state_bytes"] >= plain.memory_report()["state_bytes"] and os.listdir(tmp_path) == []
    assert (report["spilled_bytes"] > 0) == (report["budget_bytes"] < report["state_bytes"])


def test_unusable_options():
    params = _params()
    for build, text in (
        (lambda: pf.optim.Lion(params, betas=(0.9, 1.0)), "betas"),
        (lambda: pf.optim.PagedLion(params, lr=-1), "lr is -1"),
        (lambda: pf.optim.SGD(params, momentum=0), "use torch.optim.SGD"),
        (lambda: pf.optim.PagedSGD(params, nesterov=True, dampening=0.1), "nesterov with dampening"),
    ):
        with pytest.raises(ValueError, match=text):
            build()
    lion = pf.optim.Lion(params)
    _step(params, lion, 0)
    saved = lion.state_dict()
    saved["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match="expected exp_avg of the parameter's shape"):
        lion.load_state_dict(saved)
