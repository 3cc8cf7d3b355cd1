"""Code for an instruction set stays in the files made for it, and no other file can end up running it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeFiles" / "pyfastpeft_kernels.dir" / "csrc"
ISA_FILE = re.compile(r"_(avx2|avx512|amx)\.cpp$")


def test_isa_files_hold_no_function_another_file_may_share():
    """A weak (inline, template) function exists in several objects and the linker keeps any one of them: the AVX-512
    copy of a helper could become the scalar path's, and an old machine would die of it."""
    if not OBJECTS.is_dir() or shutil.which("nm") is None:
        pytest.skip("no object files (an installed package) or no nm")
    shared = []
    for source in (ROOT / "csrc").glob("*/*.cpp"):
        if ISA_FILE.search(source.name):
            out = OBJECTS / source.parent.name / f"{source.name}.o"
            symbols = subprocess.run(
                ["nm", "--demangle", "--defined-only", out], capture_output=True, text=True, check=True
            ).stdout
            shared += [f"{source.name}: {line.split(' ', 2)[2]}" for line in symbols.splitlines() if " W " in line]
    assert not shared, "declare these static:\n" + "\n".join(shared)


def test_intrinsics_only_in_isa_files():
    """x86 headers appear in the suffixed files, or in headers (*.h) that only those include."""
    users = [
        p.name
        for p in (ROOT / "csrc").glob("*/*.cpp")
        if not ISA_FILE.search(p.name) and re.search(r"\bimmintrin\.h|\b_mm\d*_", p.read_text(encoding="utf-8"))
    ]
    assert not users


def test_kernels_compile_for_64_bit_arm(tmp_path):
    """The scalar variants are all there is on Arm; a dispatch table that names another leaves an undefined symbol."""
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("no cross compiler (Debian, Ubuntu: g++-aarch64-linux-gnu)")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["sh", str(ROOT / "build_support" / "check_aarch64.sh"), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
