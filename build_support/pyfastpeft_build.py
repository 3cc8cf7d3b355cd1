"""The build backend: setuptools, plus the choice of a CUDA compiler.

PYFASTPEFT_CUDA=0     a CPU wheel
PYFASTPEFT_CUDA=1     a CUDA wheel, or an error that says what is missing
PYFASTPEFT_CUDA=auto  (default) a CUDA wheel where a compiler is at hand or can be had:
    - nvcc in CUDA_HOME or on PATH is used;
    - otherwise, when the environment that pip installs into has a CUDA 13 build of torch, the compiler's wheels are
      added to the build requirements. torch is recognised by its version.py, never imported: the build is isolated.

Compilers for CUDA 12 are not on PyPI (nvidia-cuda-nvcc-cu12 holds ptxas alone), so beside a CUDA 12 torch, without an
nvcc, the wheel is CPU only; build_info() and `pyfastpeft doctor` then give the reason and the way out.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import setuptools.build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  (the hooks of PEP 517 and PEP 660)

# One minor release for all five: with only nvcc pinned, pip takes a newer nvvm, and 13.0's ptxas refuses its PTX. 13.0
# rather than the newest because any 13.x driver runs it.
COMPILER_RELEASE = "13.0"
COMPILER_WHEELS = tuple(
    f"{name}=={COMPILER_RELEASE}.*"
    for name in ("nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-cuda-cccl", "nvidia-cuda-crt", "nvidia-nvvm")
)
WAY_OUT = (
    "install a CUDA toolkit (12.4 or newer) and put its nvcc on PATH or its folder in CUDA_HOME, or set "
    "PYFASTPEFT_CUDA=1 to compile with the CUDA 13 compiler from PyPI (its kernels need driver 580 or newer)"
)


def cuda_mode() -> str:
    """The value of PYFASTPEFT_CUDA: "0", "1" or "auto"."""
    mode = os.environ.get("PYFASTPEFT_CUDA", "").strip().lower() or "auto"
    if mode not in ("0", "1", "auto"):
        raise SystemExit(
            f"PYFASTPEFT_CUDA is {mode!r}, expected 0 (CPU only), 1 (CUDA or an error) or auto; unset it for auto"
        )
    return mode


def installed_nvcc() -> str | None:
    """The machine's own nvcc: CUDA_HOME's, else the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = Path(home, "bin", "nvcc")
        if not nvcc.is_file():
            raise SystemExit(f"CUDA_HOME is {home!r}, but {nvcc} does not exist; correct or unset it")
        return str(nvcc)
    return shutil.which("nvcc")


def wheel_nvcc() -> str | None:
    """The nvcc of the compiler wheels, which are in the build environment when cuda_requirements() asked for them."""
    for folder in sys.path:
        nvcc = Path(folder, "nvidia", f"cu{COMPILER_RELEASE.split('.')[0]}", "bin", "nvcc")
        if nvcc.is_file():
            return str(nvcc)
    return None


def target_torch_cuda() -> str | None:
    """The CUDA release of the torch that pip is installing beside ("13.0"); None: no torch, or a CPU build."""
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        try:
            text = Path(folder, "torch", "version.py").read_text(encoding="utf-8")
        except OSError:
            continue
        found = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+\.\d+)", text, re.MULTILINE)
        return found.group(1) if found else None
    return None


def cuda_requirements() -> list[str]:
    """The compiler wheels this build needs; [] when there is an nvcc or no CUDA is wanted."""
    mode = cuda_mode()
    if mode == "0" or installed_nvcc():
        return []
    if mode == "auto" and not (target_torch_cuda() or "").startswith("13."):
        return []
    return list(COMPILER_WHEELS)


def find_nvcc() -> tuple[str | None, str]:
    """(path of nvcc, "") or (None, why this is a CPU build). SystemExit when PYFASTPEFT_CUDA=1 cannot be met."""
    mode = cuda_mode()
    if mode == "0":
        return None, "PYFASTPEFT_CUDA=0 asked for a CPU build"
    nvcc = installed_nvcc() or wheel_nvcc()
    if nvcc:
        return nvcc, ""
    if mode == "1":
        raise SystemExit(
            "PYFASTPEFT_CUDA=1, but there is no CUDA compiler: no nvcc in CUDA_HOME or on PATH, and the build "
            "environment lacks the compiler's wheels (they are added under build isolation; with --no-build-isolation "
            f"run: pip install {' '.join(repr(w) for w in COMPILER_WHEELS)})"
        )
    cuda = target_torch_cuda()
    if cuda and not cuda.startswith("13."):
        why = f"no nvcc was found, and PyPI has no compiler for the CUDA {cuda} of the installed torch"
    elif cuda:
        why = f"no nvcc was found in CUDA_HOME, on PATH or in the build environment (torch has CUDA {cuda})"
    else:
        why = "no nvcc was found in CUDA_HOME or on PATH, and no CUDA 13 build of torch is installed"
    return None, f"{why}; {WAY_OUT}"


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + cuda_requirements()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + cuda_requirements()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # setuptools collects the wheel in build/lib* and forgets to remove what an earlier build left there: modules that
    # no longer exist would be shipped.
    for folder in Path("build").glob("lib*"):
        shutil.rmtree(folder)
    return _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)
