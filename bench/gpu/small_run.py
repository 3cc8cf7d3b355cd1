"""Every CUDA kernel once on small tensors with tails: what compute-sanitizer watches.

Run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation of its own with its own bounds.
"""

import torch

import pyfastpeft as pf


def split_and_many_rows(device: str, dtype: torch.dtype) -> None:
    """Rows of W long enough to be cut into parts, and more rows of x than one part of (IA)³'s sum takes."""
    n, k = 33, 2336
    q = pf.ops.quantize_4bit(torch.randn(n, k, device=device, dtype=dtype), double_quant=True)
    scale = torch.randn(n, device=device, requires_grad=True)
    a, b = torch.randn(3, k, device=device), torch.randn(n, 3, device=device)
    for m in (1, 9):
        x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
        pf.ops.linear_4bit_ia3(x, q, scale).sum().backward()
        with pf.ops.batch_invariant():
            pf.ops.linear_4bit(x, q, None, a, b, 2.0)
    x = torch.randn(4100, 9, device=device, dtype=dtype, requires_grad=True)
    pf.ops.ia3_scale(x, torch.randn(9, device=device, requires_grad=True)).sum().backward()


def mixed_batch(device: str, dtype: torch.dtype) -> None:
    """Two adapters and none, in rows for the tensor cores and in rows that are not."""
    order, starts = pf.ops.segments(torch.tensor([1, 0, -1, 1], device=device), 2)
    for n, k in ((264, 520), (33, 67)):
        x, y = (torch.randn(4, 9, size, device=device, dtype=dtype) for size in (k, n))
        for factors in {torch.float32, dtype}:
            a = [torch.randn(rank, k, device=device, dtype=factors) for rank in (5, 20)]
            b = [torch.randn(n, rank, device=device, dtype=factors) for rank in (5, 20)]
            bias, scalings = [torch.randn(n, device=device), None], [0.5, 2.0]
            pf.ops.segmented_lora(y, x, order, starts, a, b, bias, scalings)
            leaves = [t.clone().requires_grad_() for t in (x, *a, *b)]
            out = pf.ops.segmented_lora(y, leaves[0], order, starts, leaves[1:3], leaves[3:], bias, scalings)
            out.float().sum().backward()


def optimizer_steps(device: str, dtype: torch.dtype) -> None:
    shapes = ((5000,), (3, 7), (4097,))
    params = [torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    low = (
        {}
        if dtype == torch.float32
        else {"master": {"master_weights": True}, "stochastic": {"stochastic_rounding": True}}
    )
    for bits in (32, 8):
        for options in ({}, *low.values()):
            optimizer = pf.optim.AdamW(params, state_bits=bits, **options)
            for _ in range(2):
                for p in params:
                    p.grad = torch.randn_like(p)
                optimizer.step()


def main(device: str = "cuda") -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for n, k in ((48, 192), (33, 67)):
            w = torch.randn(n, k, device=device, dtype=dtype)
            for blocksize in (32, 64, 4096):
                for quant_type in ("nf4", "fp4"):
                    for nested in (False, True):
                        q = pf.ops.quantize_4bit(w, blocksize, quant_type, double_quant=nested)
                        pf.ops.dequantize_4bit(q)
            q = pf.ops.quantize_4bit(w, 64, double_quant=True)
            a = torch.randn(5, k, device=device, requires_grad=True)
            b = torch.randn(n, 5, device=device, requires_grad=True)
            bias = torch.randn(n, device=device, dtype=dtype, requires_grad=True)
            for m in (1, 3, 17, 64, 130):
                x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
                for p in (0.0, 0.25):
                    pf.ops.linear_4bit(x, q, bias, a, b, 2.0, p).sum().backward()
                    pf.ops.linear_lora(x, w, bias, a, b, 2.0, p).sum().backward()
                scale = torch.randn(k, device=device, requires_grad=True)
                pf.ops.ia3_scale(x, scale).sum().backward()
        split_and_many_rows(device, dtype)
        mixed_batch(device, dtype)
        optimizer_steps(device, dtype)
    if device == "cuda":
        torch.cuda.synchronize()
    print("small run: done")


if __name__ == "__main__":
    main()
