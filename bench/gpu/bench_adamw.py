"""AdamW steps on resident state, fp32 and 8-bit, beside torch fused and bitsandbytes, on fp32 parameters."""

import torch
from _gpu import GpuBench, peer

import pyfastpeft as pf

SHAPES = {
    "4 tensors of 64 M values": [(64 << 20,)] * 4,
    "448 matrices of 16x4096": [(16, 4096)] * 448,
    "10,000 tensors of 256 values": [(256,)] * 10_000,
}
SMALLEST_8BIT = 4096  # smaller tensors keep fp32 state


def parameters(shapes):
    params = [torch.nn.Parameter(torch.randn(s, device="cuda")) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def main() -> None:
    bench = GpuBench("adamw", __doc__)
    for row, shapes in SHAPES.items():
        values = sum(torch.Size(s).numel() for s in shapes)
        tables = [("fp32", {"ours": pf.optim.AdamW}, 28 * values)]
        if torch.Size(shapes[0]).numel() >= SMALLEST_8BIT:
            ours = {"ours": lambda ps: pf.optim.AdamW(ps, state_bits=8)}
            tables.append(("8-bit", ours, 16 * values + values // 16))
        for state, builders, moved in tables:
            builders["torch fused"] = lambda ps: torch.optim.AdamW(ps, fused=True)
            with peer("bitsandbytes"):
                import bitsandbytes as bnb

                builders["bitsandbytes"] = bnb.optim.AdamW if state == "fp32" else bnb.optim.AdamW8bit
            optimizers = {name: build(parameters(shapes)) for name, build in builders.items()}
            candidates = {name: [optimizer.step] for name, optimizer in optimizers.items()}
            bench.compare(f"{row}, {state} state", candidates, moved_bytes=moved, eager=True)
    bench.finish()


if __name__ == "__main__":
    main()
