"""A small model with a layer of every kind that LoRA adapts."""

import torch
from torch import nn

LAYERS = ["table", "line", "plane", "grouped", "up", "attn", "cross", "head"]
PARAMETERS = ["experts.up", "experts.down"]
IDS = torch.tensor([[1, 5, 5, 0], [0, 9, 10, 3]])


class Experts(nn.Module):
    """Two stacked Parameters; every expert sees every token."""

    def __init__(self, count, width, inner):
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, inner, width) * 0.3)
        self.down = nn.Parameter(torch.randn(count, width, inner) * 0.3)

    def forward(self, x):
        flat = x.flatten(0, 1)
        parts = [
            nn.functional.silu(flat @ self.up[i].transpose(-1, -2)) @ self.down[i].transpose(-1, -2)
            for i in range(len(self.up))
        ]
        return torch.stack(parts).sum(0).view(x.shape)


class Every(nn.Module):
    """A layer of every kind that LoRA adapts."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.line, self.plane = nn.Conv1d(8, 8, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1, groups=1)
        self.grouped = nn.Conv1d(8, 6, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(8, 8, 3, padding=1, groups=2)
        self.attn, self.cross = (
            nn.MultiheadAttention(8, 2, batch_first=True, **m) for m in ({}, {"kdim": 6, "vdim": 6})
        )
        self.experts = Experts(3, 8, 5)
        self.head = nn.Linear(8, 11)

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.line(x.mT).mT + self.plane(x[:, None]).mean(1)
        x = x + self.up(x.mT).mT
        x = x + self.attn(x, x, x)[0] + self.experts(x)
        other = self.grouped(x.mT).mT
        return self.head(x + self.cross(x, other, other)[0])
