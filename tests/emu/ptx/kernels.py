"""The shipped kernels through the PTX interpreter: nvcc's text for each file, and every launch of an op run from it."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
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


def compile_ptx(source: Path, architecture: str, include: Path | None = None) -> str:
    """The PTX text of `source`; kept under the contents of all that is in csrc/, for it takes seconds.

    include   a folder whose headers come before those of csrc/
    """
    flags = ["-std=c++17", f"-arch=sm_{architecture}", "-DPYFASTPEFT_WITH_CUDA", "-ptx"]
    folders = [folder for folder in (include, build.ROOT / "csrc") if folder is not None]
    headers = sorted(p for folder in folders for kind in ("*.cuh", "*.h") for p in folder.rglob(kind))
    digest = hashlib.sha256((_version() + " ".join(flags)).encode())
    for path in (source, *headers):
        digest.update(path.name.encode() + path.read_bytes())
    kept = KEPT / f"{source.stem}-{architecture}-{digest.hexdigest()[:16]}.ptx"
    KEPT.mkdir(parents=True, exist_ok=True)
    with open(KEPT / f"{source.stem}-{architecture}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            for old in KEPT.glob(f"{source.stem}-{architecture}-*.ptx") if include is None else ():
                old.unlink()
            unfinished = kept.with_suffix(".tmp")
            command = [nvcc(), *flags, *(f"-I{f}" for f in folders), "-o", str(unfinished), str(source)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"nvcc does not compile {source}:\n{done.stderr[-5000:]}")
            unfinished.rename(kept)
    return kept.read_text(encoding="utf-8")


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
