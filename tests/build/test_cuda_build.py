"""The CUDA route on any machine: kernels compile without spilling, keep to the rules, and say why they are absent."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyfastpeft
from pyfastpeft import _native

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "csrc").glob("*/*_cuda*.cu"))


def code_of(file):
    """The file without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("file", [f for f in KERNELS if f.parent.name != "common"], ids=lambda f: f.stem)
def test_kernels_compile_without_spilling(file, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [nvcc, "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-DPYFASTPEFT_WITH_CUDA",
               f"-I{ROOT / 'csrc'}", "-c", str(file), "-o", str(tmp_path / "kernel.o")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills and all(spill == ("0", "0") for spill in spills), done.stderr
    assert all(stack == "0" for stack in re.findall(r"(\d+) bytes stack frame", done.stderr)), done.stderr


@pytest.mark.parametrize("file", KERNELS, ids=lambda f: f.stem)
def test_kernels_keep_what_kport_asks(file):
    code = code_of(file)
    for forbidden in (
        r"<<<",
        r"\b__shared__\b",
        r"\basm\b",
        r"\b__CUDA_ARCH__\b",
        r"\bcub::",
        r"\bcooperative_groups\b",
    ):
        assert not re.search(forbidden, code), f"{file.name} has {forbidden}; see csrc/common/kport.cuh"
    if "__global__" in code:  # kport.cuh itself or a header that brings it
        assert re.search(r'#include "[a-z0-9_/]+\.cuh"', file.read_text(encoding="utf-8"))


def test_a_cpu_build_refuses_cuda_tensors_with_the_reason_and_the_way_out(monkeypatch):
    class CpuBuild:
        @staticmethod
        def build_info():
            return {"cuda": "", "no_cuda_reason": "no nvcc was found; install a CUDA toolkit"}

    monkeypatch.setattr(_native, "_C", CpuBuild)
    with pytest.raises(
        RuntimeError, match=r"quantize_4bit: .* no CUDA kernels: no nvcc was found; install .* reinstall"
    ):
        _native.require_cuda("quantize_4bit")


@pytest.mark.skipif(not pyfastpeft.build_info()["cuda"], reason="built without CUDA")
def test_the_binding_reports_a_missing_driver_and_bad_arguments():
    if _native._C.cuda_status()["driver_version"]:
        pytest.skip("this machine has a driver")
    arguments = {"weight": 16, "dtype": 0, "n": 64, "blocksize": 64, "quant_type": "nf4", "packed": 16, "packed_numel": 32,
                 "absmax": 16, "absmax_numel": 1, "bad": 16, "device": 0, "stream": 0}  # fmt: skip
    with pytest.raises(RuntimeError, match="quantize_4bit: .*driver"):
        _native._C.nf4_quantize_cuda(**arguments)
    for wrong, message in (
        ({"blocksize": 48}, "blocksize is 48"),
        ({"weight": 0}, "weight has no memory"),
        ({"packed": 0}, "packed has no memory"),
    ):
        with pytest.raises(ValueError, match=message):
            _native._C.nf4_quantize_cuda(**{**arguments, **wrong})


STUB_DRIVER = """
#include <stdlib.h>
int cuDriverGetVersion(int* version) { *version = atoi(getenv("STUB_VERSION")); return 0; }
int cuInit(unsigned flags) { return atoi(getenv("STUB_INIT")); }
"""
ASK = """
import json, pyfastpeft
from pyfastpeft import doctor
from pyfastpeft._native import _C
try:
    _C.nf4_quantize_cuda(16, 0, 64, 64, "nf4", 16, 32, 16, 1, 16, 0, 0)
except RuntimeError as error:
    print(json.dumps([str(error), doctor.report()["problems"]]))
"""


@pytest.mark.skipif(not pyfastpeft.build_info()["cuda"], reason="built without CUDA")
@pytest.mark.parametrize(
    ("version", "init", "said", "fix"),
    [
        (
            12040,
            0,
            r"driver runs CUDA up to 12\.4, pyfastpeft was built with CUDA .* install driver \d+ or newer",
            "driver",
        ),
        (99000, 100, "finds no GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES", "nvidia-smi"),
        (99000, 803, "cudaErrorSystemDriverMismatch", "reboot"),
    ],
    ids=["too old", "no GPU", "mismatch"],
)
def test_a_driver_that_cannot_be_used_is_a_sentence_at_the_call_and_not_at_the_import(
    tmp_path, version, init, said, fix
):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a driver with")
    if version == 12040 and pyfastpeft.build_info()["cuda"].startswith("12."):
        version = 11080
    source = tmp_path / "stub.c"
    source.write_text(STUB_DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(source)], check=True)
    env = {**os.environ, "STUB_VERSION": str(version), "STUB_INIT": str(init), "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", ASK], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error, problems = json.loads(done.stdout)
    assert error.startswith("quantize_4bit: ")
    assert re.search(said if version != 11080 else said.replace(r"12\.4", r"11\.8"), error), error
    assert any(fix in problem["fix"] for problem in problems), problems


@pytest.mark.skipif(not pyfastpeft.build_info()["cuda"], reason="built without CUDA")
def test_a_gpu_this_build_has_no_kernels_for_is_told_what_there_is_and_the_way_out():
    text = _native._C.cuda_error_text(209)
    assert text.startswith("cudaErrorNoKernelImageForDevice")
    assert f"this build of pyfastpeft has kernels for {', '.join(pyfastpeft.build_info()['cuda_archs'])};" in text
    assert "PYFASTPEFT_CUDA_ARCHS=" in text and "pyfastpeft doctor" in text
    assert _native._C.cuda_error_text(2) == "cudaErrorMemoryAllocation: out of memory"
