"""Fine-tuning as one job: `finetune(FinetuneConfig(model=..., data=..., output=...))`, what `pyfastpeft finetune`
runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyfastpeft.finetune.config import FinetuneConfig, FinetuneResult
from pyfastpeft.finetune.errors import ConfigError, DataError, ModelError, NonFiniteLossError, OutputError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "ConfigError",
    "DataError",
    "FinetuneConfig",
    "FinetuneResult",
    "ModelError",
    "NonFiniteLossError",
    "OutputError",
    "finetune",
]


def finetune(config: FinetuneConfig, *, console: Console | None = None) -> FinetuneResult:
    """Fine-tunes a causal language model by LoRA or QLoRA and writes the result into `config.output`.

    Minimises the mean of −log p(token | tokens before) over the target tokens of each optimizer step (micro-batches are
    weighted by their number of targets, so gradient accumulation changes nothing but memory).

        result = finetune(FinetuneConfig(model="meta-llama/Llama-3.2-1B", data="notes.jsonl", output="out"))

    config   every option; see FinetuneConfig
    console  a rich Console for progress and notes; None runs silently

    Writes into `config.output`, each file or folder atomically: adapter_config.json and adapter_model.safetensors
    (PEFT's format), checkpoints/step-N/, metrics.csv, loss.png, run.json. Returns a FinetuneResult; its status is
    "interrupted" where SIGINT or SIGTERM asked to stop (handled while training in the main thread): a checkpoint is
    then written, and the same call with `resume=True` goes on exactly there (the same losses, bit for bit on one
    machine). torch's random state is restored at the end; `threads` stays set.

    Raises ConfigError (an option), DataError (a data file), ModelError (the model), OutputError (a file cannot be
    written or read back), NonFiniteLossError (NaN or infinite loss or gradient), each naming the way out.
    Sources: LoRA (Hu et al. 2021), QLoRA (Dettmers et al. 2023).
    """
    from pyfastpeft.finetune.run import run

    return run(config, console)
