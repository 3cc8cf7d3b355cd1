"""The executor runs the CUDA implementation of an op in the place of its CPU one, and watches what the op does in torch."""

import concurrent.futures
import types

import pytest
import torch
from emu import backend, plugin

import pyfastpeft as pf


@pytest.fixture
def module():
    return plugin.executor()


def _launches(module):
    return sum(count for _, count in module.emu_launches())


def test_an_op_runs_its_cuda_kernel(device):
    weight = torch.linspace(-1, 1, 100, device=device)
    before = _launches(plugin.executor()) if device.emulated else 0
    back = pf.ops.dequantize_4bit(pf.ops.quantize_4bit(weight, 32))
    assert (back - weight).abs().max() < 0.2
    if device.emulated:
        assert _launches(plugin.executor()) == before + 2


def test_afterwards_the_cpu_code_is_back(module):
    with backend.emulated(module):
        pass
    before = _launches(module)
    pf.ops.quantize_4bit(torch.ones(64))
    assert _launches(module) == before


def test_an_error_inside_puts_the_cpu_code_back_too(module):
    with pytest.raises(ZeroDivisionError), backend.emulated(module):
        raise ZeroDivisionError
    before = _launches(module)
    pf.ops.quantize_4bit(torch.ones(64))
    assert _launches(module) == before


def test_gradients_and_autocast_stay(module):
    x, scale = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    before = _launches(module)
    with backend.emulated(module):
        y = pf.ops.ia3_scale(x, scale)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), (x, scale)), (scale.expand(3, 8), x.sum(0)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (
                pf.ops.linear_lora(x, torch.ones(4, 8), None, torch.ones(2, 8), torch.ones(4, 2)).dtype
                == torch.bfloat16
            )
    assert _launches(module) > before + 2


def test_two_threads_may_call_at_once(module):
    weights = [torch.randn(3000, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    expected = [pf.ops.quantize_4bit(w, 32).packed for w in weights]
    with backend.emulated(module), concurrent.futures.ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            got = list(pool.map(lambda w: pf.ops.quantize_4bit(w, 32).packed, weights))
            assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_cpu_functions_are_not_in_the_module(module):
    with pytest.raises(RuntimeError, match="holds the CUDA kernels only"):
        module.nf4_quantize_cpu(torch.ones(64).data_ptr(), 0, 64, 64, "nf4", 64, 32, 64, 1)


def _watched(module, implementation):
    return backend.checked("some_op", implementation, module, [0])()


def test_memory_that_nobody_wrote_is_not_returned(module):
    with pytest.raises(
        module.Report, match=r"UNWRITTEN output: some_op returned .*float32 \(3, 4\) as result 1.* byte 0"
    ):
        _watched(module, lambda: (torch.zeros(2), torch.empty(3, 4)))
    with pytest.raises(module.Report, match=r"byte 16 \(value 4\)"):
        _watched(module, lambda: _partly_filled())
    assert _watched(module, lambda: torch.empty(3, 4).view(4, 3).fill_(2.0)).sum() == 24
    assert _watched(module, lambda: torch.add(torch.ones(2), 1, out=torch.empty(2))).tolist() == [2, 2]
    assert _watched(module, lambda: torch.empty(0, 4)).shape == (0, 4)


def _partly_filled():
    out = torch.empty(8)
    out[:4] = 0
    return out


def test_memory_freed_and_given_out_again_is_not_fresh(module):
    def implementation():
        for _ in range(20):
            torch.empty(64)
        return torch.zeros(64)

    assert _watched(module, implementation).sum() == 0


def test_waiting_for_the_gpu_is_refused(module):
    with pytest.raises(module.Report, match="SYNC: some_op's CUDA implementation calls aten::_local_scalar_dense"):
        _watched(module, lambda: torch.ones(1).item())
    with pytest.raises(module.Report, match="SYNC"):
        _watched(module, lambda: torch.ones(1) if torch.ones(1) > 0 else None)


def _report(nodeid, **others):
    return types.SimpleNamespace(nodeid=nodeid, skipped=True, outcome="skipped", longrepr="why", **others)


@pytest.mark.parametrize(
    "nodeid, refused",
    [
        ("tests/ops/test_x.py::test_y[emulated]", True),
        ("tests/ops/test_x.py::test_y[emulated-shape1-float32]", True),
        ("tests/emu/test_ptx.py::test_y[sm_80]", True),
        ("tests/emu/test_ptx.py", True),
        ("tests/emu/test_emu_executor.py::test_y[cuda]", False),
        ("tests/ops/test_x.py::test_y[cuda]", False),
        ("tests/ops/test_x.py::test_y[amx]", False),
    ],
)
def test_a_skip_is_a_failure_where_ci_says_so(monkeypatch, nodeid, refused):
    monkeypatch.setattr(plugin, "NO_SKIP", True)
    report = _report(nodeid)
    plugin._refuse_skip(report)
    assert report.outcome == ("failed" if refused else "skipped")
    expected_failure = _report(nodeid, wasxfail="known")
    plugin._refuse_skip(expected_failure)
    assert expected_failure.outcome == "skipped"


def test_the_kernels_of_the_sources_are_found():
    names = plugin.kernels_of_the_sources()
    assert {"nf4_quantize_kernel", "nf4_dequantize_kernel", "lora_sum_parts_kernel"} <= names
    assert all(name.endswith("_kernel") for name in names), names
