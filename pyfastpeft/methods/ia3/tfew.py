"""T-Few's losses (Liu et al. 2022, arXiv:2205.05638, section 3.2) for tasks with answer choices.

Everywhere: logits [B, C, T, V] of the C choices of B examples, targets [B, C, T] their tokens (negative: padding, -100
as elsewhere), correct [B] the index of the right choice. A choice has at least one token. Sums are taken in fp32.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def choice_scores(logits: torch.Tensor, targets: torch.Tensor, length_norm: float = 1.0) -> torch.Tensor:
    """β [B, C]: Σ_t log p(y_t) / T^length_norm over the T tokens of each choice; the highest is the model's answer."""
    log_p, real = _token_log_p(logits, targets)
    return log_p.sum(-1) / real.sum(-1).to(log_p.dtype) ** length_norm


def length_normalized_loss(
    logits: torch.Tensor, targets: torch.Tensor, correct: torch.Tensor, length_norm: float = 1.0
) -> torch.Tensor:
    """L_LN = −log softmax_C(β)[correct], the mean over the batch (the paper's equation 2): which choice is the answer."""
    _check(logits, targets, correct)
    return functional.cross_entropy(choice_scores(logits, targets, length_norm), correct)


def unlikelihood_loss(
    logits: torch.Tensor, targets: torch.Tensor, correct: torch.Tensor, eps: float = 1e-2
) -> torch.Tensor:
    """L_UL = −Σ log(1 − p(ŷ_t) + eps) / count over the tokens ŷ of the wrong choices (the paper's equation 1).

    eps   what T-Few's code adds: it bounds the loss of a token at −log eps. 0 is the paper's formula, without a bound.
    Zero where there is no wrong choice.
    """
    _check(logits, targets, correct)
    if not eps >= 0.0:
        raise ValueError(f"unlikelihood_loss: eps is {eps}, expected a number of at least 0")
    log_p, real = _token_log_p(logits, targets)
    wrong = real & (torch.arange(targets.shape[1], device=targets.device) != correct[:, None]).unsqueeze(-1)
    # log1p: 1 − p is not rounded to 1 for a small p; beyond the mask its argument is one whose gradient is finite
    losses = -torch.log1p(torch.where(wrong, eps - log_p.exp(), 0.0))
    return losses.sum() / wrong.sum().clamp(min=1)


def tfew_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    correct: torch.Tensor,
    length_norm: float = 1.0,
    eps: float = 1e-2,
) -> torch.Tensor:
    """L_LM + L_UL + L_LN (the paper's equation 3), L_LM being the mean −log p of the right choices' tokens."""
    _check(logits, targets, correct)
    rows = torch.arange(len(correct), device=targets.device)
    log_p, real = _token_log_p(logits[rows, correct], targets[rows, correct])
    language = -log_p.sum() / real.sum().clamp(min=1)
    return (
        language
        + unlikelihood_loss(logits, targets, correct, eps)
        + length_normalized_loss(logits, targets, correct, length_norm)
    )


def _token_log_p(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p of each target token, 0 at padding; where there is a token), both of targets' shape."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"T-Few: logits have shape {tuple(logits.shape)} and targets {tuple(targets.shape)}, expected "
            "[B, C, T, V] and [B, C, T]"
        )
    real = targets >= 0
    flat = torch.where(real, targets, -100).flatten()
    wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    return -functional.cross_entropy(wide, flat, ignore_index=-100, reduction="none").view(targets.shape), real


def _check(logits: torch.Tensor, targets: torch.Tensor, correct: torch.Tensor) -> None:
    if logits.dim() != 4 or targets.shape != logits.shape[:-1] or correct.shape != logits.shape[:1]:
        raise ValueError(
            f"T-Few: logits have shape {tuple(logits.shape)}, targets {tuple(targets.shape)} and correct "
            f"{tuple(correct.shape)}, expected [B, C, T, V], [B, C, T] and [B]"
        )
