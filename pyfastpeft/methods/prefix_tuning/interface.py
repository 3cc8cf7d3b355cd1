"""A prefix for attentions that take no cache (DistilBERT's, ViT's): through transformers' registry of attention functions.

Such an attention makes keys and values itself and hands them to the function that its config names. The prefixed attention
is given a view of its config that names ours; ours puts the prefix before the keys, lengthens the mask, and calls the
function that the config itself names at that moment. The model's config is not touched, so its masks are made as ever.
No position is moved: the text stands where it would stand without a prefix.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from pyfastpeft.methods.prefix_tuning.attention import extended_mask

NAME = "pyfastpeft_prefix"


class PrefixedConfig:
    """A config as one prefixed attention sees it."""

    _attn_implementation = NAME

    def __init__(self, config: Any, holder: Any, index: int) -> None:
        self.original, self.holder, self.index = config, holder, index

    def __getattr__(self, name: str) -> Any:
        if name in ("original", "holder", "index") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.original, name)


def uses_interface(module: nn.Module) -> bool:
    """Whether the module's forward looks its attention function up in transformers' registry."""
    code = getattr(type(module).forward, "__code__", None)
    names = () if code is None else code.co_names
    return "ALL_ATTENTION_FUNCTIONS" in names and "get_interface" in names and hasattr(module, "config")


def hook(module: nn.Module, holder: Any, index: int) -> None:
    """Gives an attention its prefix: attention number `index` of the holder's."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, prefixed_attention)
    module.config = PrefixedConfig(module.config, holder, index)


def unhook(model: nn.Module, holder: Any) -> None:
    """Gives the holder's attentions their configs back."""
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PrefixedConfig) and config.holder is holder:
            module.config = config.original


def prefixed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function that the model chose, over [P_k ; key] and [P_v ; value], each [B, heads, tokens, size]."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = module.config
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config.original._attn_implementation, eager)
    if config.holder.current() is not None:
        keys, values = config.holder.prefix_of(config.index)
        attention_mask = extended_mask(attention_mask, keys.shape[1], module, query.shape[2], None)
        key, value = (
            torch.cat([prefix.to(text.dtype).expand(len(text), -1, -1, -1), text], dim=2)
            for prefix, text in ((keys, key), (values, value))
        )
    return attend(module, query, key, value, attention_mask, **kwargs)
