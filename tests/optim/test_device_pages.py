"""State of parameters on a GPU, without one: a stand-in runs what it is given late, in the order of its stream and no sooner
than somebody waits, so that a page let go too early holds other bits than AdamW's. The kernel itself runs on the host
executor."""

import copy
import os
import random

import pytest
import torch
from emu import backend, plugin
from torch import nn

import pyfastpeft as pf
from pyfastpeft.optim.device_pages import DevicePages

PAGE = 65536
SHAPES = [(300, 130), (7,), (60_000,), (4096,), (33, 100)]


@pytest.fixture(autouse=True)
def one_thread():
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


class Event:
    def __init__(self, stream, position):
        self.stream, self.position = stream, position

    def query(self):
        self.stream.run(self.stream.rng.choice((0, 0, 0, 1)))
        return self.stream.done >= self.position

    def synchronize(self):
        self.stream.waits += 1
        self.stream.run(self.position - self.stream.done)


class StandIn:
    """A device with one stream; its memory and the host's are the same, and it has `room` bytes of its own."""

    def __init__(self, seed=0, room=1 << 40, pins=True):
        self.rng, self.room, self.pins = random.Random(seed), room, pins
        self.work, self.done, self.waits, self.pinned = [], 0, 0, {}
        self.device = torch.device("cpu")

    def give(self, job):
        self.work.append(job)

    def run(self, count=None):
        end = len(self.work) if count is None else self.done + max(count, 0)
        while self.done < min(end, len(self.work)):
            job, self.work[self.done] = self.work[self.done], None
            self.done += 1
            job()

    def free_bytes(self):
        return self.room

    def allocate(self, nbytes):
        if nbytes > self.room:
            raise torch.OutOfMemoryError("the stand-in is full")
        self.room -= nbytes
        return torch.zeros(nbytes, dtype=torch.uint8)

    def pin(self, address, nbytes):
        if self.pins:
            self.pinned[address] = nbytes
        return self.pins

    def unpin(self, address):
        del self.pinned[address]

    def record(self):
        return Event(self, len(self.work))

    def copy(self, target, source):
        self.run()
        target.copy_(source)


class Paged(pf.optim.PagedAdamW):
    """PagedAdamW for CPU tensors, as if they were the stand-in's: each launch is the stand-in's to run."""

    def __init__(self, params, stand_in, resident, host, folder, **options):
        self.stand_in, self.sizes = stand_in, (resident, host)
        super().__init__(params, spill_dir=folder, **options)

    def _memory_for(self, device):
        return DevicePages(self.stand_in, *self.sizes, self._spill_dir, page_bytes=PAGE)

    def _launch(self, call, tables, pages, page_bytes, threads, options):
        as_it_is = copy.copy(call)  # addresses are passed by value
        self.stand_in.give(lambda: super(Paged, self)._launch(as_it_is, tables, pages, page_bytes, 1, options))


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


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(
    ("resident", "host"), [(0, 1 << 24), (3 * PAGE, 1 << 24), (1 << 24, 1 << 24), (3 * PAGE, 4 * PAGE), (0, 2 * PAGE)]
)
def test_same_bits_for_every_tier(tmp_path, bits, resident, host):
    for seed in range(2):
        a, b = _params(), _params()
        stand_in = StandIn(seed)
        plain = pf.optim.AdamW(a, lr=1e-2, state_bits=bits)
        paged = Paged(b, stand_in, resident, host, tmp_path, lr=1e-2, state_bits=bits)
        for t in range(12):
            skip = {t % 5} if t % 4 == 3 else ()
            _step(a, plain, t, skip)
            _step(b, paged, t, skip)
            if t == 6:
                saved = paged.state_dict()  # in the middle of it: waits for what it reads
        report = paged.memory_report()
        _same(a, b, plain, paged)
        assert report["resident_bytes"] + report["host_bytes"] + report["spilled_bytes"] == report["state_bytes"]
        assert report["resident_bytes"] <= report["budget_bytes"] <= resident
        assert (report["spill_file_bytes"] > 0) == (report["state_bytes"] > resident + host)
        assert 0 < sum(stand_in.pinned.values()) <= host or report["host_bytes"] + report["spilled_bytes"] == 0
        other = Paged(_params(), StandIn(9), 1 << 24, 1 << 24, tmp_path, state_bits=bits)
        other.load_state_dict(saved)
        assert other.state[other.param_groups[0]["params"][2]]["step"].item() == 7
        del paged, other
        assert not stand_in.pinned, "pinned memory goes with its owner"


def test_nothing_waits_while_the_host_has_room(tmp_path):
    """Page after page is launched behind an event; only what needs a frame again, or the host's eyes, waits."""
    params = _params()
    stand_in = StandIn()
    paged = Paged(params, stand_in, 2 * PAGE, 1 << 24, tmp_path)
    _step(params, paged, 0)
    before = stand_in.waits
    for t in range(1, 6):
        _step(params, paged, t)
    assert stand_in.waits == before and stand_in.done < len(stand_in.work)
    report = paged.memory_report()
    assert report["pages_in"] == report["pages_out"] == 0
    stand_in.run()


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
def test_on_a_gpu(tmp_path, bits):
    a = [nn.Parameter(p.detach().cuda()) for p in _params()]
    b = [nn.Parameter(p.detach().cuda()) for p in _params()]
    plain = pf.optim.AdamW(a, lr=1e-2, state_bits=bits)
    paged = pf.optim.PagedAdamW(
        b, lr=1e-2, state_bits=bits, resident_bytes=200_000, host_bytes=200_000, spill_dir=tmp_path
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
