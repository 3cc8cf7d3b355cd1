"""Fixtures every test may use."""

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


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """The device an op test runs on; skips where this machine or this build has none of that kind."""
    if request.param == "cuda":
        if not _C.cuda_status()["built"]:
            pytest.skip("built without CUDA")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    return request.param
