"""State of parameters on a GPU, without one: gpu_stand_in runs what it is given late and in no order but that of streams and
events, so that a page used too early or let go too early holds other bits than AdamW's. The kernel itself runs on the host
executor."""

import copy
import ctypes
import os

import pytest
import torch
from emu import backend, plugin
from gpu_stand_in import StandIn
from optim_cases import PAGE, PagedOnStandIn
from torch import nn

import pyfastpeft as pf

SHAPES = [(300, 130), (7,), (60_000,), (4096,), (33, 100)]


pytestmark = pytest.mark.usefixtures("one_thread")


class Paged(PagedOnStandIn):
    """Each launch is the stand-in's to run."""

    all_here = True

    def _launch(self, call, tables, pages, page_bytes, threads, options):
        as_it_is = copy.copy(call)  # addresses are passed by value

        def kernel():
            self.all_here &= all(self.stand_in.is_here(page, page_bytes) for page in pages)
            super(PagedOnStandIn, self)._launch(as_it_is, tables, pages, page_bytes, 1, options)

        self.stand_in.give(kernel)


def _params(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


def _step(params, optimizer, t, skip=()):
    generator = torch.Generator().manual_seed(t)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator)
        p.grad = None if i in skip else grad
    optimizer.step()


def _same(a, b, plain, paged):
    paged.stand_in.run()
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p, q)
        values = paged.state[q].read()
        assert all(torch.equal(value, values[key]) for key, value in plain.state[p].items())


def _run(a, b, plain, paged, steps=12):
    for t in range(steps):
        skip = {t % 5} if t % 4 == 3 else ()
        _step(a, plain, t, skip)
        _step(b, paged, t, skip)


LARGE = 1 << 24
TIERS = [  # pages on the device, on the host, and how the host's are reached
    (0, LARGE, "auto"),
    (3 * PAGE, LARGE, "auto"),
    (LARGE, LARGE, "auto"),
    (3 * PAGE, 4 * PAGE, "auto"),
    (0, 2 * PAGE, "in_place"),
    (0, LARGE, "copied"),
    (9 * PAGE, LARGE, "auto"),
    (4 * PAGE, LARGE, "copied"),
    (5 * PAGE, 4 * PAGE, "copied"),
    (0, 2 * PAGE, "copied"),
]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("resident", "host", "transfer"), TIERS)
def test_same_bits_for_every_tier(tmp_path, bits, resident, host, transfer):
    for seed in range(3):
        a, b = _params(), _params()
        stand_in = StandIn(seed)
        plain = pf.optim.AdamW(a, lr=1e-2, state_bits=bits)
        paged = Paged(b, stand_in, resident, host, tmp_path, lr=1e-2, state_bits=bits, transfer=transfer)
        for t in range(12):
            skip = {t % 5} if t % 4 == 3 else ()
            _step(a, plain, t, skip)
            _step(b, paged, t, skip)
            if t == 6:
                saved = paged.state_dict()  # in the middle of it: waits for what it reads
        report = paged.memory_report()
        _same(a, b, plain, paged)
        assert report["resident_bytes"] + report["host_bytes"] + report["spilled_bytes"] == report["state_bytes"]
        budget = max(resident, report["minimum_bytes"])
        assert report["resident_bytes"] <= report["peak_resident_bytes"] <= report["budget_bytes"] <= budget
        assert (report["spill_file_bytes"] > 0) == (report["state_bytes"] > resident + host)
        on_host = report["host_bytes"] + report["spilled_bytes"]
        assert 0 < sum(stand_in.pinned.values()) <= host or on_host == 0
        copies = transfer == "copied" or resident == 9 * PAGE
        assert report["transfer"] == (("copied" if copies else "in place") if on_host else None)
        other = Paged(_params(), StandIn(9), 1 << 24, 1 << 24, tmp_path, state_bits=bits)
        other.load_state_dict(saved)
        assert other.state[other.param_groups[0]["params"][2]]["step"].item() == 7
        del paged, other
        assert not stand_in.pinned, "pinned memory goes with its owner"


@pytest.mark.parametrize("deaf", [0, 1, 2])
def test_the_stand_in_finds_copies_that_wait_for_nothing(tmp_path, deaf):
    """Kernels (0) before their page has come, copies to a slot in use (1), copies of what no kernel has stepped (2)."""
    wrong = 0
    for seed in range(8):
        a, b = _params(), _params()
        plain = pf.optim.AdamW(a, lr=1e-2)
        paged = Paged(b, StandIn(seed, deaf=deaf), 4 * PAGE, LARGE, tmp_path, lr=1e-2, transfer="copied")
        _run(a, b, plain, paged, steps=6)
        paged.stand_in.run()
        wrong += not all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert wrong > 0


