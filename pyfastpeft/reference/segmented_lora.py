"""LoRA over a mixed batch in plain torch: the specification of csrc/segmented_lora."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def segmented_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    lora_bias: Sequence[torch.Tensor | None],
    scalings: Sequence[float],
) -> torch.Tensor:
    """y + scaling_i · (x · A_iᵀ · B_iᵀ + bias_i) for the samples order[starts[i]:starts[i + 1]] of each adapter i; a new
    tensor, with autograd to everything. Factors are taken to x's dtype first."""
    bounds, order = starts.tolist(), order.long()
    for i, (a, b, bias, scaling) in enumerate(zip(lora_a, lora_b, lora_bias, scalings, strict=True)):
        if bounds[i] == bounds[i + 1] or a.shape[0] == 0:
            continue
        samples = order[bounds[i] : bounds[i + 1]]
        update = x[samples] @ a.to(x.dtype).t() @ b.to(x.dtype).t()
        if bias is not None:
            update = update + bias.to(x.dtype)
        y = y.index_add(0, samples, (scaling * update).to(y.dtype))
    return y
