"""PagedAdamW does, bit for bit, what AdamW does: at every budget, whatever happens to parameters, state and disk."""

import copy
import gc
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from optim_cases import assert_same, make_paged, make_params, take_step
from torch import nn

import pyfastpeft as pf
from pyfastpeft.optim.page_space import PagedState
from pyfastpeft.paged_memory import SpillError

KINDS = {
    "fp32": {},
    "8bit": {"state_bits": 8},
    "bf16, master": {"dtype": torch.bfloat16, "master_weights": True},
    "fp16, stochastic": {"dtype": torch.float16, "stochastic_rounding": True},
    "bf16, 8bit, stochastic": {"dtype": torch.bfloat16, "stochastic_rounding": True, "state_bits": 8},
    "L2, maximize": {"decoupled_weight_decay": False, "maximize": True, "weight_decay": 0.1},
}
BUDGETS = [1, 200_000, 400_000, "1MB", None]  # from less than the minimum to everything


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_at_every_budget(tmp_path, kind, budget):
    torch.set_num_threads(2 if budget == 400_000 else 1)
    options = dict(KINDS[kind])
    dtype = options.pop("dtype", torch.float32)
    a, b = make_params(dtype), make_params(dtype)
    plain = pf.optim.AdamW(a, lr=1e-2, **options)
    paged = make_paged(b, budget, tmp_path, lr=1e-2, **options)
    for t in range(40):
        skip = {t % 9, 2} if t % 5 == 3 else ()
        take_step(a, plain, t, skip)
        take_step(b, paged, t, skip)
    report = paged.memory_report()
    assert_same(a, b, plain, paged)
    assert report["resident_bytes"] + report["host_bytes"] + report["spilled_bytes"] == report["state_bytes"]
    assert report["peak_resident_bytes"] <= report["budget_bytes"]
    if isinstance(budget, int):
        assert report["budget_bytes"] <= max(budget, report["minimum_bytes"]) and report["requested_bytes"] == budget
        assert (report["pages_out"] > 0) == (report["state_bytes"] > report["budget_bytes"])
    assert os.listdir(tmp_path) == []


def test_hundreds_of_steps_with_parameters_added_frozen_and_removed(tmp_path):
    a, b = make_params(), make_params()
    plain = pf.optim.AdamW(a, lr=1e-2)
    paged = pf.optim.PagedAdamW(b, lr=1e-2, resident_bytes=200_000, spill_dir=tmp_path)
    both = ((a, plain), (b, paged))
    frozen: set[int] = set()
    for t in range(300):
        if t == 50:
            for params, optimizer in both:
                new = make_params(shapes=[(100, 200), (5,)], seed=7)
                params += new
                optimizer.add_param_group({"params": new, "lr": 3e-3, "weight_decay": 0.0})
        if t == 100:
            frozen = {0, 5}
        if t == 150:
            frozen = set()
        if t == 200:
            for params, optimizer in both:
                for i in (6, 2):
                    p = params.pop(i)
                    group = optimizer.param_groups[0]
                    group["params"] = [q for q in group["params"] if q is not p]
                    del optimizer.state[p]
        for params, optimizer in both:
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + t / 100)
            take_step(params, optimizer, t, frozen)
        if t % 60 == 0:
            assert_same(a, b, plain, paged)
    assert_same(a, b, plain, paged)


def test_state_that_is_gone_leaves_its_pages(tmp_path):
    params = make_params(shapes=[(40_000,)] * 6)
    paged = pf.optim.PagedAdamW(params, resident_bytes=200_000, spill_dir=tmp_path)
    take_step(params, paged, 0)
    before = paged.memory_report()
    for p in params[:5]:
        del paged.state[p]
    paged.param_groups[0]["params"] = params[5:]
    take_step(params[5:], paged, 1)
    after = paged.memory_report()
    assert after["state_bytes"] == before["state_bytes"] // 6 and after["pages"] == before["pages"]
    more = make_params(shapes=[(40_000,)] * 4, seed=3)
    paged.add_param_group({"params": more})
    for t in range(2, 5):
        take_step(params[5:] + more, paged, t)
    assert paged.memory_report()["pages"] == before["pages"], "pages that are free are used again"
    fresh = make_params(shapes=[(40_000,)] * 4, seed=3)
    plain = pf.optim.AdamW(fresh)
    for t in range(2, 5):
        generator = torch.Generator().manual_seed(1000 + t)
        torch.randn(40_000, generator=generator)
        for p in fresh:
            p.grad = torch.randn(p.shape, generator=generator)
        plain.step()
    assert_same(fresh, more, plain, paged)