@pytest.mark.parametrize("transfer", ["copied", "in_place"])
def test_nothing_waits_while_the_host_has_room(tmp_path, transfer):
    """Page after page is launched behind an event; only what needs a frame again, or the host's eyes, waits."""
    params = _params()
    stand_in = StandIn()
    paged = Paged(params, stand_in, 4 * PAGE, LARGE, tmp_path, transfer=transfer)
    _step(params, paged, 0)
    before = stand_in.waits
    for t in range(1, 6):
        _step(params, paged, t)
    assert stand_in.waits == before and not stand_in.idle()
    report = paged.memory_report()
    assert report["pages_in"] == report["pages_out"] == 0
    stand_in.run()


def test_copies_of_both_directions_and_kernels_are_under_way_together(tmp_path):
    """When the host has launched everything, the streams need one another's page by page and not as wholes."""
    params = _params([(200_000,)])
    stand_in = StandIn()
    paged = Paged(params, stand_in, 8 * PAGE, LARGE, tmp_path, transfer="copied")
    for t in range(2):
        _step(params, paged, t)
    stand_in.run()
    _step(params, paged, 2)
    at_work, both = set(), 0
    for stream in stand_in.streams:
        stream.weight = 1.0
    while not stand_in.idle():
        ready = {i for i, s in enumerate(stand_in.streams) if s.done < len(s.work) and not s.blocked()}
        at_work |= ready
        both += {1, 2} <= ready
        stand_in.run_one()
    assert at_work == {0, 1, 2} and both > 10


@pytest.mark.parametrize("host", [LARGE, 3 * PAGE])
def test_unified_memory(tmp_path, host):
    """What the driver has moved away for others is on the device again before a kernel needs it."""
    for seed in range(3):
        a, b = _params(), _params()
        plain, stand_in = pf.optim.AdamW(a, lr=1e-2), StandIn(seed)
        paged = Paged(b, stand_in, 6 * PAGE, host, tmp_path, lr=1e-2, unified_memory=True)
        for t in range(8):
            _step(a, plain, t)
            _step(b, paged, t)
            if t % 2:
                stand_in.run()
                stand_in.others_need_room()
            if t == 5:
                paged.state[b[2]]["exp_avg"] = paged.state[b[2]]["exp_avg"] * 1  # the host reads and writes it
        assert paged.memory_report()["unified"] and paged.memory_report()["resident_bytes"] > 4 * PAGE
        _same(a, b, plain, paged)
        assert paged.all_here
    paged.state[b[0]].space.memory._own[0].clear()
    assert paged.state[b[0]]["step"].item() == 0


def test_unified_memory_never_beyond_what_is_free(tmp_path):
    params, stand_in = _params(), StandIn(room=3 * PAGE + 100)
    paged = Paged(params, stand_in, 7 * PAGE, LARGE, tmp_path, unified_memory=True)
    with pytest.warns(RuntimeWarning, match="no room for its budget"):
        _step(params, paged, 0)
    assert paged.memory_report()["budget_bytes"] == 3 * PAGE and stand_in.room == 100
    stand_in.run()


def test_unified_memory_that_a_device_has_not(tmp_path):
    a, b = _params(), _params()
    plain = pf.optim.AdamW(a)
    paged = Paged(b, StandIn(managed=False), 6 * PAGE, LARGE, tmp_path, unified_memory=True)
    with pytest.warns(RuntimeWarning, match="concurrentManagedAccess"):
        _step(b, paged, 0)
    _step(a, plain, 0)
    _same(a, b, plain, paged)
    assert not paged.memory_report()["unified"]


def test_unified_memory_of_the_runtime_emulated():
    module = plugin.executor()
    assert module.ManagedMemory.available(0)
    memory = module.ManagedMemory(PAGE, 0)
    assert ctypes.string_at(memory.address(), PAGE) == bytes(PAGE)
    memory.prefetch(4096, PAGE - 4096, 0)
    with pytest.raises(ValueError, match="bytes 4096 to 69632 of 65536"):
        memory.prefetch(4096, PAGE, 0)
    with pytest.raises(RuntimeError, match=r"free$"):
        module.ManagedMemory(1 << 30, 0)  # all there is, and a page of it is taken
    del memory
    module.ManagedMemory(1 << 30, 0)


