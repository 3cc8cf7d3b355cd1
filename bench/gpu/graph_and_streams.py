"""A training step captured in a CUDA graph and replayed equals the eager step; two streams at once equal one."""

import copy

import torch

import pyfastpeft as pf


class Layer(torch.nn.Module):
    def __init__(self, n: int = 256, k: int = 192, rank: int = 8) -> None:
        super().__init__()
        self.q = pf.ops.quantize_4bit(torch.randn(n, k, device="cuda", dtype=torch.bfloat16), double_quant=True)
        self.a = torch.nn.Parameter(torch.randn(rank, k, device="cuda") * 0.05)
        self.b = torch.nn.Parameter(torch.randn(n, rank, device="cuda") * 0.05)
        self.scale = torch.nn.Parameter(torch.ones(n, device="cuda"))

    def forward(self, x):
        return pf.ops.ia3_scale(pf.ops.linear_4bit(x, self.q, None, self.a, self.b, 2.0), self.scale)


def train(layer, xs, graph: bool):
    optimizer = pf.optim.AdamW(layer.parameters(), lr=1e-2)
    x = xs[0].clone()

    def step():
        loss = layer(x).float().square().mean()
        loss.backward()
        optimizer.step()
        for p in layer.parameters():
            p.grad.zero_()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
    for batch in xs:
        x.copy_(batch)
        captured.replay() if graph else step()
    torch.cuda.synchronize()
    return [p.detach().clone() for p in layer.parameters()]


def main() -> None:
    torch.manual_seed(0)
    for tokens in (4, 300):
        layer = Layer()
        xs = [torch.randn(tokens, 192, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
        eager, replayed = train(copy.deepcopy(layer), xs, False), train(copy.deepcopy(layer), xs, True)
        assert all(torch.equal(e, r) for e, r in zip(eager, replayed, strict=True)), f"graph differs, M {tokens}"

        expected = [layer(x) for x in xs]
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        got = []
        for i, x in enumerate(xs):
            with torch.cuda.stream(streams[i % 2]):
                got.append(layer(x))
        torch.cuda.synchronize()
        assert all(torch.equal(e, g) for e, g in zip(expected, got, strict=True)), f"two streams differ, M {tokens}"
    print("CUDA graph and two streams: equal to eager on one")


if __name__ == "__main__":
    main()
