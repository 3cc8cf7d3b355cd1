"""Initial values of A and B, some of which take their share out of the base's weight.

Each of the latter is a function of W alone, in fp32 and without a random number, so that loading an adapter's file onto
the original base can take the same share out again. (PEFT's pissa_niter draws anew on loading, and its file then stands
for another model.)
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

FROM_BASE = ("pissa", "olora", "loftq")
_SEED = 0  # of the random projection of pissa_niter


def takes_from_base(init: bool | str) -> bool:
    """Whether this init_lora_weights changes the base's weight."""
    return isinstance(init, str) and init.split("_niter_")[0] in FROM_BASE


def check_init(init: bool | str) -> bool:
    """Whether it is an init_lora_weights that is known."""
    plain = isinstance(init, bool) or (isinstance(init, str) and init.lower() in ("gaussian", "orthogonal", "eva"))
    return plain or (isinstance(init, str) and bool(re.fullmatch(r"pissa|pissa_niter_\d+|olora|loftq", init)))


def draw_weights(
    in_features: int, out_features: int, rank: int, init: bool | str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, K] and B [N, R] in fp32 on the CPU, uninitialised when init is None.

    The draws from torch's generator are PEFT's, one for one (it makes two nn.Linear and then initialises A again), so
    a seed gives both libraries the same adapters.
    """
    a, b = torch.empty(rank, in_features, device="cpu"), torch.empty(out_features, rank, device="cpu")
    if init is None:
        return a, b
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    init = True if init == "eva" else init  # until the data says what A is
    if init == "orthogonal":
        return _orthogonal(in_features, out_features, rank)
    if isinstance(init, str):
        nn.init.normal_(a, std=1 / rank)
    elif init:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    if init:
        nn.init.zeros_(b)
    return a, b


def draw_with_bias(
    in_features: int, out_features: int, rank: int, init: bool | str | None, bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """draw_weights() and, for lora_bias, B's bias [N]: zero, or as nn.Linear has it for init False."""
    if not bias or init is None:
        a, b = draw_weights(in_features, out_features, rank, init)
        return a, b, torch.empty(out_features, device="cpu") if bias else None
    a, b = draw_weights(in_features, out_features, rank, False)
    offset = nn.init.uniform_(torch.empty(out_features, device="cpu"), -1 / math.sqrt(rank), 1 / math.sqrt(rank))
    if init:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5)), nn.init.zeros_(b), nn.init.zeros_(offset)
    return a, b, offset


def _orthogonal(in_features: int, out_features: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Neither is zero but B A is: the rows of one half of an orthogonal matrix go into A, of the other into B."""
    if rank % 2:
        raise ValueError(f"LoraConfig: init_lora_weights='orthogonal' needs an even rank, got {rank}")
    q, _ = torch.linalg.qr(torch.randn(rank, rank, device="cpu"))
    a = torch.randn(in_features, rank // 2, device="cpu").mm(q[0::2]).T / 10.0
    b = torch.randn(rank // 2, out_features, device="cpu").T.mm(q[1::2]) / 10.0
    return a.contiguous(), b.contiguous()


@torch.no_grad()
def take_from_base(
    weight: torch.Tensor, rank: int, scaling: float, init: str, loftq_config: dict
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(A, B, W') in fp32 for W [N, K] in fp32.

    pissa           W = U S Vᵀ: B = U_r √(S_r / s), A = √(S_r / s) V_rᵀ, W' = W − s B A: the principal part trains
                    (Meng et al. 2024, arXiv:2404.02948)
    pissa_niter_N   the same by N subspace iterations (torch.svd_lowrank), much faster
    olora           W = Q R: B = Q_r, A = R_r, W' = W − s B A (Büyükakyüz 2024, arXiv:2406.01775)
    loftq           W' = the 4-bit approximation of W − s B A, and s B A the best of rank r for W − W', alternating
                    loftq_iter times (Li et al. 2023, arXiv:2310.08659). PEFT's leaves s out, right only for s = 1
    """
    if min(weight.shape) < rank:
        raise ValueError(f"init_lora_weights={init!r}: rank {rank} exceeds the layer's {tuple(weight.shape)}")
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        a, b = r[:rank].contiguous(), q[:, :rank].contiguous()
    elif init == "loftq":
        return _loftq(weight, rank, scaling, loftq_config)
    else:
        a, b = _principal(weight, rank, scaling, int(init.split("_")[-1]) if "niter" in init else None)
    return a, b, weight - scaling * (b @ a)


def _principal(weight: torch.Tensor, rank: int, scaling: float, iterations: int | None):
    """(A, B) with s B A the best approximation of rank `rank`."""
    if iterations is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        devices = [weight.device] if weight.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_SEED)
            u, s, v = torch.svd_lowrank(weight, rank, niter=iterations)
        vh = v.T
    root = (s / scaling).sqrt()
    return (root[:, None] * vh).contiguous(), (u * root).contiguous()


def _loftq(weight: torch.Tensor, rank: int, scaling: float, config: dict):
    from pyfastpeft import ops

    update = torch.zeros_like(weight)
    for _ in range(config.get("loftq_iter", 1)):
        quantized = ops.dequantize_4bit(ops.quantize_4bit(weight - update, 64, "nf4"), dtype=torch.float32)
        a, b = _principal(weight - quantized, rank, scaling, None)
        update = scaling * (b @ a)
    return a, b, quantized