def test_small_tensors_share_pages(tmp_path):
    params = make_params(shapes=[(16, 16)] * 500)
    paged = pf.optim.PagedAdamW(params, resident_bytes="256KiB", spill_dir=tmp_path)
    take_step(params, paged, 0)
    report = paged.memory_report()
    assert report["state_bytes"] == 500 * (8 * 256 + 4) and report["pages"] <= 1.1 * report["state_bytes"] / 65536
    assert report["spilled_bytes"] > 0


def test_layouts_other_than_contiguous(tmp_path):
    def build():
        generator = torch.Generator().manual_seed(0)
        tensors = [
            torch.randn(300, 200, generator=generator).t(),
            torch.randn(8, 64, 9, 5, generator=generator).to(memory_format=torch.channels_last),
        ]
        return [nn.Parameter(t) for t in tensors]

    a, b = build(), build()
    plain, paged = pf.optim.AdamW(a), pf.optim.PagedAdamW(b, resident_bytes=200_000, spill_dir=tmp_path)
    for t in range(20):
        for params, optimizer in ((a, plain), (b, paged)):
            generator = torch.Generator().manual_seed(t)
            for p in params:  # contiguous: not the parameter's own layout
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    assert_same(a, b, plain, paged)
    assert paged.state[b[0]]["exp_avg"].stride() == b[0].stride()


def test_schedulers_scaler_closures_and_versions(tmp_path):
    a, b = make_params(), make_params()
    runs = []
    for params, cls, options in ((a, pf.optim.AdamW, {}), (b, pf.optim.PagedAdamW, {"resident_bytes": 200_000})):
        optimizer = cls([{"params": params[:3], "lr": 1e-2}, {"params": params[3:]}], weight_decay=0.1, **options)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=5)
        for t in range(20):
            optimizer.zero_grad()
            loss = sum(((p - 1) ** 2).sum() for p in params)
            scaler.scale(loss).backward()
            if t == 7:
                params[0].grad[3, 3] = float("inf")  # this step is skipped
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()

        def closure(params=params, optimizer=optimizer):
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            return loss

        optimizer.step(closure)
        version = params[0]._version
        optimizer.step()
        assert params[0]._version > version
        runs.append((optimizer, scaler.get_scale(), optimizer.param_groups[0]["lr"]))
    assert runs[0][1:] == runs[1][1:]
    assert_same(a, b, runs[0][0], runs[1][0])
    used = params[0] * params[0]
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.sum().backward()


@pytest.mark.parametrize("bits", [32, 8])
def test_state_dicts_go_between_budgets_and_optimizers(tmp_path, bits):
    a, b = make_params(), make_params()
    plain = pf.optim.AdamW(a, lr=1e-2, state_bits=bits)
    paged = pf.optim.PagedAdamW(b, lr=1e-2, state_bits=bits, resident_bytes=200_000, spill_dir=tmp_path)
    for t in range(10):
        take_step(a, plain, t)
        take_step(b, paged, t)
    file = tmp_path / "state.pt"
    torch.save(paged.state_dict(), file)
    saved = torch.load(file, weights_only=True)
    ours = plain.state_dict()
    assert saved["param_groups"] == ours["param_groups"] and saved["state"].keys() == ours["state"].keys()
    for key, state in ours["state"].items():
        assert state.keys() == saved["state"][key].keys()
        assert all(torch.equal(state[k], saved["state"][key][k]) for k in state)
    assert isinstance(next(iter(paged.state.values())), PagedState)  # saving has not unpaged it

    others = []
    for budget in (1, 150_000, None):
        params = copy.deepcopy(b)
        other = make_paged(params, budget, tmp_path, lr=1.0, state_bits=bits)
        other.load_state_dict(saved)
        others.append((params, other))
    c = copy.deepcopy(b)
    unpaged = pf.optim.AdamW(c, state_bits=bits)
    unpaged.load_state_dict(saved)
    paged.load_state_dict(saved)  # over its own state: in the same pages
    others += [(c, unpaged), (b, paged)]
    for t in range(10, 15):
        take_step(a, plain, t)
        for params, optimizer in others:
            take_step(params, optimizer, t)
    for params, optimizer in others:
        if optimizer is not unpaged:
            assert_same(a, params, plain, optimizer)
        assert all(torch.equal(p, q) for p, q in zip(a, params, strict=True))
    assert paged.memory_report()["peak_resident_bytes"] <= paged.memory_report()["budget_bytes"]


