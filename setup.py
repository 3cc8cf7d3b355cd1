"""Drives CMake and ninja: sources and flags are in CMakeLists.txt, metadata in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_support"))

from pyfastpeft_build import find_nvcc  # noqa: E402


def cached(build, name):
    """A variable of an earlier configuration in this folder; None if there was none."""
    try:
        text = (build / "CMakeCache.txt").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{name}:\w+=(.*)$", text, re.MULTILINE)
    return found.group(1) if found else None


class CMakeBuild(build_ext):
    """Builds pyfastpeft._C by CMake into the place setuptools expects it in."""

    def build_extension(self, ext):
        import pybind11

        # One folder for every way to build (wheel, editable, in place), so that each continues the last one's work.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        nvcc, why_not = find_nvcc()
        # CMake cannot change a compiler in place, and a source folder that was moved or copied brings a foreign cache.
        stale = cached(build, "CMAKE_HOME_DIRECTORY") not in (None, str(ROOT)) or (
            build.exists() and (cached(build, "CMAKE_CUDA_COMPILER") or "") != (nvcc or "")
        )
        if stale:
            shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
                f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build / 'module'}",
                f"-DCMAKE_CUDA_COMPILER={nvcc or ''}",
                f"-DPYFASTPEFT_NO_CUDA_REASON={why_not}",
                f"-DPYFASTPEFT_CUDA_ARCHS={os.environ.get('PYFASTPEFT_CUDA_ARCHS', '')}",
            ],
            check=True,
        )  # fmt: skip
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(len(os.sched_getaffinity(0)))
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / "module" / target.name, target)


packages, package_dir = find_packages(include=["pyfastpeft*"]), {}
if "editable_wheel" not in sys.argv:  # a checkout's own bench/ is found where it lies (pyfastpeft/_bench.py)
    packages.append("pyfastpeft.bench")
    package_dir["pyfastpeft.bench"] = "bench"

setup(
    packages=packages,
    package_dir=package_dir,
    ext_modules=[Extension("pyfastpeft._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
