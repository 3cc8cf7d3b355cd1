"""Every method beside its peer on a Llama shape of two layers, 4 x 256 tokens, bf16: trained parameters, the adapter's
file, peak memory of a training step, and the step's time.

The file is adapter_model.safetensors, which both write. Memory is that of bench_memory.py, weights included, each
candidate in a process of its own: forked from one that has imported everything and computed nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from .bench_memory import child_env, peak_here
from .methods import METHODS, OURS, Method, adapted, method_named
from .models import BATCH, TOKENS, collect, llama, training_step

LAYERS = 2
STEPS = 100  # what AdaLoRA plans for
ROUNDS = 9
LEFT_OUT = ("ReLoRA", "LoRA, its best rate", "AdaLoRA, its best rate")  # whose steps are those of LoRA and AdaLoRA


def run(suite) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _run(suite)


def _run(suite) -> None:
    absent = set(suite.document["absent_peers"])
    methods = [m for m in METHODS if m.name not in suite.pick(LEFT_OUT, [m.name for m in METHODS[2:]])]
    candidates = {m.name: [OURS] + ([m.peer] if m.peer and not absent.intersection(m.needs) else []) for m in methods}
    memory = _memory([(name, each) for name, all in candidates.items() for each in all])
    rounds, suite.rounds = suite.rounds, min(suite.rounds, ROUNDS)
    try:
        for method in methods:
            _row(suite, method, candidates[method.name], memory)
    finally:
        suite.rounds = rounds


def _row(suite, method: Method, implementations: list[str], memory: dict[tuple[str, str], float]) -> None:
    models = {each: _model(method, each) for each in implementations}
    facts = {
        "method": method.name,
        "parameters": {e: sum(p.numel() for p in m.parameters() if p.requires_grad) for e, m in models.items()},
        "file_bytes": {e: _file_size(m) for e, m in models.items()},
        "peak_mb": {e: memory.get((method.name, e)) for e in implementations},
        "layers": LAYERS,
    }
    steps = {each: training_step(model, BATCH, TOKENS) for each, model in models.items()}

    def check():
        losses = [step() for step in steps.values()]
        assert max(losses) - min(losses) <= 0.02 * max(losses), f"first losses differ: {losses}"

    suite.compare(f"{method.name}, {BATCH}x{TOKENS} tokens", steps, check=check, **facts)
    collect()


def _model(method: Method, implementation: str, layers: int = LAYERS) -> torch.nn.Module:
    base = llama(layers)
    torch.manual_seed(1)
    return adapted(method, implementation, base, STEPS)


def _file_size(model: torch.nn.Module) -> int | None:
    """Bytes of adapter_model.safetensors; None where there is no adapter but a loop by hand."""
    if not hasattr(model, "peft_config"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def _memory(names: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Megabytes by (method, implementation); empty where the system has no high-water mark to reset."""
    if not Path("/proc/self/clear_refs").exists() or not hasattr(os, "fork"):
        print("  memory is left out: this system has no /proc/self/clear_refs to reset the high-water mark with")
        return {}
    code = (
        "from pyfastpeft import _bench; _bench.load(); from pyfastpeft.bench import bench_methods; "
        f"bench_methods.children({names!r}, {torch.get_num_threads()})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=child_env(), check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the process that measures memory failed ({result.returncode}):\n{result.stderr[-2000:]}")
    rows = [json.loads(line[1:]) for line in result.stdout.split("\n") if line.startswith("\x1e")]
    return {(name, implementation): peak for name, implementation, peak in rows}


def children(names: list[tuple[str, str]], threads: int) -> None:
    """In the process of _memory(): a child for each, which prints its peak."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    from transformers import LlamaForCausalLM  # noqa: F401  (imported once, before the children)

    for package in {package for name, each in names if each != OURS for package in method_named(name).needs}:
        __import__(package)
    for name, implementation in names:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                method = method_named(name)
                peak = peak_here(lambda layers: _model(method, implementation, layers), LAYERS)
                print("\x1e" + json.dumps([name, implementation, peak]), flush=True)
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1] != 0:
            raise RuntimeError(f"the child that measures {name}, {implementation} failed")
