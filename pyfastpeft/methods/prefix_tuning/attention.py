"""Where the attentions of a model are, and what their masks need for a prefix."""

from __future__ import annotations

import math
import re
import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pyfastpeft.methods.prompt_learning import forward_names, innermost, is_encoder_decoder
from pyfastpeft.saved_modules import named_originals

CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past")
MASK_NAMES = ("attention_mask", "mask")
_CROSS = re.compile(r"cross|EncDecAttention|encoder_attn", re.IGNORECASE)
GROUPS = ("encoder", "decoder", "cross")


def find_attentions(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The attentions that a prefix goes to by group, each in the order of the layers.

    An attention is an innermost module whose forward takes a cache and that knows which layer it is of. A decoder, or an
    encoder alone, has one group, "decoder", without its cross-attentions.
    """
    found = innermost(
        (path, module) for path, module in named_originals(model)
        if layer_number(module) is not None and any(name in CACHE_NAMES for name in forward_names(module))
    )  # fmt: skip
    if not is_encoder_decoder(model):
        return {"decoder": [module for path, module in found if not _CROSS.search(_below_root(path))]}
    encoder = set(model.get_encoder().modules())
    groups: dict[str, list[nn.Module]] = {name: [] for name in GROUPS}
    for path, module in found:
        group = "encoder" if module in encoder else ("cross" if _CROSS.search(_below_root(path)) else "decoder")
        groups[group].append(module)
    return {group: modules for group, modules in groups.items() if modules}


def find_cacheless(model: nn.Module) -> list[nn.Module]:
    """The self-attentions that take no cache and are computed by transformers' registry of functions, in order."""
    from pyfastpeft.methods.prefix_tuning.interface import uses_interface

    found = innermost((path, module) for path, module in named_originals(model) if uses_interface(module))
    return [module for path, module in found if not _CROSS.search(_below_root(path))]


def layer_number(module: nn.Module) -> int | None:
    """Which layer an attention says it is of; None for other modules."""
    return getattr(module, "layer_idx", getattr(module, "layer_id", None))


def _below_root(path: str) -> str:
    return path.rpartition(".layers.")[2] or path


def extended_mask(mask: torch.Tensor | None, rows: int, module: nn.Module, queries: int, cache: Any) -> Any:
    """The attention's mask with `rows` more keys in front, all to be seen.

    None stays None where it means that all is seen. Where it means causal attention (torch's, aligned to the first key)
    the mask is written out: [1, 1, T, v + keys].
    """
    if mask is None:
        flash = "flash" in str(getattr(getattr(module, "config", None), "_attn_implementation", ""))
        if queries == 1 or flash or not getattr(module, "is_causal", True):
            return None  # FlashAttention aligns causal attention to the last key
        keys = queries if cache is None else _key_count(cache, queries, module)
        device = next(module.parameters()).device
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
        return F.pad(seen, (rows, 0), value=True)[None, None]
    if not isinstance(mask, torch.Tensor):
        raise NotImplementedError(
            f"prefix tuning cannot lengthen a {type(mask).__name__}; load the model with attn_implementation='sdpa' or "
            "'eager'"
        )
    if mask.dtype == torch.bool:
        hides = type(module).__module__.endswith("modeling_mpt")  # whose masks are true where nothing is to be seen
        return F.pad(mask, (rows, 0), value=not hides)
    return F.pad(mask, (rows, 0), value=1 if mask.dim() == 2 else 0)  # a 2-D mask keeps, a 4-D one is added


def _key_count(cache: Any, queries: int, module: nn.Module) -> int:
    half = getattr(cache, "self_attention_cache", cache)
    return half.get_mask_sizes(queries, layer_number(module))[0]


def extended_alibi(
    alibi: torch.Tensor, mask: torch.Tensor | None, rows: int, module: nn.Module
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """ALiBi with `rows` more keys before position 0, at -rows … -1, and the mask that extended_mask() made beside it.

    alibi   [B · heads, 1, keys] (BLOOM), or [B, heads, 1, keys] (Falcon, whose mask has it once more, scaled: there the
            prefix's part is written into the mask's front as well)
    """
    build = getattr(sys.modules[type(module).__module__], "build_alibi_tensor", None)
    if alibi.dim() not in (3, 4) or build is None:
        raise NotImplementedError(
            f"prefix tuning does not know how {type(module).__name__} uses ALiBi; use prompt tuning, or a method that "
            "adapts layers"
        )
    slopes = build(torch.ones(1, 2, device=alibi.device), module.num_heads, torch.float32)[:, :, 1]  # [heads, 1]
    front = (slopes * torch.arange(-rows, 0, device=alibi.device)).to(alibi.dtype)  # [heads, rows]
    if alibi.dim() == 3:
        return torch.cat([front.repeat(len(alibi) // len(front), 1)[:, None], alibi], dim=2), mask
    front = front[None, :, None]
    if mask is not None:
        scaled = (front / math.sqrt(module.head_dim)).to(mask.dtype)
        mask = torch.cat([scaled.expand(*mask.shape[:3], -1), mask[..., rows:]], dim=3)
    return torch.cat([front.expand(len(alibi), -1, -1, -1), alibi], dim=3), mask


def check_implementation(model: nn.Module) -> None:
    """Raises ValueError for an attention implementation whose masks cannot be lengthened."""
    chosen = str(getattr(getattr(model, "config", None), "_attn_implementation", None))
    if "flex" in chosen:
        raise ValueError(
            f"PrefixTuningConfig: the model's attention is {chosen}, whose block masks cannot be lengthened by a prefix; "
            "load it with attn_implementation='sdpa' or 'eager', or call model.set_attn_implementation('sdpa')"
        )
