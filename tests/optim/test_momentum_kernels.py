"""Lion's and SGD's compiled steps: the bits of their `update` in torch, and plans that follow what happens between steps."""

import copy
from array import array

import pytest
import torch
from torch import nn

import pyfastpeft as pf
from pyfastpeft._native import _C
from pyfastpeft.optim import adamw_plan
from pyfastpeft.optim import rule as rule_module

RULES = {
    "Lion": (pf.optim.Lion, {"weight_decay": 0.1}),
    "Lion, maximize": (pf.optim.Lion, {"maximize": True}),
    "SGD": (pf.optim.SGD, {"weight_decay": 0.1, "dampening": 0.2}),
    "SGD, nesterov": (pf.optim.SGD, {"nesterov": True, "maximize": True}),
}
SIZES = [(1,), (7,), (16, 17), (255,), (256,), (257,), (0,), (4099,)]


def _params(dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(s).to(dtype)) for s in SIZES]


def _set_grads(params, t, dtype=None):
    generator = torch.Generator().manual_seed(t)
    for p in params:
        grad = torch.randn(p.shape, generator=generator)
        if p.numel() > 6:
            grad.view(-1)[3] = 0.0
            grad.view(-1)[5] = -0.0
        p.grad = None if dtype is not None and dtype != p.dtype else grad.to(p.dtype)
        if p.grad is None:
            p.grad_dtype = dtype
            p.grad = grad.to(dtype)


def _in_torch(monkeypatch):
    monkeypatch.setattr(rule_module, "somebody_listens", lambda: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", RULES)
def test_the_bits_of_the_rule_in_torch(kind, dtype, isa, monkeypatch):
    cls, options = RULES[kind]
    ends = []
    for compiled in (True, False):
        if not compiled:
            _in_torch(monkeypatch)
        params = _params(dtype)
        optimizer = cls(params, lr=1e-2, **options)
        for t in range(5):
            _set_grads(params, t)
            if not compiled:
                optimizer._plans = {}
            optimizer.step()
        ends.append([p.detach() for p in params] + [v for s in optimizer.state.values() for v in s.values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_gradients_of_another_dtype_and_thread_counts():
    ends = []
    for threads in (1, 2):
        former = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(300_000).bfloat16()), nn.Parameter(torch.randn(70_001))]
        optimizer = pf.optim.Lion(params, lr=1e-2)
        for t in range(3):
            _set_grads(params, t)
            optimizer.step()
        torch.set_num_threads(former)
        ends.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def _less_grads(params, optimizer):
    params[1].grad = None


def _new_memory(params, optimizer):
    params[0].data = params[0].data.clone()


def _state_moved(params, optimizer):
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone()


def _state_lost(params, optimizer):
    del optimizer.state[params[3]]


def _loaded(params, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _grad_layout(params, optimizer):
    params[2].grad = params[2].grad.t().contiguous().t()


def _other_options(params, optimizer):
    optimizer.param_groups[0].update(lr=0.3, weight_decay=0.2, maximize=True)


def _added(params, optimizer):
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(50)))
    optimizer.param_groups[0]["params"][-1].grad = torch.ones(50)


def _removed(params, optimizer):
    del optimizer.param_groups[0]["params"][1]


BETWEEN = [_less_grads, _new_memory, _state_moved, _state_lost, _loaded, _grad_layout, _other_options, _added, _removed]


@pytest.mark.parametrize("kind", ["Lion", "SGD"])
@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
def test_plans_follow_what_happens_between_steps(kind, between, monkeypatch):
    used = []
    run = adamw_plan.Plan.run
    monkeypatch.setattr(adamw_plan.Plan, "run", lambda *args: used.append(run(*args)) or used[-1])
    cls, options = RULES[kind]
    ends = []
    for with_plans in (True, False):
        params = _params()
        optimizer = cls(params, lr=1e-2, **options)
        for t in range(6):
            _set_grads(params, t)
            if t == 3:
                between(params, optimizer)
            if not with_plans:
                optimizer._plans = {}
            optimizer.step()
        ends.append([p.detach() for p in optimizer.param_groups[0]["params"]] + [p.detach() for p in params])
        ends[-1] += [v for s in optimizer.state.values() for v in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert used.count(True) >= 3


def test_what_the_compiled_step_does_not_take():
    """float64, two parameters in one memory: stepped by the rule in torch."""
    double = nn.Parameter(torch.ones(5, dtype=torch.float64))
    base = torch.ones(10)
    one, other = nn.Parameter(base[:5]), nn.Parameter(base[:5])
    for params in ([double], [one, other]):
        optimizer = pf.optim.SGD(params, lr=0.5)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert not optimizer._plans
    assert torch.equal(double, torch.full((5,), 0.5, dtype=torch.float64)) and torch.equal(base[:5], torch.zeros(5))
    with pytest.raises(TypeError, match="float64, expected float32, bfloat16 or float16"):
        pf.optim.PagedSGD([double]).step()


def test_versions_rise_and_modes_see_the_step():
    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += 1
            return func(*args, **(kwargs or {}))

    params = _params()[1:3]
    optimizer = pf.optim.Lion(params)
    for t in range(2):
        _set_grads(params, t)
        y = (params[0] * params[0]).sum()
        optimizer.step()
    assert optimizer._plans
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with Names() as names:
        optimizer.step()
    assert names.seen > 5


def test_bad_input_of_the_bindings():
    p, g, m, step = torch.ones(4), torch.ones(4), torch.ones(4), torch.zeros(())
    good = [array("Q", [t.data_ptr()]) for t in (p, g, m, step)] + [array("q", [4]), bytes([0])]
    scalars = (0, 0.1, 0.0, 0.9, 0.99, False, False)
    for i, (bad, text) in enumerate([
        (array("Q", []), "has 1 entries"), (array("Q", [0]), "grads has no memory"), (array("Q", [0]), "momenta has no"),
        (array("Q", [0]), "steps has no memory"), (array("q", [-1]), "params\\[0\\] has values 0 to -1"),
        (bytes([3]), "and kind 3"),
    ]):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            _C.momentum_cpu(*good[:i], bad, *good[i + 1 :], *scalars)
    with pytest.raises(ValueError, match="rule is 2"):
        _C.momentum_cpu(*good, 2, *scalars[1:])
    page = torch.zeros(64, dtype=torch.uint8)
    rest = (array("Q", [p.data_ptr()]), array("Q", [g.data_ptr()]), array("q", [4]))
    for row, text in (
        ((1, 0, 0, 4, 0, 16), "is of tensor 1"), ((0, 0, 2, 4, 0, 16), "values 2 to 6 of 4"),
        ((0, 0, 0, 4, 62, 16), "bytes at 62"), ((0, 0, 0, 4, 0, 52), "16 bytes at 52 of a page of 64"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            _C.momentum_pages_cpu([array("q", row)], [page.data_ptr()], 64, 1, *rest, *scalars)
    with pytest.raises(ValueError, match="a table of 5 words"):
        _C.momentum_pages_cpu([array("q", [0] * 5)], [page.data_ptr()], 64, 1, *rest, *scalars)
    assert torch.equal(p, torch.ones(4))
