"""How cost grows: one size at a time, with the exponent of a power law fitted to the larger half beside the expected one.

An exponent above the expected one is a cost that should not be there; below it, a fixed cost not yet outgrown.
"""

import math

import torch

import pyfastpeft as pf

from .measure import measure
from .models import llama, training_step

DTYPE = torch.bfloat16


def run(suite) -> None:
    for name, expected, sizes, build in sweeps(suite):
        seconds = {}
        for size in sizes:
            seconds[size] = measure({"ours": build(size)}, 5, True)["seconds"]["ours"]
        fitted = exponent(seconds)
        suite.value(
            f"{name}: exponent", {"fitted": fitted, "expected": expected}, "",
            seconds={str(size): value for size, value in seconds.items()},
        )  # fmt: skip
        print("    " + ", ".join(f"{size}: {value * 1e3:.3g} ms" for size, value in seconds.items()))


def exponent(seconds: dict[int, float]) -> float:
    """The slope of log(seconds) over log(size), least squares over the larger half of the sizes."""
    points = sorted(seconds.items())[len(seconds) // 2 - (len(seconds) < 4) :]
    xs, ys = [math.log(size) for size, _ in points], [math.log(value) for _, value in points]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def sweeps(suite):
    """(name, expected exponent, sizes, size → the call to time)."""
    long = not suite.quick

    def linear(M=256, N=2048, K=2048, blocksize=64):
        q = pf.ops.quantize_4bit(torch.randn(N, K, dtype=DTYPE) * 0.02, blocksize, double_quant=True)
        x = torch.randn(M, K, dtype=DTYPE)
        return lambda: pf.ops.linear_4bit(x, q)

    def lora(R):
        M, N, K = 512, 2048, 2048
        x, w = torch.randn(M, K, dtype=DTYPE).requires_grad_(), torch.randn(N, K, dtype=DTYPE) * 0.02
        a, b = torch.randn(R, K).requires_grad_(), torch.randn(N, R).requires_grad_()
        grad = torch.randn(M, N, dtype=DTYPE)
        return lambda: torch.autograd.grad(pf.ops.linear_lora(x, w, None, a, b), (x, a, b), grad)

    def dequantise(threads):
        q = pf.ops.quantize_4bit(torch.randn(4096, 4096, dtype=DTYPE) * 0.02, 64)
        out = torch.empty(4096, 4096, dtype=DTYPE)

        def call():
            former = torch.get_num_threads()
            torch.set_num_threads(threads)
            pf.ops.dequantize_4bit(q, out=out)
            torch.set_num_threads(former)

        return call

    def depth(layers):
        config = pf.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        return training_step(pf.get_peft_model(llama(layers), config), batch=1, tokens=64)

    most = torch.get_num_threads()
    yield "linear_4bit over tokens M", 1.0, (1, 4, 16, 64, 256, 1024) if long else (4, 64, 256), lambda n: linear(M=n)
    yield "linear_4bit over inputs K", 1.0, (512, 1024, 2048, 4096), lambda n: linear(K=n)
    yield "linear_4bit over outputs N", 1.0, (512, 1024, 2048, 4096), lambda n: linear(N=n)
    yield "linear_4bit over block size", 0.0, (32, 64, 256, 1024, 4096), lambda n: linear(blocksize=n)
    yield (
        "linear_lora step over rank R (over the base's cost: at most)",
        1.0,
        (8, 32, 128, 256) if long else (8, 32, 128),
        lora,
    )
    if most > 1:
        yield "dequantise over threads", -1.0, [2**i for i in range(most.bit_length()) if 2**i <= most], dequantise
    yield "LoRA training step over layers", 1.0, (1, 2, 4, 8) if long else (1, 2, 4), depth
