"""Fixtures every test may use."""

import pytest

from pyfastpeft._native import _C

pytest_plugins = ["emu.plugin"]  # the fixture `device`

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
