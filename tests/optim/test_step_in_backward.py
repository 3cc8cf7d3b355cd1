"""Steps inside backward: the same bits as step() after it, gradients let go one by one, and no silence about those gone."""

import copy
import errno
import gc
import weakref

import pytest
import torch
from torch import nn

import pyfastpeft as pf
from pyfastpeft._native import _C
from pyfastpeft.optim.in_backward import GradientsReleasedError

PAGED = {"resident_bytes": 200_000}
OPTIMIZERS = {
    "AdamW": (pf.optim.AdamW, {}),
    "AdamW 8-bit": (pf.optim.AdamW, {"state_bits": 8}),
    "PagedAdamW": (pf.optim.PagedAdamW, PAGED),
    "PagedAdamW 8-bit": (pf.optim.PagedAdamW, {"state_bits": 8, "resident_bytes": 140_000}),
    "Lion": (pf.optim.Lion, {}),
    "SGD": (pf.optim.SGD, {}),
    "PagedSGD": (pf.optim.PagedSGD, PAGED),
}


pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Linear layers, one of them used twice, one never, and one at some steps only."""

    def __init__(self, width=120, layers=4):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.sometimes, self.never = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, sometimes=True):
        for layer in (*self.layers, self.layers[1]):
            x = torch.tanh(layer(x))
        return (self.sometimes(x) if sometimes else x).square().mean()


def _batch(t, width=120):
    return torch.randn(8, width, generator=torch.Generator().manual_seed(t))


def _optimizer(kind, net, folder, **more):
    cls, options = OPTIMIZERS[kind]
    if cls.__name__.startswith("Paged"):
        more["spill_dir"] = folder
    late = [*net.sometimes.parameters()]
    first = [p for p in net.parameters() if all(p is not q for q in late)]
    return cls([{"params": first}, {"params": late, "lr": 3e-3}], lr=1e-2, **options, **more)


def _equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def _same_states(a, b, net_a, net_b):
    for p, q in zip(net_a.parameters(), net_b.parameters(), strict=True):
        left, right = (s.read() if hasattr(s, "read") else s for s in (a.state.get(p, {}), b.state.get(q, {})))
        assert set(left) == set(right) and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("bucket_bytes", [0, 100_000, 1 << 22])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_bits_of_a_step_after_backward(tmp_path, kind, bucket_bytes):
    net_a, net_b = Net(), Net()
    plain, inside = (_optimizer(kind, net, tmp_path) for net in (net_a, net_b))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (plain, inside)]
    stepping = inside.step_in_backward(bucket_bytes=bucket_bytes)
    for t in range(12):
        if t == 4:
            for net in (net_a, net_b):
                net.layers[0].weight.requires_grad_(False)  # frozen for a while
        if t == 6:
            for net, optimizer in ((net_a, plain), (net_b, inside)):
                net.layers[0].weight.requires_grad_(True)
                net.extra = nn.Linear(120, 120)
                nn.init.eye_(net.extra.weight)
                nn.init.zeros_(net.extra.bias)
                net.layers.append(net.extra)
                optimizer.add_param_group({"params": list(net.extra.parameters()), "lr": 1e-3})
        for net, optimizer in ((net_a, plain), (net_b, inside)):
            loss, before = net(_batch(t), sometimes=t % 3 != 2), net.layers[1].weight.detach().clone()
            loss.backward()
            assert torch.equal(before, net.layers[1].weight) == (optimizer is plain)
            optimizer.step()
            # parameters that were added have their hooks from their first step() on
            assert t == 6 or optimizer is plain or all(p.grad is None for p in net.parameters())
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        assert _equal(net_a, net_b), t
    _same_states(plain, inside, net_a, net_b)
    stepping.remove()
    for net, optimizer in ((net_a, plain), (net_b, inside)):
        net(_batch(99)).backward()
        assert net.layers[0].weight.grad is not None
        optimizer.step()
    assert _equal(net_a, net_b)


@pytest.mark.parametrize("bucket_bytes", [0, 3 * 40_000])
def test_gradients_are_let_go_on_the_way(bucket_bytes):
    width, layers = 100, 12  # 40 KB of gradient a layer
    net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    made, most = [], 0

    def alive():
        return sum(nbytes for ref, nbytes in made if ref() is not None)

    def note(p):
        nonlocal most
        made.append((weakref.ref(p.grad), p.grad.nbytes))
        most = max(most, alive())

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(note)
    optimizer = pf.optim.AdamW(net.parameters())

    def peak(steps=2):
        nonlocal most
        most = 0
        for t in range(steps):
            made.clear()
            net(_batch(t, width)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            gc.collect()
            assert alive() == 0
        return most

    everything = layers * width * width * 4
    assert peak() == everything
    with optimizer.step_in_backward(bucket_bytes=bucket_bytes):
        assert peak() == max(bucket_bytes, width * width * 4)
    assert peak() == everything


def test_gradients_that_are_gone_say_so(tmp_path):
    net = Net()
    optimizer = pf.optim.AdamW(net.parameters())
    optimizer.step_in_backward()
    net(_batch(0)).backward()
    p = net.layers[0].weight
    assert p.grad is not None and "consumed" in repr(p.grad)
    before = [q.detach().clone() for q in net.parameters()]
    for use in (
        lambda: nn.utils.clip_grad_norm_(net.parameters(), 1.0),
        lambda: nn.utils.clip_grad_value_(net.parameters(), 1.0),
        lambda: nn.utils.get_total_norm([q.grad for q in net.parameters() if q.grad is not None]),
        lambda: p.grad.norm(),
        lambda: p.grad + 1,
        lambda: torch.optim.SGD(net.parameters(), lr=1.0).step(),
        lambda: net(_batch(1)).backward(),  # accumulation without paused()
    ):
        with pytest.raises(GradientsReleasedError, match=r"consumed.*GradScaler.*paused"):
            use()
    assert all(map(torch.equal, before, net.parameters()))
    optimizer.zero_grad(set_to_none=False)
    assert p.grad is None
    net(_batch(1)).backward()
    net.zero_grad()  # the model's: nobody asks for what is gone
    net(_batch(2)).backward()
    optimizer.step()


def test_grad_scaler_is_refused():
    net = Net()
    optimizer = pf.optim.AdamW(net.parameters())
    optimizer.step_in_backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(net(_batch(0))).backward()
    with pytest.raises(GradientsReleasedError, match="GradScaler"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    scaler.scale(net(_batch(0))).backward()
    with pytest.raises(GradientsReleasedError, match="GradScaler"):
        scaler.unscale_(optimizer)


@pytest.mark.parametrize("kind", ["AdamW", "PagedAdamW"])
def test_accumulation_closures_and_hooks_that_clip(tmp_path, kind):
    net_a, net_b = Net(), Net()
    plain, inside = (_optimizer(kind, net, tmp_path) for net in (net_a, net_b))
    stepping = inside.step_in_backward(bucket_bytes=0)
    for net in (net_a, net_b):
        for p in net.parameters():
            p.register_hook(lambda g: g.clamp(-1e-4, 1e-4))
    for t in range(4):
        for i in range(3):
            net_a(_batch(10 * t + i)).backward()
        plain.step()
        plain.zero_grad()
        with stepping.paused():
            net_b(_batch(10 * t)).backward()
            net_b(_batch(10 * t + 1)).backward()
            assert net_b.layers[0].weight.grad.norm() > 0
        net_b(_batch(10 * t + 2)).backward()
        inside.step()
        assert _equal(net_a, net_b), t
    with stepping.paused():  # all of them: step() steps
        net_b(_batch(50)).backward()
    net_a(_batch(50)).backward()
    plain.step()
    inside.step()
    inside.zero_grad()
    plain.zero_grad()
    assert _equal(net_a, net_b)

    def closure(net):
        loss = net(_batch(60))
        loss.backward()
        return loss

    assert plain.step(lambda: closure(net_a)) == inside.step(lambda: closure(net_b))
    assert _equal(net_a, net_b)


def test_versions_rise_so_that_autograd_finds_what_it_still_needs():
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    optimizer = pf.optim.AdamW([p, q])
    optimizer.step_in_backward(bucket_bytes=0)
    x = torch.randn(2, 4)
    # p's gradient is complete after the second product, and then its value is wanted by the first, for q's gradient
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ((x @ q) @ p.detach() @ p).sum().backward()
    optimizer.zero_grad()
    loss = (x @ q @ p).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.zero_grad()
    before = p._version
    (x @ q @ p).sum().backward()
    assert p._version > before


def test_adapters_of_a_model_and_checkpointing():
    """LoRA through the fused layers, with checkpoints of both kinds."""
    from torch.utils.checkpoint import checkpoint

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3)))
        return pf.get_peft_model(model, pf.LoraConfig(r=4, target_modules=r"\d\.0", init_lora_weights=False))

    models = [build(), build(), build()]
    optimizers = [pf.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in models]
    for optimizer in optimizers[1:]:
        optimizer.step_in_backward(bucket_bytes=0)
    for t in range(3):
        for reentrant, model, optimizer in zip((None, False, True), models, optimizers, strict=True):
            x = _batch(t, 64).requires_grad_()
            for block in model.base_model.model if hasattr(model, "base_model") else model.model:
                x = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
            x.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert _equal(models[0], models[1]) and _equal(models[0], models[2])


def test_a_parameter_that_two_reentrant_parts_share_is_refused():
    from torch.utils.checkpoint import checkpoint

    layer = nn.Linear(8, 8)
    optimizer = pf.optim.SGD(layer.parameters())
    optimizer.step_in_backward(bucket_bytes=0)
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(GradientsReleasedError):
        checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True).sum().backward()


def test_pages_are_read_ahead_in_the_order_of_backward(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(24)))  # 128 KiB of state each

    def reads(inside):
        optimizer = pf.optim.PagedAdamW(net.parameters(), resident_bytes=1 << 20, spill_dir=tmp_path)
        if inside:
            optimizer.step_in_backward(bucket_bytes=100_000)
        before = 0
        for t in range(8):
            net(_batch(t, 128)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if t == 3:
                before = optimizer.memory_report()["pages_in"]
        if inside:
            (cycle,) = optimizer._cycles.values()
            assert len(cycle) == len(set(cycle)) == optimizer.memory_report()["pages"]
        return optimizer.memory_report()["pages_in"] - before

    plain, inside = reads(False), reads(True)
    assert 0 < inside <= plain * 1.1


def test_a_step_cut_by_the_disk_is_finished_by_step(tmp_path):
    net_a, net_b = Net(layers=8), Net(layers=8)
    plain, inside = _optimizer("AdamW", net_a, tmp_path), _optimizer("PagedAdamW", net_b, tmp_path)
    inside.step_in_backward(bucket_bytes=200_000)
    for net, optimizer in ((net_a, plain), (net_b, inside)):
        for t in range(3):
            net(_batch(t)).backward()
            optimizer.step()
            optimizer.zero_grad()
    net_a(_batch(5)).backward()
    _C.inject_spill_fault("read", errno.EIO, 6, -1)
    try:
        with pytest.raises(pf.paged_memory.SpillError):
            net_b(_batch(5)).backward()
        with pytest.raises(pf.paged_memory.SpillError):
            inside.step()
    finally:
        _C.clear_spill_faults()
    with pytest.raises(RuntimeError, match="(?i)call optimizer.step"):
        net_b(_batch(6)).backward()
    arrived = [p.grad is not None for p in net_b.parameters()]
    assert any(arrived) and not all(arrived)
    for p, there in zip(net_a.parameters(), arrived, strict=True):
        if not there:
            p.grad = None
    plain.step()
    inside.step()
    assert _equal(net_a, net_b)
    _same_states(plain, inside, net_a, net_b)


def test_it_ends_with_its_owner_and_is_not_copied():
    net = Net()
    optimizer = pf.optim.AdamW(net.parameters())
    stepping = optimizer.step_in_backward()
    with pytest.raises(RuntimeError, match="in use already"):
        optimizer.step_in_backward()
    twin_net, twin = copy.deepcopy((net, optimizer))
    twin_net(_batch(0)).backward()
    assert twin_net.layers[0].weight.grad.norm() > 0
    twin.step()
    alive = weakref.ref(optimizer)
    gc.disable()
    del optimizer, stepping
    gc.enable()
    assert alive() is None
    net(_batch(0)).backward()
    assert net.layers[0].weight.grad.norm() > 0
    with pytest.raises(ValueError, match="bucket_bytes is -1"):
        pf.optim.AdamW(net.parameters()).step_in_backward(bucket_bytes=-1)


def test_several_processes_are_refused(monkeypatch):
    net = Net()
    optimizer = pf.optim.AdamW(net.parameters())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="2 processes train together"):
        optimizer.step_in_backward()
    monkeypatch.undo()
    optimizer.step_in_backward()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="2 processes train together"):
        net(_batch(0)).backward()
