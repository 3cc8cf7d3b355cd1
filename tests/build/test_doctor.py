"""build_info() and the doctor: true on this machine, and right about machines that are not at hand."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch

import pyfastpeft
from pyfastpeft import doctor
from pyfastpeft._native import _C
from pyfastpeft.build_info import kernel_variants


def test_build_info_describes_this_build():
    info = pyfastpeft.build_info()
    assert info["version"] == pyfastpeft.__version__
    assert info["compiler"].startswith("GNU ")
    if info["cuda"]:
        assert info["minimum_driver"] == {"12": "525", "13": "580"}[info["cuda"].split(".")[0]]
        assert info["cuda_archs"] and info["cuda_archs"][-1].endswith("+PTX")
        assert info["cuda_why_not"] is None
        assert "cuda" in info["kernels"]["nf4_quantize"]
    else:
        assert info["cuda_why_not"] and info["minimum_driver"] is None and info["cuda_archs"] == []
    assert all("scalar" in variants for name, variants in info["kernels"].items() if variants != ["cuda"])
    json.dumps(info)


def test_kernel_variants_are_read_from_file_names():
    files = ["common/cpu_isa.cpp", "nf4/nf4_quantize_cpu.cpp", "nf4/nf4_quantize_cpu_avx512.cpp", "nf4/nf4_quantize_cpu_avx2.cpp",
             "nf4/nf4_quantize_cuda.cu", "lora/lora_cpu.cpp", "lora/lora_cuda_sm90.cu", "common/device_cuda.cu"]  # fmt: skip
    assert kernel_variants(files) == {
        "lora": ["scalar", "cuda"],
        "nf4_quantize": ["scalar", "avx2", "avx512", "cuda"],
    }


def test_report_is_plain_data_and_prints():
    from rich.console import Console

    result = doctor.report()
    json.dumps(result)
    assert result["versions"]["torch"] == torch.__version__
    assert result["cpu"]["isa_used"] == _C.cpu_isa()
    out = io.StringIO()
    doctor.print_report(result, Console(file=out, width=100))
    text = out.getvalue()
    assert torch.__version__ in text and result["cpu"]["model"] in text and "nf4_quantize" in text


def test_every_op_is_listed_with_where_it_runs():
    rows = {row["op"]: row for row in doctor.report()["ops"]}
    assert {"adamw_", "dequantize_4bit", "ia3_scale", "linear_4bit", "linear_lora", "quantize_4bit"} <= rows.keys()
    built = bool(pyfastpeft.build_info()["cuda"])
    for name, row in rows.items():
        assert row["cpu"] is True and row["cuda_built"] == built, name
        assert row["cuda"] == (built and torch.cuda.is_available())


def test_report_names_the_variant_that_runs(isa):
    rows = {row["kernel"]: row["cpu"] for row in doctor.report()["kernels"]}
    for name, variants in pyfastpeft.build_info()["kernels"].items():
        if rows[name] is None:
            assert variants == ["cuda"]
        else:
            assert rows[name] in variants
            assert rows[name] == isa or isa not in variants


@pytest.mark.parametrize(
    ("capability", "route"),
    [((7, 0), None), ((7, 5), "native"), ((8, 0), "native"), ((8, 7), "native"), ((9, 0), "native"), ((10, 0), "PTX"), ((12, 1), "PTX")],
)  # fmt: skip
def test_gpu_route(capability, route):
    assert doctor.gpu_route(["75", "80", "86", "90a", "90+PTX"], capability) == route


def test_gpu_route_without_ptx_for_the_gpu():
    assert doctor.gpu_route(["90a"], (9, 0)) == "native"
    assert doctor.gpu_route(["90a"], (10, 0)) is None
    assert doctor.gpu_route(["100a"], (10, 3)) is None and doctor.gpu_route(["100"], (10, 3)) == "native"
    assert doctor.gpu_route(["120", "120+PTX"], (10, 0)) is None


def problems_of(monkeypatch, status, torch_sees=0, torch_cuda=None, build=None):
    monkeypatch.setattr(doctor, "_C", FakeModule(status))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: torch_sees)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    if build is not None:
        monkeypatch.setattr(doctor, "build_info", lambda: {**pyfastpeft.build_info(), **build})
    result = doctor.report()
    from rich.console import Console

    doctor.print_report(result, Console(file=io.StringIO()))  # no crash whatever the machine
    return result, [p["problem"] + " -> " + p["fix"] for p in result["problems"]]


class FakeModule:
    """`_C` with another machine's CUDA."""

    def __init__(self, status):
        self.status = status

    def cuda_status(self):
        return self.status

    def __getattr__(self, name):
        return getattr(_C, name)


