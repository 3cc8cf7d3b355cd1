"""What the tests of linear_lora and linear_4bit share: inputs, and errors measured against torch's own at that dtype."""

import torch

from pyfastpeft.reference import lora as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# M, N, K, R: one of everything, odd everything, whole vectors, more columns than a panel, more rows than a panel,
# as many rows as bf16 is multiplied from, odd everything
SHAPES = [
    (1, 1, 1, 1),
    (3, 5, 7, 3),
    (5, 33, 47, 5),
    (64, 128, 96, 16),
    (21, 70, 1100, 7),
    (9, 1030, 40, 17),
    (300, 19, 130, 64),
    (67, 70, 549, 7),
    (141, 33, 37, 28),
]
NAMES = ("y", "x", "weight", "bias", "lora_a", "lora_b")


def inputs(shape, dtype, lora_dtype=torch.float32, kind="randn", bias=True, seed=0):
    """x, weight, bias, lora_a, lora_b, grad_output."""
    M, N, K, R = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    x = torch.nn.functional.gelu(randn(M, K)) if kind == "gelu" else randn(M, K)
    weight = randn(N, K) / K**0.5
    b = randn(N) if bias else None
    return [
        x.to(dtype), weight.to(dtype), b, (randn(R, K) / K**0.5).to(lora_dtype), (randn(N, R) / R**0.5).to(lora_dtype),
        randn(M, N).to(dtype),
    ]  # fmt: skip


def run(function, tensors, grad, wanted=None, device="cpu"):
    """[y, gradients…] of function(*tensors), computed on `device` and brought back; None stays None."""
    tensors = [
        None if t is None else t.detach().to(device).requires_grad_(wanted is None or wanted[i])
        for i, t in enumerate(tensors)
    ]
    y = function(*tensors)
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(y, leaves, grad.to(y)))
    return [y.detach().cpu(), *(next(grads).cpu() if t is not None and t.requires_grad else None for t in tensors)]


def truth(tensors, grad, *options, wanted=None):
    """[y, gradients…] in fp64."""
    exact = [None if t is None else t.double() for t in tensors]
    return run(lambda *a: reference.linear_lora(*a, *options), exact, grad.double(), wanted)


def torch_at_dtype(tensors, grad, scaling, dropout_p, seed, wanted=None):
    """[y, gradients…] as plain torch code computes them in x's dtype: the measure of a permissible error."""
    dtype = tensors[0].dtype

    def layer(x, weight, bias, lora_a, lora_b):
        y = torch.nn.functional.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        if lora_a is None:
            return y
        dropped = x
        if dropout_p:
            kept = reference.dropout_mask(tuple(x.shape), dropout_p, int(seed))
            dropped = x * kept * (1 / (1 - dropout_p) if dropout_p < 1 else 0)
        low = torch.nn.functional.linear(dropped, lora_a.to(dtype))
        return y + torch.nn.functional.linear(low, lora_b.to(dtype)) * scaling

    return run(layer, tensors, grad, wanted)


def assert_as_exact_as_torch(got, peers, exact, dtype, names=NAMES):
    """Root-mean-square error at most twice torch's; where torch happens to be exact, one rounding of the result."""
    for name, ours, theirs, true in zip(names, got, peers, exact, strict=True):
        if true is None:
            assert ours is None, name
            continue
        assert ours.shape == true.shape, name
        if true.numel() == 0:
            continue
        error, allowed = ((t.double() - true).square().mean().sqrt().item() for t in (ours, theirs))
        floor = torch.finfo(ours.dtype).eps * true.square().mean().sqrt().item()
        assert error <= max(2 * allowed, floor), f"{name}: error {error:.3g}, torch's {allowed:.3g}, floor {floor:.3g}"
