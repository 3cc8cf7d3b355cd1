"""Mutation check: every barrier, wait and bounds guard of the CUDA kernels, taken out one at a time, must turn a test red.

    make mutate                                             all kernels (an hour or so on 2 cores)
    make mutate ARGS="csrc/lora --jobs 2"                   those under a path
    make mutate ARGS="csrc/nf4/nf4_quantize_cuda.cu --list" what would be tried

What is taken out of device code (functions marked __global__ or __device__):
    a barrier or wait     __syncthreads(), __syncwarp(...), kp::cp_async_wait<...>(), __threadfence(): the statement
    a bounds guard        a comparison (< <= > >=) in an `if`, a ternary or a bool: it becomes `true`. Those in the head
                          of a loop are left alone: without them nothing ends
    a clamp               min(a, b) of a guard's kind is not tried: what it protects is read through a guard

The mutated file is compiled for the host executor, and the emulated tests of that kernel run. A mutant no test notices
survives. A survivor is either a hole in the tests or a mutant that changes nothing: the second kind stands in
equivalent_mutants.txt, one a line:

    path:line with ⟦what is taken out⟧  # why nothing can notice

The check fails for a survivor that is not listed, and for a line of the list that is no longer a survivor.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import queue
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from emu import build  # noqa: E402

ROOT = build.ROOT
LIST = Path(__file__).resolve().parent / "equivalent_mutants.txt"
LIMIT_SECONDS = 180  # a mutant may loop for ever: that is noticed too

# kernel file (without folder and suffix) begins with → the tests whose emulated cases run it
TESTS = {
    "adamw": ["tests/ops/test_adamw_device.py"],
    "ia3": ["tests/ops/test_ia3_scale.py"],
    "lora": ["tests/ops/test_lora_products_cuda.py", "tests/ops/test_linear_lora.py"],
    "nf4_absmax": ["tests/ops/test_nf4_quantize_cuda.py"],
    "nf4_dequantize": ["tests/ops/test_nf4_dequantize_cuda.py"],
    "nf4_matmul": ["tests/ops/test_linear_4bit_cuda.py", "tests/ops/test_linear_4bit_ia3.py"],
    "nf4_matvec": ["tests/ops/test_linear_4bit_cuda.py", "tests/ops/test_linear_4bit_ia3.py"],
    "nf4_quantize": ["tests/ops/test_nf4_quantize_cuda.py"],
    "segmented_lora": ["tests/ops/test_segmented_lora.py", "tests/ops/test_segmented_lora_backward.py"],
}

STATEMENT = re.compile(r"\b(__syncthreads\(\)|__syncwarp\([^;]*\)|kp::cp_async_wait<[^;]*>\(\)|__threadfence\(\));")
COMPARISON = re.compile(r" (<=|>=|<|>) ")
OPEN, CLOSE = "([{", ")]}"


class Mutant(NamedTuple):
    path: str  # from the repository's root
    begin: int  # in the file's text
    end: int
    replacement: str
    name: str  # path:line with ⟦what is taken out⟧


def _comments_blanked(text: str) -> str:
    """The text with comments and string literals as spaces, so that positions stay."""
    return re.sub(
        r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"', lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.DOTALL
    )


def _matching(code: str, at: int) -> int:
    """The position of the bracket that closes the one at `at`."""
    depth = 0
    for i in range(at, len(code)):
        depth += (code[i] in OPEN) - (code[i] in CLOSE)
        if depth == 0:
            return i
    raise ValueError(f"a bracket is not closed: {code[at : at + 60]!r}")


def _device_bodies(code: str) -> Iterator[tuple[int, int]]:
    end = 0
    for found in re.finditer(r"\b(__global__|__device__)\b", code):
        if found.start() < end:
            continue
        brace, semicolon = code.find("{", found.end()), code.find(";", found.end())
        if brace < 0 or 0 <= semicolon < brace or re.search(r"[^<>=!]=[^=]", code[found.end() : brace]):
            continue  # a declaration or a table
        end = _matching(code, brace)
        yield brace, end


def _spans_to_leave(code: str) -> list[tuple[int, int]]:
    """Heads of loops, and what is decided when the kernel is compiled."""
    spans = []
    for found in re.finditer(r"\b(for|while|if constexpr|static_assert) ?\(", code):
        spans.append((found.start(), _matching(code, found.end() - 1)))
    return spans


def _operand_begin(code: str, at: int) -> int:
    """Where the comparison whose sign stands at `at` begins."""
    depth, i = 0, at
    while i > 0:
        c = code[i - 1]
        depth += (c in CLOSE) - (c in OPEN)
        if depth == 0 and code[i - 2 : i] == "::":
            i -= 2
            continue
        if depth < 0 or (depth == 0 and (c in "?:,;=!" or code[i - 2 : i] in ("&&", "||"))):
            break
        if depth == 0 and re.match(r"\breturn\b", code[i - 1 : i + 6]) and not code[i - 2].isalnum():
            i += 6
            break
        i -= 1
    while code[i].isspace():
        i += 1
    return i


def _operand_end(code: str, at: int) -> int:
    depth, i = 0, at
    while i < len(code):
        c = code[i]
        if depth == 0 and code[i : i + 2] == "::":
            i += 2
            continue
        depth += (c in OPEN) - (c in CLOSE)
        if depth < 0 or (depth == 0 and (c in "?:,;" or code[i : i + 2] in ("&&", "||"))):
            break
        i += 1
    while code[i - 1].isspace():
        i -= 1
    return i


def mutants(path: str, text: str) -> list[Mutant]:
    code = _comments_blanked(text)
    leave, found = _spans_to_leave(code), []
    for begin, end in _device_bodies(code):
        for statement in STATEMENT.finditer(code, begin, end):
            found.append((statement.start(), statement.end(), ";"))
        for comparison in COMPARISON.finditer(code, begin, end):
            if any(a <= comparison.start() <= b for a, b in leave):
                continue
            a = _operand_begin(code, comparison.start())
            found.append((a, _operand_end(code, comparison.end()), "true"))
    result: list[Mutant] = []
    seen: dict[str, int] = {}
    for a, b, replacement in sorted(set(found)):
        first = text.rfind("\n", 0, a) + 1
        last = text.find("\n", b)
        line = " ".join(f"{code[first:a]}⟦{text[a:b]}⟧{code[b:last]}".split())
        seen[line] = seen.get(line, 0) + 1
        again = f" (number {seen[line]})" if seen[line] > 1 else ""  # of lines that read the same
        result.append(Mutant(path, a, b, replacement, f"{path}:{line}{again}"))
    return result


def kernel_files(paths: list[str]) -> list[str]:
    files = sorted([*ROOT.glob("csrc/*/*_cuda*.cu"), *ROOT.glob("csrc/*/*_cuda*.cuh")])
    names = [f.relative_to(ROOT).as_posix() for f in files if f.parent.name != "common"]
    if not paths:
        return names
    chosen = [n for n in names if any(n == p.rstrip("/") or n.startswith(p.rstrip("/") + "/") for p in paths)]
    if not chosen:
        raise SystemExit(f"mutate: no kernel file at {', '.join(paths)}; there are {', '.join(names)}")
    return chosen


def _includers(header: str) -> list[str]:
    """The kernel files that include a header, through others too."""
    name, wanted = header.removeprefix("csrc/"), []
    for path in sorted(ROOT.glob("csrc/*/*.cu*")):
        if f'#include "{name}"' in path.read_text(encoding="utf-8"):
            other = path.relative_to(ROOT).as_posix()
            wanted += [other] if other.endswith(".cu") else _includers(other)
    return sorted(set(wanted))


def tests_of(path: str) -> list[str]:
    files = [path] if path.endswith(".cu") else _includers(path)
    chosen: list[str] = []
    for file in files:
        stem = Path(file).name
        keys = [key for key in TESTS if stem.startswith(key)]
        if not keys:
            raise SystemExit(f"mutate: {file} has no tests in TESTS of {__file__}; add them")
        chosen += [t for key in keys for t in TESTS[key] if t not in chosen]
    return chosen


def build_mutant(mutant: Mutant, slot: str) -> Path:
    """The executor's module with one file changed; RuntimeError if that does not compile."""
    csrc = ROOT / "csrc"
    text = (ROOT / mutant.path).read_text(encoding="utf-8")
    shadow = build.BUILD / "mutants" / slot
    changed = shadow / Path(mutant.path).relative_to("csrc")
    changed.parent.mkdir(parents=True, exist_ok=True)
    for stale in shadow.glob("*/*"):
        stale.unlink()
    changed.write_text(text[: mutant.begin] + mutant.replacement + text[mutant.end :], encoding="utf-8")
    affected = _includers(mutant.path) if mutant.path.endswith(".cuh") else []
    kernels: list = []
    for path in build.kernel_sources():
        name = path.relative_to(ROOT).as_posix()
        if name == mutant.path:
            kernels.append(changed)
        elif name in affected:
            kernels.append((path, ("-iquote", str(shadow))))
        else:
            kernels.append(path)
    return build.build(f"mutant_{slot}", kernels, [csrc / "bindings.cpp", *build.binding_sources()], init="_C")


