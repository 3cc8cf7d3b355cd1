"""linear_4bit (NF4, double-quantised, bf16) over M beside bitsandbytes, torchao and dense torch; and the QLoRA layer.

The first table is inference: x · Wᵀ alone, weights rotated beyond the L2. The second is the training step of one layer
with LoRA r = 16, forward + backward, M = 4096. Its floor: the two big matmuls at the measured rate, two dequantisations,
and LoRA's own passes over x, y and dy at the measured copy bandwidth.
"""

import torch
from _gpu import GpuBench, peer, relative_error, rotations

import pyfastpeft as pf

SHAPES = [(14336, 4096), (4096, 14336)]  # N, K
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
TRAIN_M, RANK = 4096, 16


def quantised(N: int, K: int, copies: int):
    return [
        pf.ops.quantize_4bit(torch.randn(N, K, device="cuda", dtype=torch.bfloat16) * 0.02, 64, double_quant=True)
        for _ in range(copies)
    ]


def bitsandbytes_layer(q):
    """bitsandbytes' Linear4bit over the same bytes."""
    import bitsandbytes as bnb

    N, K = q.shape
    layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    stats = {key.removeprefix("weight."): t for key, t in q.state_dict().items() if key != "weight"}
    layer.weight = bnb.nn.Params4bit.from_prequantized(q.packed, stats, requires_grad=False, device="cuda")
    return layer


def inference(bench: GpuBench) -> None:
    for N, K in SHAPES:
        copies = rotations(N * K // 2)
        qs = quantised(N, K, copies)
        dense = [pf.ops.dequantize_4bit(q) for q in qs[: max(2, copies // 3)]]
        layers = []
        with peer("bitsandbytes"):
            layers = [bitsandbytes_layer(q).eval() for q in qs]
        for M in TOKENS:
            x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
            candidates = {"ours": [lambda x=x, q=q: pf.ops.linear_4bit(x, q) for q in qs]}
            if layers:
                candidates["bitsandbytes"] = [lambda x=x, f=f: f(x) for f in layers]
            candidates["dense"] = [lambda x=x, w=w: torch.nn.functional.linear(x, w) for w in dense]

            def check(x=x, q=qs[0], w=dense[0]):
                truth = x.double() @ w.double().t()
                ours = relative_error(pf.ops.linear_4bit(x, q), truth)
                torchs = relative_error(torch.nn.functional.linear(x, w), truth)
                assert ours <= 2 * torchs, f"error {ours:.2e}, torch's {torchs:.2e}"

            moved = qs[0].nbytes + x.nbytes + M * N * 2
            with torch.no_grad():
                bench.compare(f"M {M} N {N} K {K}", candidates, moved_bytes=moved, check=check)


class PeftLora(torch.nn.Module):
    """What PEFT computes on a bitsandbytes layer: adapters in fp32, x cast for them, the result cast back."""

    def __init__(self, base, a, b, scaling: float, dropout_p: float) -> None:
        super().__init__()
        self.base, self.a, self.b = base, a, b
        self.scaling, self.dropout = scaling, torch.nn.Dropout(dropout_p)

    def forward(self, x):
        y = self.base(x).clone()
        low = torch.nn.functional.linear(self.dropout(x.to(self.a.dtype)), self.a)
        return y + (torch.nn.functional.linear(low, self.b) * self.scaling).to(y.dtype)


def training(bench: GpuBench) -> None:
    for N, K in SHAPES:
        q = quantised(N, K, 1)[0]
        dense = pf.ops.dequantize_4bit(q)
        x = torch.randn(TRAIN_M, K, device="cuda", dtype=torch.bfloat16).requires_grad_()
        grad = torch.randn(TRAIN_M, N, device="cuda", dtype=torch.bfloat16)
        a = (torch.randn(RANK, K, device="cuda") * 0.02).requires_grad_()
        b = (torch.randn(N, RANK, device="cuda") * 0.02).requires_grad_()
        flops = 2 * 2 * TRAIN_M * N * K
        for dropout_p in (0.0, 0.1):
            dequantise = 2 * (q.nbytes + dense.nbytes)
            # shrink x; y in and out; dy for dS, dB; x for dA; dx in and out
            low_rank = (2 * x.nbytes + 2 * grad.nbytes) + 2 * grad.nbytes + 2 * x.nbytes
            floor = flops / bench.matmul_flops_per_second + (dequantise + low_rank) / bench.copy_bytes_per_second

            def step(f, inputs=(x, a, b), grad=grad):
                return torch.autograd.grad(f(inputs[0]), inputs, grad)

            candidates = {
                "ours": [
                    lambda p=dropout_p, q=q, step=step: step(lambda t: pf.ops.linear_4bit(t, q, None, a, b, 2.0, p))
                ]
            }
            with peer("bitsandbytes"):
                theirs = PeftLora(bitsandbytes_layer(q).train(), a, b, 2.0, dropout_p)
                candidates["peft + bitsandbytes"] = [lambda f=theirs, step=step: step(f)]
            frozen = x.detach().requires_grad_()
            candidates["dense, no adapter"] = [
                lambda w=dense, t=frozen, g=grad: torch.autograd.grad(torch.nn.functional.linear(t, w), t, g)
            ]
            bench.compare(
                f"QLoRA forward + backward M {TRAIN_M} N {N} K {K} r {RANK} dropout {dropout_p}", candidates,
                flops=flops, floor_seconds=floor, eager=True,
            )  # fmt: skip


def main() -> None:
    bench = GpuBench("linear_4bit", __doc__)
    inference(bench)
    training(bench)
    bench.finish()


if __name__ == "__main__":
    main()
