"""AdamW in plain torch: the specification of csrc/adamw, bit for bit.

Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101. The order of the operations and their
roundings are those of torch.optim.adam._single_tensor_adam on fp32 tensors. 8-bit state: Dettmers et al., "8-bit
Optimizers via Block-wise Quantization", arXiv:2110.02861.
"""

import math

import torch

from pyfastpeft.reference.nf4 import dynamic_map
from pyfastpeft.reference.philox import philox_u32

BLOCK = 256


def fma(a: torch.Tensor, b: torch.Tensor | float, c: torch.Tensor) -> torch.Tensor:
    """a · b + c with one rounding to fp32: exact product in fp64, sum rounded to odd there, then to nearest in fp32."""
    product = a.double() * (b.double() if isinstance(b, torch.Tensor) else b)
    c = c.double()
    total = product + c
    from_c = total - product
    error = (product - (total - from_c)) + (c - from_c)
    bits = total.view(torch.int64)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & error.isfinite() & (bits & 1 == 0)
    return torch.where(inexact, bits + step, bits).view(torch.float64).float()


def _f32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).float().item()


def dequantize_moment(codes: torch.Tensor, absmax: torch.Tensor, qmap: torch.Tensor) -> torch.Tensor:
    """codes uint8 [n], absmax fp32 [ceil(n / 256)] → qmap[code] · absmax of its block, fp32 [n]."""
    return qmap[codes.long()] * absmax.repeat_interleave(BLOCK)[: codes.numel()]


def quantize_moment(values: torch.Tensor, qmap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [n] → codes uint8 [n], absmax fp32 [ceil(n / 256)].

    The code is that of the level nearest to value · (1 / absmax), a tie going to the lower; where absmax is subnormal
    its reciprocal overflows and value / absmax is taken. A block with a NaN or an infinity gets absmax NaN, so that it
    reads back as NaN.
    """
    n = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -n % BLOCK)).reshape(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scale = absmax.unsqueeze(1)
    scaled = torch.where(scale >= torch.finfo(torch.float32).tiny, blocks * (1.0 / scale), blocks / scale)
    usable = (absmax > 0) & absmax.isfinite()
    scaled = torch.where(usable.unsqueeze(1), scaled, 0.0).double()
    middle = (qmap[:-1].double() + qmap[1:].double()) / 2  # exact
    codes = torch.searchsorted(middle, scaled, right=False)  # how many midpoints lie strictly below
    return codes.reshape(-1)[:n].to(torch.uint8), torch.where(absmax.isfinite(), absmax, torch.nan)


def round_stochastically(values: torch.Tensor, dtype: torch.dtype, seed: int, index: int) -> torch.Tensor:
    """fp32 [n] → dtype: up or down with the odds of the distance, by Philox of (seed; position, tensor index).

    Values at or beyond the dtype's largest finite one are rounded to nearest.
    """
    random = philox_u32(values.numel(), index, seed)
    nearest = values.to(dtype)
    bits = values.view(torch.int32).long()
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        drop = torch.full_like(magnitude, 16)
        rounded = ((bits & 0xFFFFFFFF) + (random & 0xFFFF)) >> 16
    elif dtype == torch.float16:
        exponent = magnitude >> 23
        mantissa = torch.where(exponent > 0, (magnitude & 0x7FFFFF) | 0x800000, magnitude & 0x7FFFFF)
        drop = 126 - exponent.clamp(min=1)
        normal = (magnitude - 0x38000000 + (random & 0x1FFF)) >> 13
        few = drop.clamp(max=32)
        short = (mantissa + (random & ((1 << few) - 1))) >> few
        long = ((mantissa >> (drop - 32).clamp(0, 62)) + random) >> 32
        small = torch.where(drop > 56, 0, torch.where(drop <= 32, short, long))
        rounded = torch.where(magnitude >= 0x38800000, normal, small) | ((bits >> 16) & 0x8000)
    else:
        raise TypeError(f"stochastic rounding to {dtype}, expected bfloat16 or float16")
    rounded = (rounded & 0xFFFF).to(torch.int32).to(torch.int16).view(dtype)
    return torch.where(values.abs() >= torch.finfo(dtype).max, nearest, rounded)


def adamw_step(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: float,
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decoupled: bool = True,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The new (param, exp_avg, exp_avg_sq), all fp32, of one step; `step` counts from 1 and includes this one.

    g = ∓grad / grad_scale (+ weight_decay · p when not decoupled);  p ← (1 - lr · weight_decay) · p when decoupled
    m ← m + (1 - β1)(g - m);  v ← β2 · v + (1 - β2) · g²
    p ← p - lr / (1 - β1^t) · m / (sqrt(v) / sqrt(1 - β2^t) + eps)
    """
    p, m, v = param.float(), exp_avg.float(), exp_avg_sq.float()
    g = grad.float() * _f32((-1.0 if maximize else 1.0) / grad_scale)
    if not decoupled and weight_decay != 0:
        g = fma(p, _f32(weight_decay), g)
    if decoupled:
        p = p * _f32(1.0 - lr * weight_decay)
    weight = _f32(1.0 - beta1)
    m = fma(g - m, weight, m) if weight < 0.5 else fma(g - m, _f32(weight - 1.0), g)
    v = v * _f32(beta2)
    v = fma(_f32(1.0 - beta2) * g, g, v)
    root = v.double().sqrt().float()  # correctly rounded; torch.sqrt of fp32 may call a library that is not
    denominator = root / _f32(math.sqrt(1.0 - beta2**step)) + _f32(eps)
    p = p + (_f32(-(lr / (1.0 - beta1**step))) * m) / denominator
    return p, m, v


def adamw_step_8bit(
    param: torch.Tensor,
    grad: torch.Tensor,
    state1: torch.Tensor,
    state2: torch.Tensor,
    absmax1: torch.Tensor,
    absmax2: torch.Tensor,
    step: float,
    qmap1: torch.Tensor | None = None,
    qmap2: torch.Tensor | None = None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The new (param fp32, state1, state2, absmax1, absmax2) with 8-bit state; flat tensors.

    The parameter moves by the moments before they are encoded again.
    """
    qmap1 = dynamic_map(signed=True) if qmap1 is None else qmap1
    qmap2 = dynamic_map(signed=False) if qmap2 is None else qmap2
    m, v = dequantize_moment(state1, absmax1, qmap1), dequantize_moment(state2, absmax2, qmap2)
    p, m, v = adamw_step(param, grad, m, v, step, **options)
    state1, absmax1 = quantize_moment(m, qmap1)
    state2, absmax2 = quantize_moment(v, qmap2)
    return p, state1, state2, absmax1, absmax2
