"""`--init eva`: A and the ranks of the layers from the training data, before the first step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pyfastpeft.finetune.config import FinetuneConfig
from pyfastpeft.finetune.data import Sequences, step_seed
from pyfastpeft.finetune.errors import ConfigError
from pyfastpeft.methods.lora.eva import initialize_lora_eva_weights


class _Batches:
    """The training sequences in an order that the seed gives, a batch at a time; EVA stops when its layers have settled."""

    def __init__(self, config: FinetuneConfig, sequences: Sequences, pad: int) -> None:
        self.sequences, self.pad, self.size = sequences, pad, config.batch_size
        generator = torch.Generator().manual_seed(step_seed(config.seed, 0, "eva"))
        self.order = torch.randperm(len(sequences), generator=generator).tolist()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for begin in range(0, len(self.order), self.size):
            yield self.sequences.batch(self.order[begin : begin + self.size], self.pad)


def initialise_by_eva(model: torch.nn.Module, config: FinetuneConfig, sequences: Sequences, pad: int) -> str:
    """--init eva: A and the ranks from the training data. Returns what to say of it; ConfigError where it cannot be."""
    try:
        initialize_lora_eva_weights(model, _Batches(config, sequences, pad))
    except ValueError as error:
        raise ConfigError(f"--init eva: {error}") from error
    lora = model.peft_config[model.active_adapter]
    ranks = sorted(lora.rank_pattern.get(path, lora.r) for path in lora.target_modules)
    return f"EVA: {len(ranks)} layers have ranks from {ranks[0]} to {ranks[-1]}, {sum(ranks)} together"
