"""The shipped kernels through the PTX interpreter: nvcc's text for each file, and every launch of an op run from it."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from emu import build
from emu.ptx import machine
from emu.ptx.text import Module, PtxError

KEPT = build.ROOT / "build" / "ptx"


def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        raise build.Unavailable("no nvcc on PATH")
    return found


@functools.cache
def _version() -> str:
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


def _digest(command: list[str], dependencies: list[str]) -> str:
    digest = hashlib.sha256((_version() + " ".join(command)).encode())
    for path in dependencies:
        digest.update(path.encode() + (Path(path).read_bytes() if os.path.exists(path) else b""))
    return digest.hexdigest()


def compile_ptx(source: Path, architecture: str, include: Path | None = None) -> str:
    """The PTX text of `source`. Without `include` it is kept in build/ptx, with a record of what it was made from: nvcc takes
    seconds.

    include   a folder whose headers come before those of csrc/
    """
    folders = [folder for folder in (include, build.ROOT / "csrc") if folder is not None]
    command = [
        nvcc(), "-std=c++17", f"-arch=sm_{architecture}", "-DPYFASTPEFT_WITH_CUDA", "-ptx", *(f"-I{f}" for f in folders),
        str(source),
    ]  # fmt: skip
    folder = KEPT if include is None else include
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{source.stem}-{architecture}.ptx"
    record = target.with_suffix(".json")
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists() and record.exists():
            known = json.loads(record.read_text(encoding="utf-8"))
            if known["digest"] == _digest(command, known["dependencies"]):
                return target.read_text(encoding="utf-8")
        record.unlink(missing_ok=True)
        depfile = target.with_suffix(".d")
        done = subprocess.run([*command, "-o", str(target), "-MD", "-MF", str(depfile)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc does not compile {source}:\n{done.stderr[-5000:]}")
        text = depfile.read_text(encoding="utf-8").split(":", 1)[1].replace("\\\n", " ")
        dependencies = sorted({path for path in text.split() if Path(path).is_relative_to(build.ROOT)} | {str(source)})
        digest = _digest(command, dependencies)
        record.write_text(json.dumps({"digest": digest, "dependencies": dependencies}), encoding="utf-8")
    return target.read_text(encoding="utf-8")


def plain_name(demangled: str) -> str:
    """A kernel's name as the host executor gives it: without namespaces and parameters."""
    for noise in ("pyfastpeft::", "(anonymous namespace)::", "void "):
        demangled = demangled.replace(noise, "")
    return demangled[: demangled.rindex("(")]


@functools.cache
def module_of(source: Path, architecture: str, include: Path | None = None) -> tuple[Module, dict[str, str]]:
    """(the file's PTX, its kernels' names by their plain ones)"""
    module = Module(compile_ptx(source, architecture, include))
    names = list(module.kernels)
    demangled = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return module, dict(zip(map(plain_name, demangled.splitlines()), names, strict=True))


@functools.cache
def _file_of(kernel: str) -> Path:
    """The .cu file of csrc/ that holds the kernel template of that name."""
    for path in build.kernel_sources():
        if re.search(rf"\b{kernel}\s*\(", path.read_text(encoding="utf-8")):
            return path
    raise PtxError(f"no .cu file of csrc/ defines {kernel}")


@contextlib.contextmanager
def interpreted(
    module, architecture: str = "90a", include: Path | None = None, source: Path | None = None
) -> Iterator[list[tuple[str, int, float]]]:
    """Within it every launch of the emulated `module` is run by the PTX interpreter, from the text nvcc makes for
    sm_`architecture` of the kernel's file in csrc/, or of `source`. Gives a list that fills with (kernel, instructions,
    seconds)."""
    ran: list[tuple[str, int, float]] = []

    def run(name, grid, block, dynamic_smem, arguments, buffers):
        ptx, names = module_of(source or _file_of(re.split("[<(]", name)[0]), architecture, include)
        begin = time.perf_counter()
        count = machine.launch(ptx, names[name], grid, block, dynamic_smem, arguments, buffers)
        for first, end, read_only, _ in buffers:
            if not read_only:
                module.emu_mark_filled(first, end - first)
        ran.append((name, count, time.perf_counter() - begin))

    module.emu_run_instead(run)
    try:
        yield ran
    finally:
        module.emu_run_instead(None)
