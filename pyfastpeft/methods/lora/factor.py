"""An adapter's A or B as a tensor with a dimension of ranks: how it is made wider, filled, and cut (hotswap, files)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Factor:
    """A or B of an adapter: the tensor holder.<name> (holder[name] of a ParameterDict).

    key            where a file has it, after the layer's path
    axis           its dimension of ranks, rank · each / divide entries in `blocks` equal parts
    parameter      of target_parameters: which of the module's Parameters it belongs to
    """

    key: str
    holder: nn.Module
    name: str
    axis: int
    blocks: int = 1
    each: int = 1
    divide: int = 1
    parameter: str | None = None

    @property
    def tensor(self) -> nn.Parameter:
        return self.holder[self.name] if isinstance(self.holder, nn.ParameterDict) else getattr(self.holder, self.name)

    def path(self, path: str) -> str:
        """What rank_pattern and alpha_pattern know it by, in the layer at `path`."""
        return path if self.parameter is None else f"{path}.{self.parameter}"

    @property
    def rank(self) -> int:
        """As many ranks as there is room for."""
        return self.tensor.shape[self.axis] * self.divide // self.each

    def size(self, rank: int) -> int:
        return rank * self.each // self.divide

    def shape(self, rank: int) -> tuple[int, ...]:
        shape = list(self.tensor.shape)
        shape[self.axis] = self.size(rank)
        return tuple(shape)

    def cut(self, rank: int) -> torch.Tensor:
        """The first ranks of every block."""
        tensor = self.tensor
        if tensor.shape[self.axis] == self.size(rank):
            return tensor
        parts = tensor.detach().unflatten(self.axis, (self.blocks, -1))
        kept = parts.narrow(self.axis + 1, 0, self.size(rank) // self.blocks)
        return kept.flatten(self.axis, self.axis + 1).contiguous()

    @torch.no_grad()
    def write(self, value: torch.Tensor) -> None:
        """Writes a tensor of as many or fewer ranks, the others zero."""
        target = self.tensor
        if target.shape == value.shape:
            target.copy_(value)
            return
        target.zero_()
        parts, new = (each.unflatten(self.axis, (self.blocks, -1)) for each in (target, value))
        parts.narrow(self.axis + 1, 0, new.shape[self.axis + 1]).copy_(new)

    @torch.no_grad()
    def resize(self, rank: int) -> None:
        """Makes it one of more ranks, the new ones zero, in a Parameter of its own."""
        former = self.tensor
        if former.shape[self.axis] == self.size(rank):
            return
        padded = nn.Parameter(former.new_zeros(self.shape(rank)), requires_grad=former.requires_grad)
        if isinstance(self.holder, nn.ParameterDict):
            self.holder[self.name] = padded
        else:
            setattr(self.holder, self.name, padded)
        self.write(former.detach())


class FactorOf(nn.Module):
    """An embedding's A or B, transposed, in the place of a Parameter."""

    bias = None

    def __init__(self, embedding: nn.Module, name: str, factor: str) -> None:
        super().__init__()
        self._of = embedding, name, factor  # in a tuple: the embedding is not a part of this

    @property
    def weight(self) -> torch.Tensor:
        embedding, name, factor = self._of
        return getattr(embedding, f"lora_embedding_{factor}")[name].t()


def set_scaling(scalings: dict, key: Any, value: float) -> None:
    """scalings[key] = value; a tensor is filled."""
    if isinstance(scalings.get(key), torch.Tensor):
        scalings[key].fill_(value)
    else:
        scalings[key] = value
