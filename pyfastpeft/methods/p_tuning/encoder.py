"""PromptEncoder: the network that computes P-tuning's virtual tokens from trained embeddings."""

from __future__ import annotations

import torch
from torch import nn

from pyfastpeft.methods.p_tuning.config import PromptEncoderReparameterizationType


class PromptEncoder(nn.Module):
    """p = MLP(e) or p = MLP(BiLSTM(e)) with e [v, d] trained; p [v, d].

    Names of parameters and the order of their draws are PEFT's: `embedding`, `lstm_head`, `mlp_head`.
    """

    def __init__(
        self, rows: int, width: int, hidden: int, kind: PromptEncoderReparameterizationType, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)
        if kind == PromptEncoderReparameterizationType.LSTM:
            # dropout acts between layers: with one there is nothing to drop, and torch would warn
            p = dropout if layers > 1 else 0.0
            self.lstm_head = nn.LSTM(width, hidden, layers, dropout=p, bidirectional=True, batch_first=True)
            sizes = (2 * hidden, 2 * hidden, width)
        else:
            self.lstm_head = None
            sizes = (width, hidden, hidden, width)
        linears = [nn.Linear(k, n) for k, n in zip(sizes[:-1], sizes[1:], strict=True)]
        self.mlp_head = nn.Sequential(*[part for linear in linears for part in (linear, nn.ReLU())][:-1])

    def forward(self) -> torch.Tensor:
        prompts = self.embedding.weight
        if self.lstm_head is not None:
            prompts = self.lstm_head(prompts[None])[0][0]
        return self.mlp_head(prompts)
