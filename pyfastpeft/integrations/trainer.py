"""Checkpoints of transformers' Trainer that hold the adapter alone.

The Trainer knows Hugging Face's own PeftModel only. Any other model it saves whole: the frozen base in every checkpoint,
and an error where two of its weights are tied.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pyfastpeft.peft_model import PeftModel


class AdapterCheckpoints:
    """A mixin for transformers' Trainer and what derives from it:

        class Trainer(pyfastpeft.integrations.AdapterCheckpoints, transformers.Trainer):
            pass

    Checkpoints of a PeftModel are then what its save_pretrained() writes, beside the Trainer's own files for optimizer,
    schedule and random numbers; resume_from_checkpoint and load_best_model_at_end read the adapters back. Other models
    are the Trainer's affair as ever.
    """

    def _adapted(self) -> PeftModel | None:
        from pyfastpeft.peft_model import PeftModel

        model = self.accelerator.unwrap_model(self.model)
        return model if isinstance(model, PeftModel) else None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self._adapted()
        if model is None:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = output_dir if output_dir is not None else self.args.output_dir
        os.makedirs(folder, exist_ok=True)
        model.save_pretrained(folder, state_dict=state_dict)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        adapted = self._adapted()
        if adapted is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapters(adapted, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        adapted = self._adapted()
        if adapted is None:
            super()._load_best_model()
        else:
            load_adapters(adapted, self.state.best_model_checkpoint)


def load_adapters(model: PeftModel, folder: str | os.PathLike) -> None:
    """The values that save_pretrained() wrote for every adapter of the model; which of them are active stays as it is.

    Raises ValueError naming the adapter that the folder has no files for; the model is then left as it was.
    """
    folders = {name: Path(folder) / ("" if name == "default" else name) for name in model.peft_config}
    for name, place in folders.items():
        if not (place / "adapter_config.json").is_file():
            raise ValueError(
                f"{folder} has no checkpoint of adapter {name!r}: there is no {place / 'adapter_config.json'}"
            )
    active, training = model.active_adapters, model.training
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, place in folders.items():
        model.load_adapter(place, name, is_trainable=name in active)
    model.set_adapter(active)
    model.train(training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
