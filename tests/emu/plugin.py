"""The fixture `device`, and what a test session says about emulated kernels at its end.

PYFASTPEFT_EMU_SEED=N, PYFASTPEFT_EMU_PREEMPT=K   emulated tests run on that schedule: threads in random order, and
    interrupted after one in K memory accesses
PYFASTPEFT_NO_SKIP=1   a skipped emulated or PTX test is a failure, and so is, in a run of the whole suite, a kernel of
    csrc/ that was never launched
"""

from __future__ import annotations

import os
import re

import pytest
import torch
from emu import backend, build

from pyfastpeft._native import _C

NO_SKIP = os.environ.get("PYFASTPEFT_NO_SKIP", "") not in ("", "0")


class Device(str):
    """What torch is told ("cpu", "cuda"), and whether CUDA kernels run there on the host executor."""

    emulated = False


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def device(request):
    """The device an op test runs on; skips where this machine or this build has none of that kind.

    "emulated" is the CPU with every op's CUDA implementation in the place of its CPU one, run thread by thread by the
    host executor: choose sizes with `device.emulated` in mind. Faults it finds are raised.
    """
    kind = request.param
    if kind == "cuda":
        if not _C.cuda_status()["built"]:
            pytest.skip("built without CUDA")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    if kind != "emulated":
        yield Device(kind)
        return
    seed, preempt = (int(os.environ.get(f"PYFASTPEFT_EMU_{name}", 0)) for name in ("SEED", "PREEMPT"))
    device = Device("cpu")
    device.emulated = True
    with backend.emulated(executor(), seed, preempt):
        yield device


def executor():
    """The module with the emulated kernels; skips the test where it cannot be built."""
    try:
        return build.load()
    except build.Unavailable as missing:
        pytest.skip(f"the host executor cannot be built: {missing}")


def _runs_anywhere(node: str) -> bool:
    """Whether the test needs no GPU: an emulated one, or one of tests/emu."""
    return "emulated" in node or ("tests/emu/" in node and not re.search(r"[\[-]cuda[\]-]", node))


def _refuse_skip(report) -> None:
    if NO_SKIP and report.skipped and not hasattr(report, "wasxfail") and _runs_anywhere(report.nodeid):
        report.outcome = "failed"
        report.longrepr = f"skipped, and PYFASTPEFT_NO_SKIP does not allow that: {report.longrepr}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    outcome = yield
    _refuse_skip(outcome.get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    outcome = yield
    _refuse_skip(outcome.get_result())


def kernels_of_the_sources() -> set[str]:
    """The names of all kernels in csrc/."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(build.ROOT.glob("csrc/*/*.cu*")))
    text = re.sub(r"//[^\n]*", "", text)
    return set(
        re.findall(
            r"__global__[^;{}]*?\b(\w+)\(\s*(?!\w+\s*\))[^{};]*\{", re.sub(r"__launch_bounds__\([^)]*\)", "", text)
        )
    )


def kernels_of(launched) -> set[str]:
    """The names of the kernels that these instantiations are of."""
    return {re.split("[<(]", name)[0] for name in launched}


def pytest_terminal_summary(terminalreporter, config):
    if not build.load.cache_info().currsize:  # no emulated test ran
        return
    launches = dict(build.load().emu_launches())
    missing = kernels_of_the_sources() - kernels_of(launches)
    terminalreporter.section("host executor")
    terminalreporter.write_line(
        f"{sum(launches.values())} launches of {len(launches)} kernels (instantiations counted apart) in "
        f"{build.load().emu_seconds():.1f} s"
    )
    if missing:
        terminalreporter.write_line(f"never launched: {', '.join(sorted(missing))}")
    whole_suite = not config.option.keyword and not config.option.markexpr and config.args == config.getini("testpaths")
    if NO_SKIP and missing and whole_suite:
        terminalreporter.write_line("PYFASTPEFT_NO_SKIP: every kernel has to run; the session counts as failed")
        terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED
