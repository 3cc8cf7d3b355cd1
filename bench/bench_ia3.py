"""(IA)³ scaling, forward and backward, beside torch's `x * scale` (fp32 scale cast to x's dtype, as PEFT computes it)."""

import torch

import pyfastpeft as pf

SHAPES = [(1024, 4096), (4096, 4096), (1, 4096), (65536, 64)]


def run(suite) -> None:
    for dtype in suite.pick((torch.bfloat16, torch.float32), (torch.bfloat16,)):
        for shape in suite.pick(SHAPES, SHAPES[:1]):
            _rows(suite, dtype, shape)


def _rows(suite, dtype, shape) -> None:
    x, grad, scale = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1])

    def torch_scale(x, scale):
        return x * scale.to(x.dtype)

    def check():
        truth = x.double() * scale.double()
        error, peer = ((f(x, scale).double() - truth).norm() for f in (pf.ops.ia3_scale, torch_scale))
        assert error <= peer, f"error {error}, torch's {peer}"

    name = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
    with torch.no_grad():
        suite.compare(
            f"{name} forward",
            {"ours": lambda: pf.ops.ia3_scale(x, scale), "torch": lambda: torch_scale(x, scale)},
            moved_bytes=2 * x.nbytes,
            check=check,
        )
    leaf, leaf_scale = x.clone().requires_grad_(), scale.clone().requires_grad_()

    def step(f):
        return torch.autograd.grad(f(leaf, leaf_scale), (leaf, leaf_scale), grad)

    suite.compare(
        f"{name} forward + backward",
        {"ours": lambda: step(pf.ops.ia3_scale), "torch": lambda: step(torch_scale)},
        moved_bytes=5 * x.nbytes,
    )
