"""When the build asks for a CUDA compiler, and what it says when there is none (build_support/pyfastpeft_build.py)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "build_support" / "pyfastpeft_build.py"

TORCH_VERSION_FILES = {
    "cuda13": "from typing import Optional\n__version__ = '2.13.0+cu130'\ndebug = False\ncuda: Optional[str] = '13.0'\n",
    "cuda12": "__version__ = '2.6.0+cu124'\ndebug = False\ncuda: Optional[str] = '12.4'\nhip: Optional[str] = None\n",
    "cpu": "__version__ = '2.13.0+cpu'\ndebug = False\ncuda: Optional[str] = None\nhip: Optional[str] = None\n",
    "none": None,
}


@pytest.fixture
def backend(monkeypatch, tmp_path):
    """The backend in an environment without a compiler; backend.install_torch(kind) and backend.install_nvcc() add."""
    spec = importlib.util.spec_from_file_location("pyfastpeft_build_under_test", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    purelib = tmp_path / "site-packages"
    purelib.mkdir()
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(purelib))
    monkeypatch.setattr(module.sys, "path", [str(purelib)])
    for name in ("PYFASTPEFT_CUDA", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    empty = tmp_path / "bin"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))

    def install_torch(kind):
        if TORCH_VERSION_FILES[kind] is not None:
            (purelib / "torch").mkdir()
            (purelib / "torch" / "version.py").write_text(TORCH_VERSION_FILES[kind])

    def install_nvcc(folder=empty):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "nvcc").write_text("#!/bin/sh\n")
        (folder / "nvcc").chmod(0o755)
        return folder / "nvcc"

    module.install_torch, module.install_nvcc, module.purelib = install_torch, install_nvcc, purelib
    return module


@pytest.mark.parametrize(
    ("mode", "torch", "nvcc", "wheels"),
    [
        ("auto", "none", False, False),
        ("auto", "cpu", False, False),
        ("auto", "cuda12", False, False),
        ("auto", "cuda13", False, True),
        ("auto", "cuda13", True, False),
        ("", "cuda13", False, True),
        ("0", "cuda13", False, False),
        ("0", "cuda13", True, False),
        ("1", "none", False, True),
        ("1", "cuda12", False, True),
        ("1", "none", True, False),
    ],
)
def test_compiler_wheels_are_required_when_they_are_needed(backend, monkeypatch, mode, torch, nvcc, wheels):
    monkeypatch.setenv("PYFASTPEFT_CUDA", mode)
    backend.install_torch(torch)
    if nvcc:
        backend.install_nvcc()
    expected = backend.COMPILER_WHEELS if wheels else ()
    assert tuple(backend.cuda_requirements()) == expected


def test_both_hooks_add_the_compiler_to_setuptools_own_requirements(backend, monkeypatch):
    monkeypatch.setenv("PYFASTPEFT_CUDA", "1")
    monkeypatch.setattr(backend._setuptools, "get_requires_for_build_wheel", lambda settings: ["a"])
    monkeypatch.setattr(backend._setuptools, "get_requires_for_build_editable", lambda settings: ["b"])
    assert backend.get_requires_for_build_wheel() == ["a", *backend.COMPILER_WHEELS]
    assert backend.get_requires_for_build_editable() == ["b", *backend.COMPILER_WHEELS]


def test_compiler_wheels_are_of_one_release(backend):
    names, releases = zip(*(wheel.split("==") for wheel in backend.COMPILER_WHEELS), strict=True)
    assert set(names) == {
        "nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-cuda-cccl", "nvidia-cuda-crt", "nvidia-nvvm",
    }  # fmt: skip
    assert len(set(releases)) == 1 and releases[0].startswith("13.") and releases[0].endswith(".*")


def test_nvcc_of_cuda_home_comes_before_path_and_wheels(backend, monkeypatch, tmp_path):
    on_path = backend.install_nvcc()
    wheel = backend.install_nvcc(backend.purelib / "nvidia" / "cu13" / "bin")
    home = backend.install_nvcc(tmp_path / "toolkit" / "bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert backend.find_nvcc() == (str(home), "")
    monkeypatch.delenv("CUDA_HOME")
    assert backend.find_nvcc() == (str(on_path), "")
    on_path.unlink()
    assert backend.find_nvcc() == (str(wheel), "")
    monkeypatch.setenv("PYFASTPEFT_CUDA", "0")
    assert backend.find_nvcc() == (None, "PYFASTPEFT_CUDA=0 asked for a CPU build")


@pytest.mark.parametrize(
    ("torch", "says"),
    [
        ("cuda12", "PyPI has no compiler for the CUDA 12.4 of the installed torch"),
        ("cpu", "no CUDA 13 build of torch is installed"),
        ("none", "no CUDA 13 build of torch is installed"),
    ],
)
def test_a_cpu_build_says_why_and_the_way_out(backend, torch, says):
    backend.install_torch(torch)
    nvcc, why = backend.find_nvcc()
    assert nvcc is None
    assert says in why and "CUDA_HOME" in why and "PYFASTPEFT_CUDA=1" in why and "driver 580" in why


def test_cuda_demanded_without_a_compiler_fails_with_what_to_install(backend, monkeypatch):
    monkeypatch.setenv("PYFASTPEFT_CUDA", "1")
    with pytest.raises(SystemExit, match="there is no CUDA compiler.*nvidia-cuda-nvcc==13"):
        backend.find_nvcc()


def test_bad_settings_are_refused(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("PYFASTPEFT_CUDA", "yes")
    with pytest.raises(SystemExit, match="'yes', expected 0 .*1 .*auto"):
        backend.cuda_mode()
    monkeypatch.setenv("PYFASTPEFT_CUDA", "auto")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="CUDA_HOME is .*nowhere.* does not exist"):
        backend.find_nvcc()


def test_the_backend_imports_neither_torch_nor_numpy():
    code = f"""
import runpy, sys
runpy.run_path({str(SOURCE)!r})["find_nvcc"]()
assert not {{"torch", "numpy", "pyfastpeft"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
