"""(IA)³ scaling, forward and backward, beside torch's `x * scale` (fp32 scale cast to x's dtype, as PEFT computes it)."""

import torch
from _harness import Bench

import pyfastpeft as pf

SHAPES = [(1024, 4096), (4096, 4096), (1, 4096), (65536, 64)]


def main() -> None:
    bench = Bench("ia3", __doc__)
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
            scale = torch.randn(shape[1])

            def torch_scale(x=x, scale=scale):
                return x * scale.to(x.dtype)

            def ours(x=x, scale=scale):
                return pf.ops.ia3_scale(x, scale)

            def check(x=x, scale=scale, ours=ours):
                truth = x.double() * scale.double()
                error, peer = ((y.double() - truth).norm() for y in (ours(), torch_scale(x, scale)))
                assert error <= peer

            name = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
            with torch.no_grad():
                candidates = {"ours": ours, "torch": torch_scale}
                bench.compare(f"{name} forward", candidates, moved_bytes=2 * x.nbytes, check=check)
            leaf, leaf_scale = x.clone().requires_grad_(), scale.clone().requires_grad_()

            def step(f, leaf=leaf, leaf_scale=leaf_scale, grad=grad):
                return torch.autograd.grad(f(leaf, leaf_scale), (leaf, leaf_scale), grad)

            bench.compare(
                f"{name} forward + backward",
                {"ours": lambda f=step: f(pf.ops.ia3_scale), "torch": lambda f=step: f(torch_scale)},
                moved_bytes=5 * x.nbytes,
            )
    bench.finish()


if __name__ == "__main__":
    main()
