"""Paged states that go on elsewhere: on more or fewer devices, under another budget or parameter dtype; and training with
8-bit ones, whose losses lie within what the seed alone changes."""

import statistics

import pytest
import torch
from optim_cases import PagedOnStandIn
from torch import nn

import pyfastpeft as pf

SHAPES = [(300, 130), (7,), (60_000,), (4096,), (33, 100)]


pytestmark = pytest.mark.usefixtures("one_thread")


def _params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def _set_grads(params, t):
    generator = torch.Generator().manual_seed(t)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def _part(saved, keys):
    """The state dict of an optimizer that has these parameters of the saved one's, in this order."""
    group = {**saved["param_groups"][0], "params": list(range(len(keys)))}
    return {"state": {i: saved["state"][key] for i, key in enumerate(keys)}, "param_groups": [group]}


@pytest.mark.parametrize("bits", [32, 8])
def test_other_device_counts_and_budgets(tmp_path, bits):
    """One device's state goes on on two, each with some of the parameters, and then on the CPU."""
    options = {"lr": 1e-2, "state_bits": bits}
    reference, params = _params(), _params()
    plain = pf.optim.AdamW(reference, **options)
    one = PagedOnStandIn(params, folder=tmp_path, **options)
    for t in range(3):
        _set_grads(reference, t)
        _set_grads(params, t)
        plain.step()
        one.step()
    saved = one.state_dict()
    shares = [0, 2, 3], [1, 4]
    two = [
        PagedOnStandIn([params[i] for i in share], folder=tmp_path, transfer=transfer, **options)
        for share, transfer in zip(shares, ("copied", "in_place"), strict=True)
    ]
    for share, optimizer in zip(shares, two, strict=True):
        optimizer.load_state_dict(_part(saved, share))
    for t in range(3, 6):
        _set_grads(reference, t)
        _set_grads(params, t)
        for optimizer in (plain, *two):
            optimizer.step()
    parts = [optimizer.state_dict() for optimizer in two]
    together = {
        "state": {i: part["state"][k] for share, part in zip(shares, parts, strict=True) for k, i in enumerate(share)},
        "param_groups": saved["param_groups"],
    }
    for budget in (150_000, None):
        on_cpu = pf.optim.PagedAdamW(params, resident_bytes=budget, spill_dir=tmp_path, **options)
        on_cpu.load_state_dict(together)
        assert all(
            torch.equal(value, on_cpu.state[q][key])
            for p, q in zip(reference, params, strict=True)
            for key, value in plain.state[p].items()
        )
    _set_grads(reference, 6)
    _set_grads(params, 6)
    plain.step()
    on_cpu.step()
    assert all(torch.equal(p, q) for p, q in zip(reference, params, strict=True))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(
    ("before", "after"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("master", [False, True])
def test_another_parameter_dtype(tmp_path, before, after, bits, master):
    """The moments are fp32, or codes, whatever the parameters are: none of them is rounded to a parameter's dtype."""
    options = {"lr": 1e-2, "state_bits": bits, "master_weights": master}
    saving = pf.optim.PagedAdamW(first := _params(before), resident_bytes=200_000, spill_dir=tmp_path, **options)
    for t in range(3):
        _set_grads(first, t)
        saving.step()
    saved = saving.state_dict()
    a, b = ([nn.Parameter(p.detach().to(after)) for p in first] for _ in range(2))
    plain = pf.optim.AdamW(a, **options)
    paged = pf.optim.PagedAdamW(b, resident_bytes=150_000, spill_dir=tmp_path, **options)
    for optimizer in (plain, paged):
        optimizer.load_state_dict(saved)
    moments = ("exp_avg", "exp_avg_sq") if bits == 32 else ("state1", "absmax1", "state2", "absmax2")
    assert all(torch.equal(saved["state"][2][key], paged.state[b[2]][key]) for key in moments)
    assert ("master" in paged.state[b[2]]) == (master and after != torch.float32)
    for t in range(3, 5):
        for params, optimizer in ((a, plain), (b, paged)):
            _set_grads(params, t)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def _losses(bits, seed, folder):
    """A small network learns a random teacher's classes; the mean loss of the last steps on data it has not seen."""
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 8))
    student = nn.Sequential(nn.Linear(24, 192), nn.GELU(), nn.Linear(192, 192), nn.GELU(), nn.Linear(192, 8))
    optimizer = pf.optim.PagedAdamW(
        student.parameters(), lr=3e-3, state_bits=bits, min_8bit_numel=1024, resident_bytes=131072, spill_dir=folder
    )
    ends = []
    for step in range(250):
        x = torch.randn(96, 24)
        with torch.no_grad():
            target = (4 * teacher(x)).argmax(1)
        loss = nn.functional.cross_entropy(student(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 200:
            ends.append(loss.item())
    return statistics.mean(ends)


def test_8_bit_losses_are_within_the_noise_of_32_bit_ones(tmp_path):
    losses = {bits: [_losses(bits, seed, tmp_path) for seed in range(5)] for bits in (32, 8)}
    first = torch.tensor(8.0).log().item()
    assert max(losses[32]) < first / 2, "it learns"
    spread = statistics.stdev(losses[32])
    assert abs(statistics.mean(losses[8]) - statistics.mean(losses[32])) < spread, losses
