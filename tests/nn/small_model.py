"""A model with one of everything quantize_model meets."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, d=64):
        super().__init__()
        self.q_proj, self.down_proj = nn.Linear(d, d), nn.Linear(d, 2 * d, bias=False)

    def forward(self, x):
        return self.down_proj(self.q_proj(x))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 64))


class Model(nn.Module):
    def __init__(self, tie=False):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.experts = Experts()
        self.conv = nn.Conv1d(4, 4, 3)
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 100, bias=False)
        if tie:
            self.lm_head.weight = self.embed.weight


def make(**kwargs):
    torch.manual_seed(0)
    return Model(**kwargs)


def kinds(model):
    return {name: type(module) for name, module in model.named_modules()}
