"""Parameters, steps and comparisons that the tests of paged optimizers share."""

import pytest
import torch
from gpu_stand_in import StandIn
from torch import nn

import pyfastpeft as pf
from pyfastpeft.optim.device_pages import DevicePages

SHAPES = [(300, 130), (7,), (20000,), (1,), (0,), (4096,), (33, 100), (256,), (513,)]


def make_params(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def make_paged(params, budget, folder, **options):
    if budget == 1:
        with pytest.warns(RuntimeWarning, match="less than the minimum working set; 131072 bytes are used"):
            return pf.optim.PagedAdamW(params, resident_bytes=1, spill_dir=folder, **options)
    return pf.optim.PagedAdamW(params, resident_bytes=budget, spill_dir=folder, **options)


def assert_same(a, b, optimizer_a, optimizer_b):
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(p, q), f"parameter {i}"
        state, paged = optimizer_a.state[p], optimizer_b.state[q]
        if not state:
            assert not paged
            continue
        values = paged.read()
        assert set(values) == set(state) == set(paged)
        for key in state:
            assert torch.equal(state[key], values[key]) and state[key].dtype == values[key].dtype, (i, key)


def take_step(params, optimizer, t, skip=(), scale=1.0):
    generator = torch.Generator().manual_seed(1000 + t)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(p.dtype) * scale
        p.grad = None if i in skip else grad
    torch.manual_seed(t)  # stochastic rounding draws from it
    optimizer.step()


PAGE = 65536


class PagedOnStandIn(pf.optim.PagedAdamW):
    """PagedAdamW for CPU tensors, as if they were a stand-in GPU's: pages on it, on its host and on disk.

    Here a launch waits for all that the stand-in was given; tests of what orders them give it the launch.
    """

    def __init__(self, params, stand_in=None, resident=2 * PAGE, host=3 * PAGE, folder=None, **options):
        self.stand_in, self.sizes = StandIn() if stand_in is None else stand_in, (resident, host)
        super().__init__(params, spill_dir=folder, **options)

    def _memory_for(self, device):
        return DevicePages(self.stand_in, *self.sizes, self._spill_dir, page_bytes=PAGE, **self._on_device)

    def _launch(self, *args):
        self.stand_in.run()
        super()._launch(*args)
