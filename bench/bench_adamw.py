"""AdamW steps: pyfastpeft (fp32 and 8-bit state) beside torch fused, torch foreach, bitsandbytes and torchao, on fp32
parameters.

One row per list of tensors; every candidate steps its own parameters with the same gradients.
"""

import importlib

import torch

import pyfastpeft as pf

SHAPES = {
    "one tensor of 32 M values": [(32_000_000,)],
    "448 matrices of 16x4096": [(16, 4096)] * 448,
    "10,000 tensors of 256 values": [(256,)] * 10_000,
}
SMALLEST_8BIT = 4096  # smaller tensors keep fp32 state


def run(suite) -> None:
    bnb = suite.peer("bitsandbytes")
    torchao = None if suite.quick else suite.peer("torchao")  # it compiles its step first, for 20 s
    for row, shapes in suite.pick(list(SHAPES.items()), list(SHAPES.items())[::2]):
        values = sum(torch.Size(s).numel() for s in shapes)
        fused = {"torch fused": lambda ps: torch.optim.AdamW(ps, fused=True)}
        foreach = {"torch foreach": lambda ps: torch.optim.AdamW(ps, foreach=True)}
        rows = [(f"{row}, fp32 state", {"ours": pf.optim.AdamW, **fused, **foreach}, 28 * values)]
        if torch.Size(shapes[0]).numel() >= SMALLEST_8BIT:
            builders = {"ours 8-bit": lambda ps: pf.optim.AdamW(ps, state_bits=8), **fused}
            if bnb is not None:
                builders["bitsandbytes 8-bit"] = bnb.optim.AdamW8bit
            if torchao is not None:
                builders["torchao 8-bit"] = importlib.import_module("torchao.optim").AdamW8bit
            rows.append((f"{row}, 8-bit state", builders, 16 * values + values // 16))
        for name, builders, moved in rows:
            optimizers = {candidate: build(parameters(shapes)) for candidate, build in builders.items()}
            suite.compare(name, {c: o.step for c, o in optimizers.items()}, moved_bytes=moved, check=check)


def parameters(shapes):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def check() -> None:
    """Three steps: fp32 state ends where torch ends, 8-bit state near it."""
    ends = []
    for build in (
        lambda ps: torch.optim.AdamW(ps, fused=True),
        pf.optim.AdamW,
        lambda ps: pf.optim.AdamW(ps, state_bits=8),
    ):
        params = parameters([(5000,), (30, 7)])
        optimizer = build(params)
        for _ in range(3):
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    difference = (ends[1] - ends[0]).abs().max()
    assert difference <= 1e-5, f"after three steps fp32 state is {difference} away from torch's"
    start = torch.cat([p.detach().flatten() for p in parameters([(5000,), (30, 7)])])
    assert (ends[2] - ends[0]).norm() <= 0.1 * (ends[0] - start).norm(), "8-bit state strays from fp32 state"
