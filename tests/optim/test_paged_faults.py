"""Full and failing disks, killed processes, forks, and others beside: PagedAdamW's state stays whole."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from optim_cases import assert_same, make_params, take_step
from torch import nn

import pyfastpeft as pf
from pyfastpeft._native import _C
from pyfastpeft.paged_memory import SpillError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_step_cut_by_the_disk_goes_on(tmp_path, faults, op):
    a, b = make_params(), make_params()
    plain, paged = pf.optim.AdamW(a), pf.optim.PagedAdamW(b, resident_bytes=150_000, spill_dir=tmp_path)
    for t in range(3):
        take_step(a, plain, t)
        take_step(b, paged, t)
    take_step(a, plain, 3)
    faults(op, errno.EIO, after=5, times=-1)
    with pytest.raises(SpillError) as raised:
        take_step(b, paged, 3)
    assert raised.value.errno == errno.EIO
    with pytest.raises(SpillError):
        paged.step()
    assert paged._done, "it stood between two pages"
    _C.clear_spill_faults()
    paged.step()
    take_step(a, plain, 4)
    take_step(b, paged, 4)
    assert_same(a, b, plain, paged)


def test_parameters_that_come_between_a_step_and_its_rest_are_stepped(tmp_path):
    params = make_params(shapes=[(100,), (50,)])
    paged = pf.optim.PagedAdamW(params[:1], resident_bytes=150_000, spill_dir=tmp_path)
    take_step(params[:1], paged, 0)
    (space,) = paged._spaces.values()
    paged._done.add((space, 0))  # as a failure after the first page leaves it
    paged.add_param_group({"params": params[1:]})
    take_step(params, paged, 1)
    assert [int(paged.state[p]["step"]) for p in params] == [1, 1], "the second is on a page of its own"


def test_a_full_disk_at_the_first_step_changes_nothing(tmp_path, faults):
    a, b = make_params(), make_params()
    plain, paged = pf.optim.AdamW(a), pf.optim.PagedAdamW(b, resident_bytes=150_000, spill_dir=tmp_path)
    before = [p.detach().clone() for p in b]
    faults("allocate", errno.ENOSPC)
    with pytest.raises(SpillError, match="choose another folder with spill_dir=, or raise resident_bytes=") as raised:
        take_step(b, paged, 0)
    assert raised.value.errno == errno.ENOSPC
    assert all(torch.equal(p, q) for p, q in zip(b, before, strict=True)) and not any(paged.state.values())
    for t in range(3):
        take_step(a, plain, t)
        take_step(b, paged, t)
    assert_same(a, b, plain, paged)


def test_a_full_disk_for_new_parameters_leaves_the_old_ones(tmp_path, faults):
    params = make_params()
    paged = pf.optim.PagedAdamW(params, resident_bytes=150_000, spill_dir=tmp_path)
    take_step(params, paged, 0)
    before = paged.state_dict()
    more = make_params(shapes=[(100_000,)])
    paged.add_param_group({"params": more})
    faults("allocate", errno.ENOSPC)
    with pytest.raises(SpillError):
        take_step(params + more, paged, 1)
    after = paged.state_dict()
    assert after["state"].keys() == before["state"].keys()
    assert all(torch.equal(v, after["state"][k][n]) for k, s in before["state"].items() for n, v in s.items())
    take_step(params + more, paged, 1)
    assert paged.state[more[0]]["step"].item() == 1 and paged.state[params[0]]["step"].item() == 2


def test_kill_9_during_a_step_leaves_the_checkpoint_and_no_litter(tmp_path):
    spill = tmp_path / "spill"
    spill.mkdir()
    script = f"""
    import os, signal, threading, torch, pyfastpeft as pf
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(200_000)) for _ in range(4)]
    paged = pf.optim.PagedAdamW(params, resident_bytes=400_000, spill_dir={str(spill)!r})
    for t in range(10_000):
        for p in params:
            p.grad = p.detach() * 0.1
        if t == 3:
            torch.save({{"state": paged.state_dict(), "params": [p.detach() for p in params]}}, "checkpoint.tmp")
            os.replace("checkpoint.tmp", "checkpoint.pt")
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
        paged.step()
    """
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(spill) == [] and sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "spill"]
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    params = [nn.Parameter(p) for p in saved["params"]]
    paged = pf.optim.PagedAdamW(params, resident_bytes=400_000, spill_dir=spill)
    paged.load_state_dict(saved["state"])
    assert paged.state[params[3]]["step"].item() == 3
    for p in params:
        p.grad = p.detach() * 0.1
    paged.step()


def test_a_forked_child_gets_an_error(tmp_path):
    params = make_params()
    paged = pf.optim.PagedAdamW(params, resident_bytes=150_000, spill_dir=tmp_path)
    take_step(params, paged, 0)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            paged.step()
        except RuntimeError as error:
            code = 0 if "after the fork" in str(error) else 2
        paged.state.clear()  # lets go of its copies in peace
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    take_step(params, paged, 1)


def test_a_folder_that_vanishes_between_steps(tmp_path):
    folder = tmp_path / "spill"
    folder.mkdir()
    a, b = make_params(), make_params()
    plain, paged = pf.optim.AdamW(a), pf.optim.PagedAdamW(b, resident_bytes=150_000, spill_dir=folder)
    for t in range(6):
        if t == 3:
            shutil.rmtree(folder)  # the file has no name there: it lives on
        take_step(a, plain, t)
        take_step(b, paged, t)
    assert_same(a, b, plain, paged)
    assert paged.memory_report()["spilled_bytes"] > 0
    with pytest.raises(SpillError, match="no such folder") as raised:
        pf.optim.PagedAdamW(make_params(), resident_bytes=150_000, spill_dir=folder)
    assert raised.value.errno == errno.ENOENT


def test_two_optimizers_in_one_folder(tmp_path):
    """Stepped in turn, one with 32-bit and one with 8-bit state; one of them ends first, and is replaced."""
    kinds = [{"lr": 1e-2}, {"lr": 3e-3, "state_bits": 8}]
    lists = [(make_params(seed=i), make_params(seed=i)) for i in range(2)]
    plain = [pf.optim.AdamW(a, **kind) for (a, _), kind in zip(lists, kinds, strict=True)]
    paged = [
        pf.optim.PagedAdamW(b, resident_bytes=131_072, spill_dir=tmp_path, **kind)
        for (_, b), kind in zip(lists, kinds, strict=True)
    ]
    for t in range(12):
        for i in (0, 1):
            take_step(lists[i][0], plain[i], t)
            take_step(lists[i][1], paged[i], t)
        if t == 6:
            saved = paged[0].state_dict()
            paged[0] = pf.optim.PagedAdamW(lists[0][1], resident_bytes=200_000, spill_dir=tmp_path, **kinds[0])
            paged[0].load_state_dict(saved)
    for i in (0, 1):
        assert_same(*lists[i], plain[i], paged[i])
        assert paged[i].memory_report()["pages_out"] > 0 or i == 1
    assert os.listdir(tmp_path) == []


def test_two_processes_in_one_folder(tmp_path):
    """Whole optimizers: each process ends in the bits of AdamW in memory, however the other's pages come and go."""
    script = f"""
    import sys, torch, pyfastpeft as pf
    from optim_cases import assert_same, make_params, take_step
    torch.set_num_threads(1)
    seed = int(sys.argv[1])
    a, b = make_params(seed=seed), make_params(seed=seed)
    plain, paged = pf.optim.AdamW(a), pf.optim.PagedAdamW(b, resident_bytes=131_072, spill_dir={str(tmp_path)!r})
    take_step(b, paged, 0)
    print("ready", flush=True)
    sys.stdin.readline()  # both have their file, and begin together
    take_step(a, plain, 0)
    for t in range(1, 40):
        take_step(a, plain, t)
        take_step(b, paged, t)
    assert_same(a, b, plain, paged)
    assert paged.memory_report()["pages_out"] > 100
    print("same", flush=True)
    """
    tests = Path(__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tests.parent), str(tests)))}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(seed)], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for seed in (1, 2)
    ]  # fmt: skip
    try:
        for process in both:
            assert process.stdout.readline() == "ready\n"
        for process in both:
            process.stdin.write("go\n")
            process.stdin.flush()
        assert [process.communicate(timeout=120)[0] for process in both] == ["same\n"] * 2
        assert [process.returncode for process in both] == [0, 0] and os.listdir(tmp_path) == []
    finally:
        for process in both:
            process.kill()
            process.wait()