def run_tests(tests: list[str], module: Path | None) -> tuple[bool, str]:
    """(green, the last lines of pytest)."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if module is not None:
        env["PYFASTPEFT_EMU_MODULE"] = str(module)
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider",
        "-k", "emulated and not schedule", *tests,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return False, "ran into the time limit"
    if done.returncode not in (0, 1) and done.returncode > 0:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.returncode == 0, done.stdout[-1500:]


def listed() -> dict[str, str]:
    """name → reason."""
    entries = {}
    for line in LIST.read_text(encoding="utf-8").splitlines() if LIST.exists() else []:
        if not line.strip() or line.startswith("#"):
            continue
        name, mark, reason = line.partition("  # ")
        if not mark or not reason.strip():
            raise SystemExit(f"mutate: {LIST.name} has a line without a reason ('  # …'): {line}")
        entries[name.strip()] = reason.strip()
    return entries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="kernel files or folders; all of csrc/ if none is named")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at work at a time: one compiles while others run")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--match", help="only mutants whose name holds this text")
    options = parser.parse_args()
    files = kernel_files(options.paths)
    todo = [m for f in files for m in mutants(f, (ROOT / f).read_text(encoding="utf-8"))]
    todo = [m for m in todo if options.match is None or options.match in m.name]
    if options.list:
        print("\n".join(m.name for m in todo))
        return 0
    reasons = listed()
    begin = time.perf_counter()
    for tests in sorted({tuple(tests_of(f)) for f in files}):
        green, output = run_tests(list(tests), None)
        if not green:
            print(f"mutate: {', '.join(tests)} fail without any mutation:\n{output}")
            return 2
    slots: queue.SimpleQueue = queue.SimpleQueue()
    for i in range(options.jobs):
        slots.put(str(i))

    def attempt(mutant: Mutant) -> str:
        slot = slots.get()
        try:
            try:
                module = build_mutant(mutant, slot)
            except RuntimeError as error:
                return "does not compile" if "does not compile" in str(error) else f"error: {error}"
            green, _ = run_tests(tests_of(mutant.path), module)
            return "SURVIVED" if green else "caught"
        finally:
            slots.put(slot)

    outcomes: dict[str, str] = {}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for i, (mutant, outcome) in enumerate(zip(todo, pool.map(attempt, todo), strict=True)):
            outcomes[mutant.name] = outcome
            listed_too = " (listed)" if outcome == "SURVIVED" and mutant.name in reasons else ""
            print(f"[{i + 1}/{len(todo)}] {outcome}{listed_too}: {mutant.name}", flush=True)
    return report(outcomes, reasons, files, options.match, time.perf_counter() - begin)


def report(
    outcomes: dict[str, str], reasons: dict[str, str], files: list[str], match: str | None, seconds: float
) -> int:
    """Prints what has to be looked at; 1 if there is anything."""
    unexplained = [name for name, outcome in outcomes.items() if outcome == "SURVIVED" and name not in reasons]
    broken = [f"{outcome}: {name}" for name, outcome in outcomes.items() if outcome.startswith("error")]
    mine = [n for n in reasons if n.partition(":")[0] in files and (match is None or match in n)]
    stale = [name for name in mine if outcomes.get(name) != "SURVIVED"]
    counts = {kind: list(outcomes.values()).count(kind) for kind in ("caught", "SURVIVED", "does not compile")}
    print(f"{len(outcomes)} mutants in {seconds / 60:.1f} min: " + ", ".join(f"{n} {k}" for k, n in counts.items()))
    for title, names in (
        ("survived and stand not in equivalent_mutants.txt", unexplained),
        ("stand in equivalent_mutants.txt and survive no longer (delete the lines)", stale),
        ("could not be tried", broken),
    ):
        if names:
            print(f"{len(names)} {title}:\n  " + "\n  ".join(names))
    return 1 if unexplained or stale or broken else 0


if __name__ == "__main__":
    sys.exit(main())