def test_a_state_larger_than_memory_can_be_saved(tmp_path):
    """Its copies are files without a name: the system may drop their pages, which it could not do with a heap's."""
    a, b = make_params(shapes=[(600_000,), (1000, 500)]), make_params(shapes=[(600_000,), (1000, 500)])
    plain = pf.optim.AdamW(a)
    paged = pf.optim.PagedAdamW(b, resident_bytes="1MB", spill_dir=tmp_path)
    for params, optimizer in ((a, plain), (b, paged)):
        take_step(params, optimizer, 0)
    saved = paged.state_dict()
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mapped) == 4 and os.listdir(tmp_path) == []
    torch.save(saved, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)
    for key, state in plain.state_dict()["state"].items():
        assert all(torch.equal(value, loaded["state"][key][name]) for name, value in state.items())
    paged.load_state_dict(loaded)
    del saved, loaded
    gc.collect()  # torch 2.6's load leaves a cycle behind
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    for params, optimizer in ((a, plain), (b, paged)):
        take_step(params, optimizer, 1)
    assert_same(a, b, plain, paged)


def test_the_process_grows_by_the_budget_and_not_by_the_state(tmp_path):
    def anonymous():
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) << 10

    params = make_params(shapes=[(2_000_000,)] * 4)
    paged = pf.optim.PagedAdamW(params, resident_bytes="4MiB", spill_dir=tmp_path)
    for p in params:
        p.grad = torch.ones_like(p)
    before = anonymous()
    for _ in range(3):
        paged.step()
    report = paged.memory_report()
    assert report["state_bytes"] > 64_000_000 and anonymous() - before < report["budget_bytes"] + (8 << 20)
    saved = paged.state_dict()  # in files, which the system may drop from memory
    assert anonymous() - before < report["budget_bytes"] + (8 << 20) and len(saved["state"]) == 4


def test_interchange_with_torch(tmp_path):
    a, b, c = make_params(), make_params(), make_params()
    theirs = torch.optim.AdamW(a, lr=1e-2, foreach=False)
    for t in range(5):
        take_step(a, theirs, t)
    for p, q in zip(a, b, strict=True):
        q.data.copy_(p.data)
    paged = pf.optim.PagedAdamW(b, resident_bytes=200_000, spill_dir=tmp_path)
    paged.load_state_dict(theirs.state_dict())
    for t in range(5, 10):
        take_step(a, theirs, t)
        take_step(b, paged, t)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
        assert torch.equal(theirs.state[p]["exp_avg"], paged.state[q]["exp_avg"])
    again = torch.optim.AdamW(c, foreach=False)
    again.load_state_dict(paged.state_dict())
    assert all(
        torch.equal(again.state[r]["exp_avg_sq"], paged.state[q]["exp_avg_sq"]) for q, r in zip(b, c, strict=True)
    )


def test_a_state_of_another_precision_is_converted(tmp_path):
    a = make_params()
    plain = pf.optim.AdamW(a)
    take_step(a, plain, 0)
    b = copy.deepcopy(a)
    paged = pf.optim.PagedAdamW(b, state_bits=8, resident_bytes=150_000, spill_dir=tmp_path)
    paged.load_state_dict(plain.state_dict())
    expected = pf.optim.AdamW(a, state_bits=8)
    expected.load_state_dict(plain.state_dict())
    take_step(a, expected, 1)
    take_step(b, paged, 1)
    assert_same(a, b, expected, paged)


def test_a_state_dict_that_does_not_fit_changes_nothing(tmp_path):
    params = make_params()
    paged = pf.optim.PagedAdamW(params, resident_bytes=200_000, spill_dir=tmp_path)
    take_step(params, paged, 0)
    saved = paged.state_dict()
    saved["state"][5]["exp_avg"] = torch.zeros(3)
    before, bytes_before = paged.state_dict(), paged.memory_report()["state_bytes"]
    with pytest.raises(ValueError, match="exp_avg has shape"):
        paged.load_state_dict(saved)
    after = paged.state_dict()
    for key, state in before["state"].items():
        assert all(torch.equal(value, after["state"][key][k]) for k, value in state.items())
    assert paged.memory_report()["state_bytes"] == bytes_before


