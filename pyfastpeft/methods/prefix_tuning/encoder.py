"""The networks that hold a prefix: the keys and values themselves, or embeddings and an MLP that computes them.

A prefix [v, columns] has, for each attention in order, d columns of keys and then d of values; a head's columns lie
together. An encoder-decoder has three groups of attentions, one after the other: encoder, decoder, cross.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class PrefixEncoder(nn.Module):
    """e [v, d] -> W₂ tanh(W₁ e + b₁) + b₂ [v, 2 L d], for one group of L attentions; names and draws as in PEFT."""

    def __init__(self, rows: int, width: int, hidden: int, attentions: int, zero: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)
        self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 2 * attentions * width))
        if zero:
            nn.init.zeros_(self.transform[-1].weight)
            nn.init.zeros_(self.transform[-1].bias)

    def forward(self) -> torch.Tensor:
        return self.transform(self.embedding.weight)

    def columns(self, begin: int, end: int) -> torch.Tensor:
        """forward()[:, begin:end], computing only these."""
        hidden = self.transform[1](self.transform[0](self.embedding.weight))
        last = self.transform[2]
        return F.linear(hidden, last.weight[begin:end], last.bias[begin:end])


class PrefixEncoders(nn.Module):
    """The PrefixEncoder of each group of an encoder-decoder, side by side: nothing is shared between them."""

    def __init__(self, groups: dict[str, nn.Module]) -> None:
        super().__init__()
        self.groups = nn.ModuleDict(groups)

    def forward(self) -> torch.Tensor:
        return torch.cat([group() for group in self.groups.values()], dim=1)

    def columns(self, begin: int, end: int) -> torch.Tensor:
        for group in self.groups.values():
            size = group.transform[-1].out_features
            if begin < size:
                return group.columns(begin, end)
            begin, end = begin - size, end - size
        raise IndexError(f"columns {begin} to {end} lie behind the last group")
