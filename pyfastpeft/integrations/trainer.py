"""Checkpoints of transformers' Trainer that hold the adapter alone.

The Trainer asks `isinstance(model, peft.PeftModel)` before it saves adapters in place of the whole model, loads them again,
shifts the labels of a smoothed loss, and so on; a model of any other class it saves whole: the frozen base in every
checkpoint, and an error where two of its weights are tied. It has no hook for further classes, and without the package
peft none of that code runs. So the Trainer is taught: from the first PeftModel on, as soon as transformers.trainer is
loaded, five of its names ask whether the model is ours before they do what they always did. For any other model, and in
a process that makes no PeftModel, nothing changes.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pyfastpeft.peft_model import PeftModel

_MODULE = "transformers.trainer"
_TAUGHT = "_knows_pyfastpeft"


class AdapterCheckpoints:
    """A mixin for transformers' Trainer and what derives from it:

        class Trainer(pyfastpeft.integrations.AdapterCheckpoints, transformers.Trainer):
            pass

    The Trainer does this by itself for a PeftModel. The mixin is for a class of one's own with other methods of saving,
    which these then come before.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not save_checkpoint(self, output_dir, state_dict):
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if not load_checkpoint(self, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not load_checkpoint(self, self.state.best_model_checkpoint):
            super()._load_best_model()


def save_checkpoint(trainer: Any, folder: str | None, state_dict: dict | None) -> bool:
    """Writes what save_pretrained() of the Trainer's PeftModel writes, beside the Trainer's own files; False: it has none."""
    model = _adapted(trainer)
    if model is None:
        return False
    if not trainer.args.should_save:
        return True
    folder = folder if folder is not None else trainer.args.output_dir
    os.makedirs(folder, exist_ok=True)
    model.save_pretrained(folder, state_dict=state_dict)
    tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    torch.save(trainer.args, os.path.join(folder, "training_args.bin"))
    return True


def load_checkpoint(trainer: Any, folder: str) -> bool:
    """Reads the adapters of the Trainer's PeftModel back; False: the Trainer has none, or the folder is not
    save_checkpoint()'s (a whole model's, or the sharded files of FSDP and DeepSpeed)."""
    model = _adapted(trainer)
    if model is None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    whole = any((Path(folder) / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))
    if whole and not any(_has_adapter(name, folder) for name in model.peft_config):
        return False
    load_adapters(model, folder)
    return True


def load_adapters(model: PeftModel, folder: str | os.PathLike) -> None:
    """The values that save_pretrained() wrote for every adapter of the model; which of them are active stays as it is.

    Raises ValueError naming the adapter that the folder has no files for; the model is then left as it was.
    """
    for name in model.peft_config:
        if not _has_adapter(name, folder):
            raise ValueError(
                f"{folder} has no checkpoint of adapter {name!r}: there is no "
                f"{_folder_of(name, folder) / 'adapter_config.json'}"
            )
    active, training = model.active_adapters, model.training
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    for name in model.peft_config:
        model.load_adapter(_folder_of(name, folder), name, is_trainable=name in active)
    model.set_adapter(active)
    model.train(training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)


def teach_trainer() -> None:
    """Makes transformers' Trainer know PeftModel: now, or when its module is loaded. Calling it again does nothing."""
    module = sys.modules.get(_MODULE)
    if getattr(module, "Trainer", None) is not None:
        _teach(module)
    elif not any(isinstance(finder, _TrainerFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TrainerFinder())


class _TrainerFinder(importlib.abc.MetaPathFinder):
    """Finds transformers.trainer where it is found without it, and teaches it once it has been executed."""

    def find_spec(self, name: str, path=None, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _teach(module)

        spec.loader.exec_module = exec_module
        return spec


def _teach(module: ModuleType) -> None:
    trainer = module.Trainer
    if _TAUGHT in vars(trainer):
        return
    setattr(trainer, _TAUGHT, True)
    for owner in (module, sys.modules.get(f"{_MODULE}_utils")):
        _precede(owner, "_is_peft_model", lambda model: _ours(model) or None)
    # what it does before FSDP wraps a model is for peft's configs
    _precede(module, "update_fsdp_plugin_peft", lambda model, accelerator: _ours(model) or None)
    _precede(trainer, "_save", lambda self, output_dir=None, state_dict=None: (
        save_checkpoint(self, output_dir, state_dict) or None
    ))  # fmt: skip
    _precede(trainer, "_load_from_checkpoint", lambda self, resume_from_checkpoint, model=None: (
        load_checkpoint(self, resume_from_checkpoint) or None
    ))  # fmt: skip
    _precede(trainer, "_load_best_model", lambda self: load_checkpoint(self, self.state.best_model_checkpoint) or None)


def _precede(owner: Any, name: str, ours: Any) -> None:
    """`owner.name` becomes ours where that gives something else than None, and what it was otherwise."""
    former = getattr(owner, name, None)
    if former is None:
        warnings.warn(
            f"this release of transformers has no {name} in {getattr(owner, '__name__', _MODULE)}: its Trainer may not treat a "
            "PeftModel as one; save adapters with save_pretrained()",
            stacklevel=2,
        )
        return

    @functools.wraps(former)
    def preceded(*args, **kwargs):
        result = ours(*args, **kwargs)
        return former(*args, **kwargs) if result is None else result

    setattr(owner, name, preceded)


def _ours(model: Any) -> bool:
    from pyfastpeft.peft_model import PeftModel

    return isinstance(model, PeftModel)


def _adapted(trainer: Any) -> PeftModel | None:
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return model if _ours(model) else None


def _folder_of(name: str, folder: str | os.PathLike) -> Path:
    return Path(folder) / ("" if name == "default" else name)


def _has_adapter(name: str, folder: str | os.PathLike) -> bool:
    return (_folder_of(name, folder) / "adapter_config.json").is_file()
