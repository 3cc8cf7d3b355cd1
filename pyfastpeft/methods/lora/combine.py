"""A new LoRA adapter out of several: weighted sums of their factors or of their updates, pruned or not.

    linear             A = Σ sign·√|w s| A_i, B = Σ √|w s| B_i: near Σ w s B_i A_i where the adapters are alike; equal ranks
    cat                A_i and w s B_i side by side: exactly Σ w s B_i A_i, of the summed rank
    svd                the best approximation of rank svd_rank of Σ w s B_i A_i
    ties[_svd]         the smallest entries dropped, then a mean of those whose sign is the elected one
                       (Yadav et al. 2023, arXiv:2306.01708)
    dare_linear[_svd]  entries dropped at random, the others times 1/density (Yu et al. 2023, arXiv:2311.03099)
    dare_ties[_svd]    the same, then signs elected and a mean as in ties
    magnitude_prune[_svd]   the smallest entries dropped, then the weighted sum

The plain ones work on A and on B, those with _svd on the updates w s B A, which are then cut down to svd_rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

KINDS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
PRUNING = KINDS[1:]


def check_combination(count: int, weights: Sequence[float], kind: str, density: float | None, sign: str) -> str:
    """The kind to use (of a single adapter: linear); ValueError names what does not make sense."""
    if kind not in ("cat", "svd", *KINDS, *(f"{k}_svd" for k in PRUNING)):
        kinds = ", ".join(("cat", "svd", *KINDS, *(f"{k}_svd" for k in PRUNING)))
        raise ValueError(f"add_weighted_adapter: combination_type is {kind!r}, expected one of {kinds}")
    if count == 0 or len(weights) != count:
        raise ValueError(f"add_weighted_adapter: {count} adapters and {len(weights)} weights; expected as many of each")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"add_weighted_adapter: weights are {list(weights)}, expected finite numbers")
    if kind.removesuffix("_svd") in PRUNING and (density is None or not 0.0 < density <= 1.0):
        raise ValueError(f"add_weighted_adapter: density is {density}, expected 0 < density <= 1 for {kind}")
    if sign not in ("total", "frequency"):
        raise ValueError(f"add_weighted_adapter: majority_sign_method is {sign!r}, expected 'total' or 'frequency'")
    return "linear" if count == 1 else kind


@torch.no_grad()
def combine_factors(
    factors: list[tuple[torch.Tensor, torch.Tensor, float]],
    weights: list[float],
    kind: str,
    rank: int,
    density: float | None = None,
    sign: str = "total",
    clamp: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [rank, K], B [N, rank]) in fp32 whose plain product is the combination of (A_i, B_i, s_i) with these weights."""
    a = [each.float() for each, _, _ in factors]
    b = [each.float() for _, each, _ in factors]
    scaled = [weight * scaling for weight, (_, _, scaling) in zip(weights, factors, strict=True)]
    if kind == "cat":
        new_a = torch.cat([each * w for each, w in zip(a, scaled, strict=True)])
        new_b = torch.cat(b, dim=1)
    elif kind.endswith("svd"):
        # the weights come after the pruning, in the sum
        updates = [s * (y @ x) for x, y, (_, _, s) in zip(a, b, factors, strict=True)]
        whole = _sum(updates, weights, kind.removesuffix("_svd").replace("svd", "linear"), density, sign)
        new_a, new_b = _cut(whole, rank, clamp)
    else:
        roots = [math.sqrt(abs(w)) for w in scaled]
        signed = [math.copysign(root, w) for root, w in zip(roots, scaled, strict=True)]
        new_a, new_b = _sum(a, signed, kind, density, sign), _sum(b, roots, kind, density, sign)
    missing = rank - len(new_a)  # rank_pattern, or a layer that some of the adapters lack
    if missing > 0:
        new_a = torch.nn.functional.pad(new_a, (0, 0, 0, missing))
        new_b = torch.nn.functional.pad(new_b, (0, missing))
    return new_a, new_b


def _sum(
    tensors: list[torch.Tensor], weights: list[float], kind: str, density: float | None, sign: str
) -> torch.Tensor:
    if kind in ("ties", "magnitude_prune") and density < 1.0:
        tensors = [_largest(tensor, density) for tensor in tensors]
    elif kind in ("dare_linear", "dare_ties") and density < 1.0:
        tensors = [tensor * torch.bernoulli(torch.full_like(tensor, density)) / density for tensor in tensors]
    stacked = torch.stack(tensors)
    weighted = stacked * torch.tensor(weights, device=stacked.device).view(-1, *[1] * (stacked.dim() - 1))
    if not kind.endswith("ties"):
        return weighted.sum(0)
    votes = stacked.sum(0) if sign == "total" else stacked.sign().sum(0)
    agreeing = stacked.sign() == torch.where(votes >= 0, 1, -1)
    return (weighted * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def _largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The density's share of entries of largest magnitude; the others zero."""
    kept = torch.topk(tensor.abs().flatten(), int(density * tensor.numel())).indices
    return torch.zeros_like(tensor).flatten().index_copy(0, kept, tensor.flatten()[kept]).view_as(tensor)


def _cut(update: torch.Tensor, rank: int, clamp: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A = V_rᵀ and B = U_r S_r of the update; clamp: both cut off at that quantile of their values."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    a, b = vh[:rank], u[:, :rank] * s[:rank]
    if clamp is not None:
        limit = torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp)
        a, b = a.clamp(-limit, limit), b.clamp(-limit, limit)
    return a, b
