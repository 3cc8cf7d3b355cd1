"""pf.optim.AdamW as a torch optimizer: 200 steps beside torch's, groups, schedulers, GradScaler, bad input."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import pyfastpeft as pf
from pyfastpeft.reference import adamw as reference


def _model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(33, 70), nn.Tanh(), nn.LayerNorm(70), nn.Linear(70, 5)).to(dtype)


def _train(model, optimizer, steps, seed=1, dtype=torch.float32, each_step=None):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(33, 5, generator=generator)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 33, generator=generator)
        loss = nn.functional.mse_loss(model(x.to(dtype)).float(), x @ target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if each_step:
            each_step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("options", [{}, {"maximize": True, "lr": 1e-5}, {"betas": (0.5, 0.9), "weight_decay": 0.1}])
def test_200_steps_beside_torch(options):
    """On the same gradients: m and v equal torch's bit for bit, parameters to the last place of torch's square root."""
    a, b = _model(), _model()
    ours, theirs = (
        pf.optim.AdamW(a.parameters(), **options),
        torch.optim.AdamW(b.parameters(), foreach=False, **options),
    )
    generator = torch.Generator().manual_seed(2)
    for _ in range(200):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(ours.state[p][key], theirs.state[q][key]), key


def test_l2_decay_is_torchs_adam():
    a, b = _model(), _model()
    ours = pf.optim.AdamW(a.parameters(), weight_decay=0.1, decoupled_weight_decay=False)
    theirs = torch.optim.Adam(b.parameters(), weight_decay=0.1, foreach=False)
    losses = _train(a, ours, 50), _train(b, theirs, 50)
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8bit_learns_as_fp32_does(dtype):
    curves = {}
    for bits in (32, 8):
        model = _model(dtype)
        optimizer = pf.optim.AdamW(
            model.parameters(), lr=1e-2, state_bits=bits, min_8bit_numel=64, master_weights=dtype != torch.float32
        )
        curves[bits] = _train(model, optimizer, 60, dtype=dtype)
        if bits == 8:
            assert "state1" in optimizer.state[model[0].weight] and "exp_avg" in optimizer.state[model[3].bias]
    last = {bits: sum(c[-20:]) / 20 for bits, c in curves.items()}
    assert last[32] < 0.3 * curves[32][0] and last[8] == pytest.approx(last[32], rel=0.1)


def test_small_tensors_keep_fp32_state():
    params = [nn.Parameter(torch.randn(n)) for n in (4095, 4096)]
    optimizer = pf.optim.AdamW(params, state_bits=8)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(optimizer.state[params[1]]) == {"step", "state1", "absmax1", "qmap1", "state2", "absmax2", "qmap2"}
    report = optimizer.memory_report()
    assert report["state_bytes"] == 2 * 4 + 2 * 4095 * 4 + 2 * 4096 + 2 * 16 * 4 + 2 * 1024
    assert report["resident_bytes"] + report["host_bytes"] + report["spilled_bytes"] == report["state_bytes"]


def test_groups_schedulers_closures_and_clipping():
    a, b = _model(), _model()

    def build(model, cls, **options):
        groups = [
            {"params": model[0].parameters(), "lr": 1e-2, "weight_decay": 0.0},
            {"params": list(model[2:].parameters()), "betas": (0.8, 0.99)},
        ]
        optimizer = cls(groups, lr=torch.tensor(1e-3), **options)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))

    x, y = torch.randn(20, 33), torch.randn(20, 5)
    for model, (optimizer, scheduler) in (
        (a, build(a, pf.optim.AdamW)),
        (b, build(b, torch.optim.AdamW, foreach=False)),
    ):

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            return loss

        for _ in range(10):
            assert optimizer.step(closure).item() > 0
            scheduler.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_frozen_added_and_unfrozen_parameters():
    model = _model()
    model[0].requires_grad_(False)
    optimizer = pf.optim.AdamW(model[3].parameters())
    frozen = model[0].weight.clone()
    _train(model, optimizer, 3)
    assert torch.equal(model[0].weight, frozen) and len(optimizer.state) == 2
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 1e-2})
    _train(model, optimizer, 2)
    assert not torch.equal(model[0].weight, frozen)
    assert optimizer.state[model[0].weight]["step"] == 2 and optimizer.state[model[3].weight]["step"] == 5


def test_one_call_for_each_group_and_kind(monkeypatch):
    import pyfastpeft.optim.adamw as module

    calls = []
    monkeypatch.setattr(module, "adamw_", lambda *lists, **options: calls.append(len(lists[0])))
    params = [nn.Parameter(torch.randn(n)) for n in (10, 5000, 20, 6000)]
    for p in params:
        p.grad = torch.randn_like(p)
    module.AdamW([{"params": params[:3]}, {"params": params[3:]}], state_bits=8).step()
    assert calls == [2, 1, 1]


def test_grad_scaler():
    results = []
    for scaled in (False, True):
        model = _model()
        optimizer = pf.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        x = torch.randn(20, 33, generator=torch.Generator().manual_seed(3))
        for t in range(4):
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            if t == 2 and scaled:  # an overflow: the step is skipped and the scale halved
                model[0].weight.grad[0, 0] = float("inf")
                before = copy.deepcopy(model.state_dict())
                scaler.step(optimizer)
                assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
                assert optimizer.state[model[0].weight]["step"] == 2
            elif t != 2:
                if t == 3:
                    scaler.unscale_(optimizer)  # then the kernel is given no scale
                scaler.step(optimizer)
            scaler.update()
        assert not scaled or scaler.get_scale() == 2.0**9
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("bits", [32, 8])
def test_pickle_and_deepcopy_continue_identically(bits):
    model = _model()
    optimizer = pf.optim.AdamW(model.parameters(), lr=1e-2, state_bits=bits, min_8bit_numel=64)
    _train(model, optimizer, 3)
    twin_model, twin = copy.deepcopy((model, optimizer))
    third_model, third = pickle.loads(pickle.dumps((model, optimizer)))
    losses = [_train(m, o, 5) for m, o in ((model, optimizer), (twin_model, twin), (third_model, third))]
    assert losses[0] == losses[1] == losses[2]


def test_stochastic_rounding_follows_torchs_seed():
    ends = []
    for seed in (0, 0, 1):
        model = _model(torch.bfloat16)
        optimizer = pf.optim.AdamW(model.parameters(), lr=1e-4, stochastic_rounding=True)
        torch.manual_seed(seed)
        _train(model, optimizer, 3, dtype=torch.bfloat16)
        ends.append(model[0].weight.detach().clone())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_layouts_of_parameters_and_gradients():
    weight = torch.randn(30, 40)
    for p in (
        nn.Parameter(weight.clone().t()),
        nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
    ):
        expected, *_ = reference.adamw_step(p.detach().clone(), torch.ones_like(p) / 3, *torch.zeros(2, *p.shape), 1)
        p.grad = (torch.ones(p.shape) / 3).contiguous()
        pf.optim.AdamW([p]).step()
        assert torch.equal(p, expected)
    p = nn.Parameter(torch.randn(30))
    p.grad = torch.ones(1).expand(30)
    pf.optim.AdamW([p]).step()
    gaps = nn.Parameter(weight[:, :5])
    gaps.grad = torch.randn(30, 5)
    with pytest.raises(ValueError, match=r"strides \(40, 1\), which leave gaps or overlap"):
        pf.optim.AdamW([gaps]).step()


def test_a_buffer_of_a_torch_save():
    model = _model()
    optimizer = pf.optim.AdamW(model.parameters(), state_bits=8, min_8bit_numel=64)
    _train(model, optimizer, 2)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = pf.optim.AdamW(model.parameters(), state_bits=8, min_8bit_numel=64)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for p in model.parameters():
        for key, value in optimizer.state[p].items():
            assert torch.equal(other.state[p][key], value) and other.state[p][key].dtype == value.dtype


def test_frozen_codes_of_a_4bit_base_are_passed_over():
    model = nn.Sequential(pf.nn.NF4Linear.from_linear(nn.Linear(64, 64)), nn.Linear(64, 2))
    codes = model[0].weight.clone()
    optimizer = pf.optim.AdamW(model.parameters(), lr=0.1)
    before = model[1].weight.detach().clone()
    model(torch.randn(3, 64)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, codes)
    assert not torch.equal(model[1].weight, before)


def test_bad_options_and_inputs():
    p = nn.Parameter(torch.randn(4))
    for options, match in (
        ({"lr": -1.0}, "lr is -1.0, expected a number >= 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": torch.ones(2)}, "lr is a tensor of 2 values"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\), expected two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, "betas is"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"state_bits": 4}, "state_bits is 4, expected 32 or 8"),
        ({"amsgrad": True}, "amsgrad=True is not supported; use torch.optim.AdamW"),
        ({"master_weights": True, "stochastic_rounding": True}, "choose one"),
    ):
        with pytest.raises(ValueError, match=match):
            pf.optim.AdamW([p], **options)
    with pytest.raises(ValueError, match="state_bits is 16"):
        pf.optim.AdamW([{"params": [p], "state_bits": 16}])
    for dtype in (torch.float64, torch.complex64):
        with pytest.raises(TypeError, match=f"parameter 0 of group 0 has dtype {dtype}, expected"):
            pf.optim.AdamW([nn.Parameter(torch.zeros(2, dtype=dtype))])
    optimizer = pf.optim.AdamW([p])
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.float64))]})
    assert len(optimizer.param_groups) == 1
    optimizer.step()  # no gradients: nothing to do
    assert not optimizer.state
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="gradient of parameter 0 of group 0 is sparse.*SparseAdam"):
        pf.optim.AdamW(table.parameters()).step()
