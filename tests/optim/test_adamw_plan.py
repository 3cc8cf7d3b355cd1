"""AdamW's plans: a step that uses what the one before left does what a fresh optimizer would, whatever happened between."""

import copy

import pytest
import torch
from torch import nn

import pyfastpeft as pf
from pyfastpeft.optim import adamw_plan


@pytest.fixture
def planned(monkeypatch):
    """Counts the groups that were stepped with their plan."""
    counts = []
    run = adamw_plan.Plan.run

    def counted(self, *args):
        done = run(self, *args)
        counts.append(done)
        return done

    monkeypatch.setattr(adamw_plan.Plan, "run", counted)
    return counts


def _params(bits8=False):
    torch.manual_seed(0)
    sizes = [(5000,), (70, 70), (4097,)] if bits8 else [(30, 40), (7,), (300,), (1,)]
    return [nn.Parameter(torch.randn(s)) for s in sizes]


def _set_grads(params, t, skip=()):
    generator = torch.Generator().manual_seed(t)
    for i, p in enumerate(params):
        p.grad = None if i in skip else torch.randn(p.shape, generator=generator).to(p.dtype)


def _between_nothing(params, optimizer):
    pass


def _between_less_grads(params, optimizer):
    params[1].grad = None


def _between_new_memory(params, optimizer):
    params[0].data = params[0].data.clone()


def _between_state_moved(params, optimizer):
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone()


def _between_state_data_moved(params, optimizer):
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def _between_another_state(params, optimizer):
    optimizer.state[params[0]] = {k: v.clone() for k, v in optimizer.state[params[0]].items()}


def _between_state_lost(params, optimizer):
    del optimizer.state[params[0]]


def _between_loaded(params, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _between_grad_layout(params, optimizer):
    p = params[0] if params[0].dim() == 2 else params[1]
    p.grad = p.grad.t().contiguous().t()


def _between_other_options(params, optimizer):
    optimizer.param_groups[0].update(lr=0.3, weight_decay=0.2, betas=(0.5, 0.6), maximize=True)


def _between_added(params, optimizer):
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(50)))
    optimizer.param_groups[0]["params"][-1].grad = torch.ones(50)


def _between_removed(params, optimizer):
    del optimizer.param_groups[0]["params"][0]


BETWEEN = {name.removeprefix("_between_"): f for name, f in list(globals().items()) if name.startswith("_between_")}


@pytest.mark.parametrize("bits8", [False, True])
@pytest.mark.parametrize("between", BETWEEN)
def test_follows_what_happens_between_steps(between, bits8, planned, monkeypatch):
    ends = []
    for with_plans in (True, False):
        params = _params(bits8)
        optimizer = pf.optim.AdamW(params, lr=1e-2, state_bits=8 if bits8 else 32)
        for t in range(6):
            _set_grads(params, t)
            if t == 3:
                BETWEEN[between](params, optimizer)
            if not with_plans:
                optimizer._plans = {}
            optimizer.step()
        ends.append([*[p.detach() for p in optimizer.param_groups[0]["params"]], *[p.detach() for p in params]])
        ends[-1] += [v for s in optimizer.state.values() for v in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert planned.count(True) >= 3


def test_a_parameter_that_gets_its_first_gradient_later(planned):
    params = _params()
    optimizer = pf.optim.AdamW(params)
    for t in range(3):
        _set_grads(params, t, skip=(2,))
        optimizer.step()
    assert planned == [True, True] and params[2] not in optimizer.state
    _set_grads(params, 3)
    optimizer.step()
    assert planned == [True, True, False] and optimizer.state[params[2]]["step"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["master_weights", "stochastic_rounding"])
def test_low_precision(dtype, way, planned):
    ends = []
    for with_plans in (True, False):
        params = [nn.Parameter(p.detach().to(dtype)) for p in _params()]
        optimizer = pf.optim.AdamW(params, lr=1e-2, **{way: True})
        torch.manual_seed(3)
        for t in range(4):
            _set_grads(params, t)
            if not with_plans:
                optimizer._plans = {}
            optimizer.step()
        ends.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True)) and planned == [True] * 3


def test_grad_scale_and_learning_rate_tensors(planned):
    ends = []
    for with_plans in (True, False):
        params = _params()
        optimizer = pf.optim.AdamW(params, lr=torch.tensor(1e-2))
        for t in range(6):
            _set_grads(params, t)
            optimizer.param_groups[0]["lr"].mul_(0.5)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(float(t == 2))
            if not with_plans:
                optimizer._plans = {}
            optimizer.step()
        assert optimizer.state[params[0]]["step"] == 5
        ends.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True)) and planned == [True] * 5


def test_the_parameters_versions_rise(planned):
    params = _params()
    optimizer = pf.optim.AdamW(params)
    for t in range(2):
        _set_grads(params, t)
        y = (params[0] * params[0]).sum()  # saves the parameter for backward
        optimizer.step()
    assert planned == [True]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_modes_and_the_profiler_see_the_op(planned):
    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += (func.name(),)
            return func(*args, **(kwargs or {}))

    params = _params()
    optimizer = pf.optim.AdamW(params)
    _set_grads(params, 0)
    optimizer.step()
    with Names() as names:
        optimizer.step()
    assert "pyfastpeft::adamw_" in names.seen
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert any(e.key == "pyfastpeft::adamw_" for e in profile.key_averages())
    optimizer.step()
    assert planned == [False, False, True]


def test_a_parameter_transposed_in_place_is_still_refused(planned):
    """Same address, same shape: its values no longer stand in the order of its state's."""
    p = nn.Parameter(torch.randn(70, 70))
    optimizer = pf.optim.AdamW([p])
    _set_grads([p], 0)
    optimizer.step()
    p.data = p.data.t()
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] has strides \(70, 1\), expected params\[0\]'s \(1, 70\)"):
        optimizer.step()
    assert planned == [False]


def test_a_sparse_gradient_is_still_refused(planned):
    table = nn.Embedding(10, 4, sparse=False)
    optimizer = pf.optim.AdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    optimizer.step()
    table.weight.grad = table.weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="gradient of parameter 0 of group 0 is sparse"):
        optimizer.step()
    assert planned == [False]