def test_slots_that_find_no_room(tmp_path):
    a, b = _params(), _params()
    plain, stand_in = pf.optim.AdamW(a), StandIn(room=PAGE)
    paged = Paged(b, stand_in, 0, LARGE, tmp_path, transfer="copied")
    with pytest.warns(RuntimeWarning, match="kernels reach them in place"):
        _step(b, paged, 0)
    _step(a, plain, 0)
    _same(a, b, plain, paged)
    assert paged.memory_report()["transfer"] == "in place"
    with pytest.raises(ValueError, match="transfer is 'fast', expected one of auto, copied, in_place"):
        pf.optim.PagedAdamW(a, transfer="fast")


def test_memory_that_cannot_be_pinned(tmp_path):
    a, b = _params(), _params()
    plain, stand_in = pf.optim.AdamW(a), StandIn(pins=False)
    paged = Paged(b, stand_in, 2 * PAGE, 5 * PAGE, tmp_path)
    with pytest.warns(RuntimeWarning, match="could not be pinned"):
        _step(b, paged, 0)
    _step(a, plain, 0)
    for t in range(1, 6):
        _step(a, plain, t)
        _step(b, paged, t)
    _same(a, b, plain, paged)
    assert paged.memory_report()["pinned_bytes"] == 0


def test_a_device_with_less_room_than_its_budget(tmp_path):
    a, b = _params(), _params()
    plain, stand_in = pf.optim.AdamW(a), StandIn(room=3 * PAGE)
    paged = Paged(b, stand_in, 1 << 24, 1 << 24, tmp_path)
    with pytest.warns(RuntimeWarning, match="no room for its budget"):
        _step(b, paged, 0)
    _step(a, plain, 0)
    for t in range(1, 4):
        _step(a, plain, t)
        _step(b, paged, t)
    _same(a, b, plain, paged)
    report = paged.memory_report()
    assert report["budget_bytes"] == 3 * PAGE >= report["resident_bytes"] > 2 * PAGE and report["host_bytes"] > 0
    assert report["transfer"] == "in place"


def test_a_device_that_is_full_keeps_room_for_slots(tmp_path):
    a, b = _params(), _params()
    plain, stand_in = pf.optim.AdamW(a), StandIn(room=7 * PAGE)
    paged = Paged(b, stand_in, 10 * PAGE, 1 << 24, tmp_path, transfer="copied")
    _run(a, b, plain, paged, steps=2)
    _same(a, b, plain, paged)
    assert paged.memory_report()["transfer"] == "copied" and stand_in.room == 0


@pytest.mark.parametrize("bits", [32, 8])
def test_the_gpus_kernel_steps_pages_emulated(tmp_path, bits):
    """adamw_pages_cuda on the host executor, on pages of the "device" and of the host, some pieces parts of tensors."""
    executor = plugin.executor()
    shapes = [(9000,), (5,), (4097,), (30, 20)]
    a, b = _params(shapes), _params(shapes)
    plain = pf.optim.AdamW(a, lr=1e-2, state_bits=bits)

    class OnExecutor(Paged):
        def _options(self, call):
            return self._options_on_cuda(call, self._scalars(self.param_groups[0], torch.device("cpu")))

        def _launch(self, call, tables, pages, page_bytes, threads, options):
            with backend.emulated(executor, 0, 0):
                self._launch_on_cuda(call, tables, pages, page_bytes, options)

    paged = OnExecutor(b, StandIn(), PAGE, 2 * PAGE, tmp_path, lr=1e-2, state_bits=bits)
    for t in range(3):
        _step(a, plain, t)
        _step(b, paged, t)
    assert bits == 8 or paged.memory_report()["pages"] > 1
    _same(a, b, plain, paged)
    assert os.listdir(tmp_path) == []


def test_stochastic_rounding_on_a_gpu_is_refused():
    paged = pf.optim.PagedAdamW([nn.Parameter(torch.zeros(3))], stochastic_rounding=True)
    with pytest.raises(ValueError, match="use master_weights=True"):
        paged._options_on_cuda(None, paged._scalars(paged.param_groups[0], torch.device("cpu")))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("way", [{"transfer": "copied"}, {"transfer": "in_place"}, {"unified_memory": True}], ids=str)
def test_on_a_gpu(tmp_path, way, bits):
    a = [nn.Parameter(p.detach().cuda()) for p in _params()]
    b = [nn.Parameter(p.detach().cuda()) for p in _params()]
    plain = pf.optim.AdamW(a, lr=1e-2, state_bits=bits)
    paged = pf.optim.PagedAdamW(
        b, lr=1e-2, state_bits=bits, resident_bytes=300_000, host_bytes=200_000, spill_dir=tmp_path, **way
    )
    for t in range(20):
        for params, optimizer in ((a, plain), (b, paged)):
            generator = torch.Generator().manual_seed(t)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).cuda()
            optimizer.step()
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(value, paged.state[q][key]) for key, value in plain.state[p].items())
