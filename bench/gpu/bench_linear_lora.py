"""The LoRA layer over a dense bf16 base, forward + backward, beside PEFT's; (IA)³ beside torch's product."""

import torch
from _gpu import GpuBench, peer, rotations

import pyfastpeft as pf

M, RANK = 4096, 16
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]  # N, K


def peft_layer(weight, a, b, dropout_p: float):
    """PEFT's own layer, with its fp32 adapters, over the same tensors."""
    from peft import LoraConfig, get_peft_model

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            self.linear.weight = torch.nn.Parameter(weight, requires_grad=False)

        def forward(self, x):
            return self.linear(x)

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout_p, target_modules=["linear"])
    layer = get_peft_model(Model(), config).base_model.model.linear
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
    return layer.train()


def lora(bench: GpuBench) -> None:
    for N, K in SHAPES:
        weight = torch.randn(N, K, device="cuda", dtype=torch.bfloat16) * 0.02
        x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16).requires_grad_()
        grad = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
        a = torch.nn.Parameter(torch.randn(RANK, K, device="cuda") * 0.02)
        b = torch.nn.Parameter(torch.randn(N, RANK, device="cuda") * 0.02)
        flops = 2 * 2 * M * N * K
        for dropout_p in (0.0, 0.1):
            passes = (2 * x.nbytes + 2 * grad.nbytes) + 2 * grad.nbytes + 2 * x.nbytes
            floor = flops / bench.matmul_flops_per_second + passes / bench.copy_bytes_per_second

            def step(f, inputs=(x, a, b), grad=grad):
                return torch.autograd.grad(f(inputs[0]), inputs, grad)

            candidates = {
                "ours": [
                    lambda w=weight, p=dropout_p, step=step, a=a, b=b: step(
                        lambda t: pf.ops.linear_lora(t, w, None, a, b, 2.0, p)
                    )
                ]
            }
            with peer("PEFT"):
                theirs = peft_layer(weight, a, b, dropout_p)

                def peft_step(f=theirs, step=step):
                    with torch.autocast("cuda", dtype=torch.bfloat16):
                        return step(f)

                candidates["PEFT"] = [lambda f=theirs, step=step: step(f)]
                candidates["PEFT autocast"] = [peft_step]
            frozen = x.detach().requires_grad_()
            candidates["frozen base"] = [
                lambda w=weight, t=frozen, g=grad: torch.autograd.grad(torch.nn.functional.linear(t, w), t, g)
            ]
            bench.compare(
                f"LoRA forward + backward M {M} N {N} K {K} r {RANK} dropout {dropout_p}", candidates,
                flops=flops, floor_seconds=floor, eager=True,
            )  # fmt: skip


def ia3(bench: GpuBench) -> None:
    D = 14336
    copies = rotations(M * D * 2 * 2, at_least=2)
    xs = [torch.randn(M, D, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    grads = [torch.randn(M, D, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    scale = torch.randn(D, device="cuda")
    half = scale.bfloat16()
    bench.compare(
        f"(IA)3 forward {M}x{D}",
        {
            "ours": [lambda x=x: pf.ops.ia3_scale(x, scale) for x in xs],
            "torch": [lambda x=x: x * half for x in xs],
        },
        moved_bytes=2 * xs[0].nbytes,
    )
    backward = torch.ops.pyfastpeft.ia3_scale_backward
    bench.compare(
        f"(IA)3 backward {M}x{D}",
        {
            "ours": [lambda x=x, g=g: backward(g, x, scale, [True, True]) for x, g in zip(xs, grads, strict=True)],
            "torch": [lambda x=x, g=g: (g * half, (g * x).sum(0)) for x, g in zip(xs, grads, strict=True)],
        },
        moved_bytes=3 * xs[0].nbytes,
    )


def main() -> None:
    bench = GpuBench("linear_lora", __doc__)
    lora(bench)
    ia3(bench)
    bench.finish()


if __name__ == "__main__":
    main()
