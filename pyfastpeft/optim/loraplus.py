"""LoRA+ (Hayou, Ghosh and Yu 2024, arXiv:2402.12354): a higher learning rate for B than for A."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """An optimizer of this class over the model's trainable parameters, in up to four groups.

    lr                     of A and of everything else
    loraplus_lr_ratio      λ: B's learning rate is λ · lr, and so is that of one-dimensional parameters (biases, norms, m);
                           the paper recommends about 16
    loraplus_weight_decay  of all groups but the one-dimensional parameters'
    loraplus_lr_embedding  of the low-rank factors of embeddings
    kwargs                 passed on (betas, eps, state_bits, …)

    The groups are Hugging Face PEFT's, but for DoRA's m, which decays there and does not here. Raises ValueError when
    nothing is trainable, or for a ratio that is not positive.
    """
    if not loraplus_lr_ratio > 0:
        raise ValueError(f"create_loraplus_optimizer: loraplus_lr_ratio is {loraplus_lr_ratio}, expected more than 0")
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B without decay": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        one_dimensional = parameter.ndim == 1 or "lora_magnitude_vector" in name  # a convolution's m is [1, N, 1, 1]
        if "lora_embedding" in name:
            groups["embedding"].append(parameter)
        elif one_dimensional or "lora_B" in name:
            groups["B without decay" if one_dimensional else "B"].append(parameter)
        else:
            groups["A"].append(parameter)
    if not any(groups.values()):
        raise ValueError("create_loraplus_optimizer: the model has no trainable parameters")
    rates = {"A": lr, "embedding": loraplus_lr_embedding, "B": lr * loraplus_lr_ratio}
    options = [
        {
            "params": parameters,
            "lr": rates.get(kind, lr * loraplus_lr_ratio),
            "weight_decay": 0.0 if kind == "B without decay" else loraplus_weight_decay,
        }
        for kind, parameters in groups.items()
        if parameters
    ]
    return optimizer_cls(options, lr=lr, **kwargs)
