"""What ptxas says of every CUDA kernel on every architecture; writes the table in csrc/README.md.

    make resources                                  all architectures of the wheel (some minutes)
    PYFASTPEFT_CUDA_ARCHS=90a make resources        one: nothing is written, spills are looked for

Exit 1 where a kernel spills registers or keeps a stack frame.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from pyfastpeft_build import find_nvcc

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "csrc" / "README.md"
BEGIN, END = "<!-- resources: made by `make resources` -->", "<!-- resources: end -->"
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>[^']+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class Kernel(NamedTuple):
    name: str  # without template arguments
    arch: str
    registers: int
    shared: int  # static, bytes
    spilled: int  # bytes of stack frame and spills


def compile_log(archs: str) -> str:
    """The output of compiling every .cu file; RuntimeError where that fails."""
    nvcc, why = find_nvcc()
    if nvcc is None:
        raise RuntimeError(f"no CUDA compiler: {why}")
    folder = ROOT / "build" / "resources"
    shutil.rmtree(folder, ignore_errors=True)
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DPYFASTPEFT_KERNELS_ONLY=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v", f"-DPYFASTPEFT_CUDA_ARCHS={archs}",
    ]  # fmt: skip
    output = ""
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True)
        output = done.stdout + done.stderr
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{output[-5000:]}")
    return output


def parse(log: str) -> list[Kernel]:
    found = list(ENTRY.finditer(log))
    text = "\n".join(m["name"] for m in found)
    names = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    kernels = []
    for m, name in zip(found, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        base = re.search(r"(\w+)(?:<.*)?\(", name.replace("(anonymous namespace)::", ""))
        spilled = int(m["stack"]) + int(m["stores"]) + int(m["loads"])
        kernels.append(
            Kernel(base.group(1), m["arch"], int(m["registers"]), int(shared.group(1)) if shared else 0, spilled)
        )
    return kernels


def _range(values: list[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)}–{max(values)}"


def table(kernels: list[Kernel]) -> str:
    archs = sorted({k.arch for k in kernels}, key=lambda a: int(re.sub(r"\D", "", a)))
    lines = [
        f"| kernel | instances | {' | '.join(f'sm_{a}' for a in archs)} | static shared memory | spilled |",
        f"|---|---|{'---|' * len(archs)}---|---|",
    ]
    for name in sorted({k.name for k in kernels}):
        mine = [k for k in kernels if k.name == name]
        by_arch = {a: [k.registers for k in mine if k.arch == a] for a in archs}
        registers = " | ".join(_range(by_arch[a]) if by_arch[a] else "–" for a in archs)
        instances = max(map(len, by_arch.values()))
        shared, spilled = _range([k.shared for k in mine]), max(k.spilled for k in mine)
        lines.append(f"| `{name}` | {instances} | {registers} | {shared} | {spilled} |")
    return "\n".join(lines)


def main() -> int:
    archs = os.environ.get("PYFASTPEFT_CUDA_ARCHS", "")
    kernels = parse(compile_log(archs))
    text = table(kernels)
    print(text)
    if not archs:
        head, begin, rest = README.read_text(encoding="utf-8").partition(BEGIN)
        if not begin or END not in rest:
            raise SystemExit(f"{README} has no marks {BEGIN} … {END}")
        README.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    spilling = sorted({f"{k.name} on sm_{k.arch}: {k.spilled} bytes" for k in kernels if k.spilled})
    for line in spilling:
        print(f"spills or keeps a stack frame: {line}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
