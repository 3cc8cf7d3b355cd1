"""bench/gpu/bench_paged.py without a GPU: its calls are made in the order and with the options it has, on the stand-in. What
it measures there means nothing; that it runs, checks and reports does."""

import importlib
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from gpu_stand_in import StandIn
from optim_cases import PAGE

import pyfastpeft as pf
from pyfastpeft.optim.device_pages import DevicePages

GPU_BENCHES = Path(__file__).resolve().parents[2] / "bench" / "gpu"


class Event:
    """Of the host's clock, since nothing is late here."""

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class Stream:
    def wait_event(self, event):
        pass

    def wait_stream(self, stream):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def torch_without_a_gpu():
    """torch, but what is made on "cuda" is on the CPU, and torch.cuda is the classes above."""

    def on_cpu(make):
        def made(*args, device=None, pin_memory=False, **options):
            return make(*args, device="cpu", **options)

        return made

    cuda = types.SimpleNamespace(
        synchronize=lambda: None, Event=Event, Stream=Stream, stream=lambda s: s, current_stream=Stream
    )
    changed = {
        "randn": on_cpu(torch.randn), "empty": on_cpu(torch.empty), "Generator": lambda _: torch.Generator(), "cuda": cuda
    }  # fmt: skip
    seen = types.ModuleType("torch")
    seen.__getattr__ = lambda name: changed[name] if name in changed else getattr(torch, name)
    return seen


@pytest.fixture
def stand_ins(monkeypatch):
    """PagedAdamW's pages are a stand-in's; the memories made."""
    made = []

    def memory_for(self, device):
        sizes = self._requested, self._host_bytes
        made.append(DevicePages(StandIn(len(made)), *sizes, self._spill_dir, page_bytes=PAGE, **self._on_device))
        return made[-1]

    launch = pf.optim.PagedAdamW._launch

    def launched(self, *args):
        for memory in self.pages:
            memory.device.run()
        launch(self, *args)

    monkeypatch.setattr(pf.optim.PagedAdamW, "_memory_for", memory_for)
    monkeypatch.setattr(pf.optim.PagedAdamW, "_launch", launched)
    return made


def test_it_runs_to_its_end(stand_ins, monkeypatch):
    monkeypatch.syspath_prepend(str(GPU_BENCHES))
    found = []

    class Bench:
        """_gpu.GpuBench's interface, one round of each candidate."""

        def __init__(self, name, title):
            assert name == "paged"

        def compare(self, title, candidates, *, moved_bytes=None, floor_seconds=None, check=None, eager=False):
            assert eager and (moved_bytes or floor_seconds > 0)
            if check is not None:
                check()
            for calls in candidates.values():
                for call in calls:
                    call()
            found.append((title, sorted(candidates)))

        def finish(self):
            found.append("finished")

    monkeypatch.setitem(sys.modules, "_gpu", types.SimpleNamespace(GpuBench=Bench))
    monkeypatch.delitem(sys.modules, "bench_paged", raising=False)
    bench = importlib.import_module("bench_paged")
    monkeypatch.delitem(sys.modules, "bench_paged")
    monkeypatch.setattr(bench, "torch", torch_without_a_gpu())
    monkeypatch.setattr(bench, "VALUES", 1 << 20)
    bench.main()
    assert [f if f == "finished" else f[1] for f in found] == [
        ["AdamW resident", "copied", "in_place"], ["plain", "unified"],
        ["AdamW resident", "copied", "in_place"], ["plain", "unified"], "finished",
    ]  # fmt: skip
    assert {pages.stats()["transfer"] for pages in stand_ins} >= {"copied", "in place"}
