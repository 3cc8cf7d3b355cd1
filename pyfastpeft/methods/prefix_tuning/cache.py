"""What an attention gets in place of its cache: one that answers with the prefix before the keys it would give.

The real cache (or none) is asked as ever and never holds the prefix.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


class PrefixedCache:
    """A cache of any kind, or None, seen by one attention.

    keys, values   the prefix [heads, v, head size]
    """

    def __init__(self, cache: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.cache, self.prefix = cache, (keys, values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        return self._with_prefix(keys, values)

    def _with_prefix(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        whole = []
        for prefix, text in zip(self.prefix, (keys, values), strict=True):
            if prefix.shape[0] != text.shape[1] or prefix.shape[2] != text.shape[3]:
                raise ValueError(
                    f"PrefixTuningConfig: the model has {text.shape[1]} heads of {text.shape[3]} keys or values, the prefix "
                    f"{prefix.shape[0]} of {prefix.shape[2]}; say so with num_attention_heads={text.shape[1]} and "
                    f"token_dim={text.shape[1] * text.shape[3]}"
                )
            whole.append(torch.cat([prefix.to(text.dtype).expand(len(text), -1, -1, -1), text], dim=2))
        return whole[0], whole[1]

    def get_seq_length(self, *args, **kwargs) -> Any:
        """With the prefix: relative positions (T5) are counted from its beginning."""
        past = 0 if self.cache is None else self.cache.get_seq_length(*args, **kwargs)
        return past + self.prefix[0].shape[1]

    @property
    def layers(self) -> _PrefixedLayers:
        return _PrefixedLayers(self)


class _PrefixedLayers:
    """cache.layers[i].keys, which cross-attention reads once it has been filled."""

    def __init__(self, cache: PrefixedCache) -> None:
        self._cache = cache

    def __getitem__(self, index: int) -> Any:
        layer = self._cache.cache.layers[index]
        keys, values = self._cache._with_prefix(layer.keys, layer.values)
        return _Layer(keys, values)


class _Layer:
    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values


def prefixed(cache: Any, keys: torch.Tensor, values: torch.Tensor, cross: bool) -> Any:
    """The cache to give to an attention of this kind."""
    pair = hasattr(cache, "cross_attention_cache")
    if not pair and not cross:
        return PrefixedCache(cache, keys, values)
    return _pair_class()(cache if pair else None, keys, values, cross)


@functools.cache
def _pair_class() -> type:
    from transformers import EncoderDecoderCache

    class PrefixedPair(EncoderDecoderCache):
        """An EncoderDecoderCache (models ask whether it is one) whose half for this attention has the prefix."""

        def __init__(self, pair: Any, keys: torch.Tensor, values: torch.Tensor, cross: bool) -> None:
            halves = [None if pair is None else getattr(pair, f"{half}_attention_cache") for half in ("self", "cross")]
            halves[cross] = PrefixedCache(halves[cross], keys, values)
            self.self_attention_cache, self.cross_attention_cache = halves
            self.is_updated = {} if pair is None else pair.is_updated  # shared: what the attention notes is kept

        def get_seq_length(self, *args, **kwargs) -> Any:
            half = self.self_attention_cache
            return 0 if half is None else half.get_seq_length(*args, **kwargs)

    return PrefixedPair