CUDA_13 = {"cuda": "13.0.88", "cuda_why_not": None, "cuda_archs": ["90a", "90+PTX"], "minimum_driver": "580"}


def test_doctor_on_a_gpu_with_a_cpu_build(monkeypatch):
    build = {
        "cuda": None,
        "cuda_why_not": "no nvcc was found; install a CUDA toolkit",
        "cuda_archs": [],
        "minimum_driver": None,
    }
    result, problems = problems_of(monkeypatch, {"built": False}, torch_sees=1, torch_cuda="12.4", build=build)
    assert any("CPU build of pyfastpeft" in p and "install a CUDA toolkit" in p for p in problems)
    assert result["cuda"]["usable"] is False
    assert not any(row["cuda_built"] for row in result["ops"])


def test_doctor_on_an_old_driver(monkeypatch):
    error = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
    status = {"built": True, "runtime_version": 13000, "driver_version": 12040, "error": error, "devices": []}
    _, problems = problems_of(monkeypatch, status, build=CUDA_13)
    assert any("cudaErrorInsufficientDriver" in p and "driver 580 or newer" in p for p in problems)


def test_doctor_on_a_gpu_this_build_does_not_reach(monkeypatch):
    gpu = {"name": "Some GPU", "capability": (7, 5), "memory_bytes": 16 << 30}
    status = {"built": True, "runtime_version": 13000, "driver_version": 13000, "error": "", "devices": [gpu]}
    result, problems = problems_of(monkeypatch, status, torch_sees=1, torch_cuda="13.0", build=CUDA_13)
    assert any("Some GPU (compute capability 7.5)" in p and 'PYFASTPEFT_CUDA_ARCHS="75"' in p for p in problems)
    gpu["capability"] = (10, 3)
    result, problems = problems_of(monkeypatch, status, torch_sees=1, torch_cuda="13.0", build=CUDA_13)
    assert result["cuda"]["devices"][0]["route"] == "PTX" and result["cuda"]["usable"]
    assert all(row["cuda"] for row in result["ops"])
    assert not [p for p in problems if "GPU" in p]


def test_doctor_sees_a_forced_instruction_set():
    if _C.detected_cpu_isa() == "scalar":
        pytest.skip("this machine has nothing above scalar")
    code = "from pyfastpeft import doctor; print([p['fix'] for p in doctor.report()['problems']])"
    env = {**os.environ, "PYFASTPEFT_CPU_ISA": "scalar"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "unset PYFASTPEFT_CPU_ISA" in done.stdout


def test_doctor_sees_too_many_threads():
    former = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    try:
        torch.set_num_threads(cores + 3)
        fixes = [p["fix"] for p in doctor.report()["problems"]]
        assert torch.get_num_threads() == cores + 3  # looking changes nothing
    finally:
        torch.set_num_threads(former)
    assert any(f"OMP_NUM_THREADS={cores}" in fix for fix in fixes)


@pytest.mark.skipif(not pyfastpeft.build_info()["cuda"], reason="built without CUDA")
def test_cuda_build_answers_without_a_driver():
    status = _C.cuda_status()
    assert status["built"] and status["runtime_version"] >= 12040
    if not status["driver_version"]:
        assert status["error"] == "no driver" and status["devices"] == []
