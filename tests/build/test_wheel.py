"""What is in the wheel and the sdist, and what importing the package costs."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import pyfastpeft

ROOT = Path(__file__).resolve().parents[2]


def setup_py(*args, **kwargs):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja lie beside python
    command = [sys.executable, "setup.py", "--quiet", *args]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this checkout; it continues the in-place build, so nothing is compiled twice."""
    folder = tmp_path_factory.mktemp("wheel")
    setup_py("build", "--build-base", str(folder / "build"), "bdist_wheel", "--dist-dir", str(folder / "dist"))
    (file,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        yield archive


def test_wheel_holds_the_package_and_its_data(wheel):
    names = set(wheel.namelist())
    sources = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "pyfastpeft").rglob("*.py") if "__pycache__" not in p.parts
    }
    assert sources <= names
    model = {p.relative_to(ROOT).as_posix() for p in (ROOT / "pyfastpeft" / "demo" / "model").glob("*") if p.is_file()}
    assert model <= names
    assert "pyfastpeft/py.typed" in names
    assert {f"pyfastpeft/bench/{p.name}" for p in (ROOT / "bench").glob("*.py")} <= names
    assert len([n for n in names if re.fullmatch(r"pyfastpeft/_C\..*\.so", n)]) == 1


def test_wheel_holds_nothing_else(wheel):
    strangers = [n for n in wheel.namelist() if not re.match(r"pyfastpeft/|pyfastpeft-[^/]*\.dist-info/", n)]
    assert not strangers
    assert not [n for n in wheel.namelist() if re.search(r"(^|/)(test_|conftest|csrc/)|\.(cpp|cu|h|o|a|pyc)$", n)]


def test_wheel_knows_its_version_and_licence(wheel):
    (metadata,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    text = wheel.read(metadata).decode()
    assert f"\nVersion: {pyfastpeft.__version__}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert any(n.endswith("/licenses/LICENSE") for n in wheel.namelist())
    required = set(re.findall(r"^Requires-Dist: ([A-Za-z0-9_-]+)[^;\n]*$", text, re.MULTILINE))
    assert required == {"torch", "numpy", "transformers", "safetensors", "typer", "rich", "matplotlib"}


def test_module_links_no_openmp_and_no_shared_cuda(wheel, tmp_path):
    """OpenMP comes from torch, the CUDA runtime is inside: the module needs neither beside it."""
    (name,) = (n for n in wheel.namelist() if n.endswith(".so"))
    file = wheel.extract(name, tmp_path)
    needed = re.findall(rb"lib[\w+-]+\.so[.\d]*", Path(file).read_bytes().split(b"\0GOMP_")[0])
    dynamic = subprocess.run(["readelf", "--dynamic", file], capture_output=True, text=True)
    if dynamic.returncode == 0:
        needed = re.findall(r"Shared library: \[(.*?)\]", dynamic.stdout)
        assert {n.split(".so")[0] for n in needed} <= {
            "libstdc++",
            "libm",
            "libgcc_s",
            "libc",
            "ld-linux-x86-64",
            "ld-linux-aarch64",
        }
    assert not [n for n in needed if "omp" in str(n) or "cudart" in str(n)]


def test_sdist_builds_the_wheel(tmp_path):
    setup_py("sdist", "--dist-dir", str(tmp_path))
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    needed = [
        p
        for p in ("CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE")
        if (ROOT / p).exists()
    ]
    needed += [p.relative_to(ROOT).as_posix() for folder in ("csrc", "build_support", "pyfastpeft/demo/model")
               for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]  # fmt: skip
    assert not [n for n in needed if n not in names]
    assert not [n for n in names if n.endswith((".so", ".pyc", ".o"))]


def test_version_is_the_metadata_s():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert pyfastpeft.__version__ == version
    try:
        assert importlib.metadata.version("pyfastpeft") == version
    except importlib.metadata.PackageNotFoundError:
        pass  # run in place, not installed


def test_import_is_light():
    """`import pyfastpeft` costs little beyond torch: the heavy packages load where they are used."""
    code = """
import sys, time
start = time.perf_counter(); import torch; torch_s = time.perf_counter() - start
start = time.perf_counter(); import pyfastpeft; own_s = time.perf_counter() - start
heavy = {"transformers", "matplotlib", "rich", "typer", "peft", "bitsandbytes", "accelerate", "safetensors"}
print(f"import torch {torch_s:.2f} s, then pyfastpeft {own_s:.2f} s")
assert not heavy & set(sys.modules), sorted(heavy & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
