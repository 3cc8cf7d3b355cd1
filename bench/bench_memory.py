"""Peak resident memory of a training step, above what the process held before the model was built.

Each candidate in a process of its own: the kernel's high-water mark (VmHWM), reset just before the step's model is made.
glibc keeps freed memory for itself above a threshold that moves while it runs, which alone makes one and the same step
peak anywhere between 226 and 260 MB; the threshold is fixed here (MALLOC_MMAP_THRESHOLD_), and repeats agree within 0.5 MB.
"""

import os
import subprocess
import sys
from pathlib import Path

import pyfastpeft

from .models import BATCH, LAYERS, MODELS, TOKENS

# with few tokens, so that gradients, not activations, are what the peak consists of beside the state
FEW = {"batch": 1, "tokens": 64}
OURS_FULL = {"gradients released in backward": True, "step() after backward": False}


def run(suite) -> None:
    if not Path("/proc/self/clear_refs").exists():
        print("  left out: this system has no /proc/self/clear_refs to reset the high-water mark with")
        return
    layers = 2 if suite.quick else LAYERS
    absent = set(suite.document["absent_peers"])
    values: dict[str, float | None] = {}
    for name, (_, needs) in MODELS.items():
        if suite.quick and name == "full fine-tuning":
            continue
        values[name] = None if absent.intersection(needs) else peak_of(name, layers)
    suite.value(f"peak above the start, {layers} layers, {BATCH}x{TOKENS} tokens", values, "MB", layers=layers)

    values = {name: peak_of(name, layers) for name in OURS_FULL}
    suite.value(f"full fine-tuning, our AdamW, {layers} layers, 1x64 tokens", values, "MB", layers=layers)


def peak_of(name: str, layers: int) -> float:
    """Megabytes, measured in a fresh process."""
    code = (
        "from pyfastpeft import _bench; _bench.load(); from pyfastpeft.bench import bench_memory; "
        f"bench_memory.child({name!r}, {layers})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=child_env(), check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the process that measures {name!r} failed ({result.returncode}):\n{result.stderr[-2000:]}")
    return float(result.stdout.split()[-1])


def child_env() -> dict[str, str]:
    """Of a process that measures memory: this package first, and no allocator that hoards."""
    package = str(Path(pyfastpeft.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH", ""))))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
    }


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def child(name: str, layers: int) -> None:
    from .models import MODELS

    build = MODELS["full fine-tuning" if name in OURS_FULL else name][0]
    print(peak_here(build, layers, OURS_FULL.get(name)))


def peak_here(build, layers: int, in_backward: bool | None = None) -> float:
    """Megabytes of this process: the peak of a training step of build(layers), above what it held before that."""
    from .models import collect, training_step

    training_step(
        build(1), tokens=16, in_backward=in_backward
    )()  # imports, thread pools and code paths, before the mark is set
    collect()
    before = _status("VmRSS")
    few = FEW if in_backward is not None else {}
    step = training_step(build(layers), in_backward=in_backward, **few)
    collect()
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the high-water mark starts again: building the model is not the step
    for _ in range(3):
        step()
    return (_status("VmHWM") - before) / 1e6