def test_copies_and_pickles_have_pages_of_their_own(tmp_path):
    model = nn.Linear(300, 200)
    paged = pf.optim.PagedAdamW(model.parameters(), resident_bytes=150_000, spill_dir=tmp_path)
    take_step(list(model.parameters()), paged, 0)
    for other_model, other in (copy.deepcopy((model, paged)), pickle.loads(pickle.dumps((model, paged)))):
        mine, theirs = list(copy.deepcopy(model).parameters()), list(other_model.parameters())
        reference = pf.optim.AdamW(mine)
        reference.load_state_dict(paged.state_dict())
        for t in range(1, 4):
            take_step(theirs, other, t)
            take_step(mine, reference, t)
        assert_same(mine, theirs, reference, other)
        assert other.memory_report()["budget_bytes"] == paged.memory_report()["budget_bytes"]
        assert other.pages is not paged.pages


def test_state_reads_and_writes_as_a_mapping(tmp_path):
    params = make_params(shapes=[(50_000,), (10,)])
    paged = pf.optim.PagedAdamW(params, resident_bytes=150_000, spill_dir=tmp_path)
    assert not paged.state[params[0]]
    take_step(params, paged, 0)
    state = paged.state[params[0]]
    state["exp_avg"] = torch.arange(50_000.0)
    assert torch.equal(state["exp_avg"], torch.arange(50_000.0)) and state["step"].item() == 1
    state["step"] = torch.tensor(5.0)
    take_step(params, paged, 1)
    assert state["step"].item() == 6 and "exp_avg" in state and "nothing" not in state and len(state) == 3
    with pytest.raises(KeyError, match="others cannot be added"):
        state["more"] = torch.zeros(1)
    with pytest.raises(ValueError, match="expected a tensor of shape"):
        state["exp_avg"] = torch.zeros(3)
    with pytest.raises(KeyError):
        state["nothing"]
    with pytest.raises(TypeError, match="as a whole"):
        del state["exp_avg"]


def test_unusable_options(tmp_path):
    params = make_params()
    with pytest.raises(SpillError, match="no such folder"):
        pf.optim.PagedAdamW(params, spill_dir=tmp_path / "none")
    with pytest.raises(ValueError, match="2 apples"):
        pf.optim.PagedAdamW(params, resident_bytes="2 apples")
    with pytest.raises(ValueError, match="betas"):
        pf.optim.PagedAdamW(params, betas=(1.0, 0.9))
    elsewhere = nn.Parameter(torch.empty(3, device="meta"))
    elsewhere.grad = torch.empty(3, device="meta")
    with pytest.raises(ValueError, match="expected the CPU or a GPU"):
        pf.optim.PagedAdamW([elsewhere]).step()
    moved = pf.optim.PagedAdamW(params, spill_dir=tmp_path)
    take_step(params, moved, 0)
    moved.state[params[0]].device = torch.device("cuda", 0)  # as if the model had been moved since
    moved._plans.clear()
    with pytest.raises(ValueError, match="move the model first"):
        take_step(params, moved, 1)
    sparse = nn.Embedding(5, 3, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        pf.optim.PagedAdamW(sparse.parameters()).step()


# ---- what one can look at --------------------------------------------------------------------------------------------


def test_the_trace_shows_moves_beside_computation(tmp_path):
    params = make_params(shapes=[(100_000,)] * 4)
    paged = pf.optim.PagedAdamW(params, resident_bytes=400_000, spill_dir=tmp_path)
    for t in range(3):
        take_step(params, paged, t)
    file = tmp_path / "trace.json"
    before = paged.memory_report()
    with paged.trace(file):
        take_step(params, paged, 3)
        after = paged.memory_report()
    events = json.loads(file.read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["name"] for e in spans} >= {"compute", "read", "write"}
    assert sum(e["args"]["pages"] for e in spans if e["name"] == "compute") == after["pages"]
    read = sum(e["name"] == "read" for e in spans)
    assert abs(read - (after["pages_in"] - before["pages_in"])) <= 4  # threads go on reading ahead
    assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in spans)
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} >= {"step"}


def test_report_before_the_first_step():
    report = pf.optim.PagedAdamW(make_params(), resident_bytes="1MB").memory_report()
    assert report["state_bytes"] == report["resident_bytes"] == 0 and report["budget_bytes"] == 1_000_000
