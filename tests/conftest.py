"""Fixtures every test may use."""

import os

import pytest
import torch

from pyfastpeft._native import _C

CPU_ISAS = ("scalar", "avx2", "avx512", "amx")


@pytest.fixture(params=CPU_ISAS)
def isa(request):
    """Runs the test once per instruction set this machine has; the kernels use it for the test's duration."""
    detected = _C.detected_cpu_isa()
    if CPU_ISAS.index(request.param) > CPU_ISAS.index(detected):
        pytest.skip(f"this machine's best instruction set is {detected}")
    former = _C.cpu_isa()
    _C.force_cpu_isa(request.param)
    yield request.param
    _C.force_cpu_isa(former)


class Device(str):
    """What torch is told ("cpu", "cuda"), and whether CUDA kernels run there on the host executor (tests/emu)."""

    emulated = False


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def device(request):
    """The device an op test runs on; skips where this machine or this build has none of that kind.

    "emulated" is the CPU with every op's CUDA implementation in the place of its CPU one, run thread by thread by the
    executor of tests/emu: choose sizes with `device.emulated` in mind. Faults it finds are raised.
    """
    kind = request.param
    if kind == "emulated":
        yield from _emulated_device()
        return
    if kind == "cuda":
        if not _C.cuda_status()["built"]:
            pytest.skip("built without CUDA")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    yield Device(kind)


def _emulated_device():
    from emu import backend, build

    device = Device("cpu")
    device.emulated = True
    try:
        build.load()
    except build.Unavailable as missing:
        pytest.skip(f"the host executor cannot be built: {missing}")
    with backend.emulated(
        int(os.environ.get("PYFASTPEFT_EMU_SEED", 0)), int(os.environ.get("PYFASTPEFT_EMU_PREEMPT", 0))
    ):
        yield device
