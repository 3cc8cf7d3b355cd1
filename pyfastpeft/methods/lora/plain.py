"""An adapter that has taken from its base (PiSSA, OLoRA) as plain LoRA for the original base, of twice the rank.

The base was W' = W − s B₀A₀ when training began, so the model is W + s (B A − B₀A₀), and

    B A − B₀A₀ = [B, −B₀] [A; A₀]          A, A₀ [R, K], B, B₀ [N, R]

with the first values A₀, B₀ read from the files that save_pretrained() wrote before training.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import torch

from pyfastpeft.methods.lora.config import LoraConfig
from pyfastpeft.methods.lora.initial import takes_from_base

# an embedding among them began as plain LoRA, with B₀A₀ = 0, and only grows to the others' rank
_A, _B = (".lora_A.weight", ".lora_embedding_A"), (".lora_B.weight", ".lora_embedding_B")


def as_plain_lora(
    tensors: Mapping[str, torch.Tensor], config: LoraConfig, folder: str | os.PathLike
) -> dict[str, torch.Tensor]:
    """The tensors of a file as plain LoRA's; config is made theirs.

    folder   where the adapter was saved before training (or a repository of the hub)
    Raises ValueError for adapters that have no such form, and for a folder that is not theirs.
    """
    from pyfastpeft.checkpoint import read_config, read_tensors

    name = "path_initial_model_for_weight_conversion"
    if not isinstance(config, LoraConfig) or not takes_from_base(config.init_lora_weights):
        raise ValueError(
            f"{name}: the adapter is not one that has taken from its base (init_lora_weights 'pissa', 'pissa_niter_N', "
            "'olora'); it is plain already, save it without"
        )
    if config.init_lora_weights == "loftq":
        raise ValueError(f"{name}: a 'loftq' adapter belongs to its quantised base and has no plain form")
    if config.use_dora or config.target_parameters:
        field = "use_dora" if config.use_dora else "target_parameters"
        raise ValueError(f"{name}: {field} and the conversion do not go together")
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ValueError(f"{name}: rank_pattern or alpha_pattern with use_rslora has no such form in PEFT's files")
    first, former = read_tensors(folder), read_config(folder)
    for field in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        if getattr(former, field, None) != getattr(config, field):
            raise ValueError(
                f"{name}: {os.fspath(folder)} has {field}={getattr(former, field, None)!r}, the adapter "
                f"{getattr(config, field)!r}; expected the same adapter as it was before training"
            )
    keys = [key for key in tensors if key.endswith(_A + _B)]
    wrong = [key for key in keys if key not in first or first[key].shape != tensors[key].shape]
    if wrong or set(keys) != {key for key in first if key.endswith(_A + _B)}:
        shown = wrong[0] if wrong else "it has more layers"
        raise ValueError(f"{name}: {os.fspath(folder)} is not this adapter before training ({shown})")
    made = dict(tensors)
    for key in keys:
        now, then = tensors[key].detach(), first[key].to(tensors[key].device, tensors[key].dtype)
        made[key] = torch.cat([now, then]) if key.endswith(_A) else torch.cat([now, -then], dim=1)
    factor = math.sqrt(2) if config.use_rslora else 2
    config.init_lora_weights = True
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: 2 * alpha for key, alpha in config.alpha_pattern.items()}
    return made
