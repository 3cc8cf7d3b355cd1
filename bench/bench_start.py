"""What one waits for: `import pyfastpeft` beside its peers' imports, and building the wheel (a checkout only)."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyfastpeft

from .measure import ROOT


def run(suite) -> None:
    package = str(Path(pyfastpeft.__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH", ""))))}
    statements = {"pyfastpeft": "import pyfastpeft", "torch alone": "import torch"}
    for name in () if suite.quick else ("peft", "bitsandbytes"):
        if name not in suite.document["absent_peers"]:
            statements[name] = f"import {name}"
    seconds = {name: [] for name in statements}
    for _ in range(2 if suite.quick else 7):
        for name, statement in statements.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], env=env, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - begin)
    suite.value("import, a fresh process", {n: statistics.median(v) for n, v in seconds.items()}, "s")
    if suite.quick:
        return
    if not (ROOT / "setup.py").exists():
        print("  building a wheel: left out, this is an installed package and not a checkout")
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, "."]
        begin = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True)
        wheel = next(Path(folder).glob("*.whl"))
        archs = os.environ.get("PYFASTPEFT_CUDA_ARCHS") or "the default"
        suite.value(
            f"pip wheel . (CUDA architectures: {archs})",
            {"seconds": time.perf_counter() - begin, "megabytes": wheel.stat().st_size / 1e6}, "",
        )  # fmt: skip
