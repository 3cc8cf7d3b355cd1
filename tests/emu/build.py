"""Compiles the CUDA kernels, their bindings and the host executor with g++ into a module that runs them on the CPU.

`load()` returns that module. Objects are kept in build/emu/ under the contents of what they were made from, so that a
changed kernel recompiles itself alone; a lock keeps two test processes apart.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "emu"

COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-DPYFASTPEFT_EMULATED", "-DPYFASTPEFT_WITH_CUDA")
# Every load and store of a kernel calls a hook of hooks.cpp. -O1: higher levels merge accesses and compile longer.
KERNEL = (
    "-x", "c++", "-O1", "-g", "-ffp-contract=off", "-Wno-unknown-pragmas", "-Wno-attributes",
    "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "--param", "tsan-distinguish-volatile=1",
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero", "-fsanitize-recover=all",
)  # fmt: skip
EXECUTOR = ("-O2", "-g", "-Wall", "-Wextra")
BINDING = ("-O0",)


class Unavailable(Exception):
    """This machine cannot compile kernels for the executor; the message says what is missing."""


def cuda_include() -> Path:
    """The folder with CUDA's headers: the toolkit's, or that of the wheels in the test extra."""
    nvcc = shutil.which("nvcc")
    folders = [Path(os.environ["CUDA_HOME"], "include")] if os.environ.get("CUDA_HOME") else []
    if nvcc:
        folders.append(Path(nvcc).resolve().parent.parent / "include")
    folders += [Path(folder, "nvidia", "cu13", "include") for folder in sys.path]
    folders.append(Path("/usr/local/cuda/include"))
    for folder in folders:
        if (folder / "cuda_bf16.h").is_file() and (folder / "cuda_runtime_api.h").is_file():
            return folder
    raise Unavailable(
        "no CUDA headers (cuda_runtime_api.h, cuda_bf16.h) in CUDA_HOME, beside nvcc or from PyPI; "
        "pip install 'pyfastpeft[test]' brings them"
    )


@functools.cache
def compiler() -> tuple[str, str]:
    """(path, version) of g++."""
    path = shutil.which(os.environ.get("CXX") or "g++")
    if path is None:
        raise Unavailable("no g++ (11 or newer) on PATH")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return path, version


@functools.cache
def include_flags() -> tuple[str, ...]:
    try:
        import pybind11
    except ImportError:
        raise Unavailable("pybind11 is not installed; pip install 'pyfastpeft[test]' brings it") from None
    system = (cuda_include(), sysconfig.get_path("include"), pybind11.get_include())
    return (f"-I{ROOT / 'csrc'}", f"-I{HERE.parent}", *(part for path in system for part in ("-isystem", str(path))))


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _key(command: list[str], dependencies: list[str]) -> str:
    text = [compiler()[1], *command]
    for path in dependencies:
        text.append(f"{path}={_digest(path) if os.path.exists(path) else 'missing'}")
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def compile_object(source: Path, flags: tuple[str, ...]) -> tuple[Path, str]:
    """Compiles `source` unless an object from the same contents is there; returns (object, key of its contents)."""
    name = "-".join(source.resolve().relative_to(ROOT).with_suffix("").parts)
    name += "-" + hashlib.sha256(" ".join(flags).encode()).hexdigest()[:6]
    target, record = BUILD / f"{name}.o", BUILD / f"{name}.json"
    command = [compiler()[0], *COMMON, *include_flags(), *flags, "-c", str(source)]
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        if target.exists() and known["key"] == _key(command, known["dependencies"]):
            return target, known["key"]
    except (OSError, ValueError, KeyError):
        pass  # no record of an earlier compilation, or one cut short
    depfile = BUILD / f"{name}.d"
    done = subprocess.run([*command, "-MMD", "-MF", str(depfile), "-o", str(target)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source} does not compile for the host executor:\n{done.stderr[-20000:]}")
    if flags[: len(KERNEL)] == KERNEL:  # a library function's accesses are checked too
        redirect = (f"--redefine-sym={name}=emu_{name}" for name in ("memcpy", "memmove", "memset"))
        subprocess.run(["objcopy", *redirect, str(target)], check=True)
    text = depfile.read_text(encoding="utf-8").split(":", 1)[1].replace("\\\n", " ")
    dependencies = sorted(set(text.split()))
    key = _key(command, dependencies)
    record.write_text(json.dumps({"key": key, "dependencies": dependencies}), encoding="utf-8")
    return target, key


def _undefined(objects: list[Path]) -> list[str]:
    """The functions of pyfastpeft that these objects call and do not contain: the CPU kernels."""
    lines = subprocess.run(["nm", *map(str, objects)], capture_output=True, text=True, check=True).stdout.splitlines()
    wanted, defined = set(), set()
    for line in lines:
        found = re.match(r"[0-9a-f ]{16} (\w) (_Z\S+)$", line)
        if found:
            (wanted if found.group(1) == "U" else defined).add(found.group(2))
    return sorted(name for name in wanted - defined if "10pyfastpeft" in name)


def build(
    name: str,
    kernels: list[Path | tuple[Path, tuple[str, ...]]],
    bindings: list[Path],
    executor_flags: tuple[str, ...] = (),
    init: str | None = None,
) -> Path:
    """The extension module `name` from these kernels (or (kernel, further flags)) and bindings, and the executor.

    init   the module's name in its PYBIND11_MODULE, where that is another
    """
    kernels = [k if isinstance(k, tuple) else (k, ()) for k in kernels]
    executor = [(source, EXECUTOR + executor_flags) for source in sorted(HERE.glob("*.cpp"))]
    work = [*((k, KERNEL + flags) for k, flags in kernels), *((b, BINDING) for b in bindings), *executor]
    with _lock(), concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        _digest.cache_clear()
        made = list(pool.map(lambda item: compile_object(*item), work))
        key = hashlib.sha256("".join(k for _, k in made).encode()).hexdigest()[:16]
        variant = name + "".join(executor_flags)
        target = BUILD / f"{variant}-{key}" / f"{init or name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if target.exists():
            return target
        earlier = sorted(BUILD.glob(f"{variant}-*"), key=os.path.getmtime)
        for folder in earlier[:-3]:  # another process may still run one of the last
            shutil.rmtree(folder)
        target.parent.mkdir(exist_ok=True)
        # The executor's objects come first: of a function that several objects hold, the uninstrumented copy is taken.
        objects = [o for o, _ in made[len(kernels) :]] + [o for o, _ in made[: len(kernels)]]
        stubs = [f"-Wl,--defsym,{symbol}=emu_not_in_this_module" for symbol in _undefined(objects)]
        unfinished = target.with_suffix(".tmp")
        done = subprocess.run(
            [compiler()[0], "-shared", *stubs, "-o", str(unfinished), *map(str, objects), "-ldl"],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"the emulated module does not link:\n{done.stderr[-20000:]}")
        os.replace(unfinished, target)
        return target


def load_module(path: Path) -> types.ModuleType:
    name = path.name.split(".")[0]
    loader = importlib.machinery.ExtensionFileLoader(f"pyfastpeft_emulated.{name}", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def kernel_sources() -> list[Path]:
    return sorted(p for p in ROOT.glob("csrc/*/*_cuda*.cu") if p.parent.name != "common")


def binding_sources() -> list[Path]:
    return sorted(p for p in ROOT.glob("csrc/*/*_bind.cpp") if p.parent.name != "common")


@functools.cache
def load() -> types.ModuleType:
    """The module of all kernels in csrc/: the same bindings as pyfastpeft._C's CUDA ones, run by the executor.

    PYFASTPEFT_EMU_MODULE names a module built before (mutate.py's) to take instead.
    """
    if path := os.environ.get("PYFASTPEFT_EMU_MODULE"):
        return load_module(Path(path))
    return load_module(build("_C", kernel_sources(), [ROOT / "csrc" / "bindings.cpp", *binding_sources()]))


if __name__ == "__main__":
    print(load().__file__)
