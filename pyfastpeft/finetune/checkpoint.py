"""Checkpoints of a run: checkpoints/step-N/ holds the adapter (PEFT's files), optimizer.pt and trainer_state.json.

A checkpoint appears whole, by one rename, or not at all; older ones are removed only after that. Nothing in it is
executed when it is read: the optimizer state is loaded with torch's weights-only unpickler.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pyfastpeft.finetune.errors import OutputError
from pyfastpeft.finetune.files import new_folder, read_json, reason, write_json, write_stream

STATE = "trainer_state.json"
OPTIMIZER = "optimizer.pt"
FOLDER = "checkpoints"


@dataclass
class TrainerState:
    """Where a run stands. Data order, dropout and learning rate are functions of `step` and the options: this is all
    that a resumption needs beside the weights and the optimizer's state."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # input tokens trained on, without padding
    seconds: float = 0.0  # of training and evaluation, over all parts of the run
    evaluated: int = -1  # the step at which the last evaluation was made
    skipped_steps: int = 0  # float16 only: steps whose scaled gradients overflowed


def save_checkpoint(
    output: Path,
    state: TrainerState,
    *,
    save_adapter: Callable[[str], Any],
    optimizer: torch.optim.Optimizer,
    names: list[str],
    scaler: dict[str, Any] | None,
    keep_last: int,
) -> Path:
    """Writes checkpoints/step-N and removes the oldest beyond `keep_last`.

    Raises OutputError (a full disk, no permission): the earlier checkpoints are then untouched, and named.
    """
    target = output / FOLDER / f"step-{state.step}"
    try:
        with new_folder(target, f"the checkpoint of step {state.step}", replace=True) as folder:
            save_adapter(str(folder))
            content = {"optimizer": optimizer.state_dict(), "names": names, "scaler": scaler}
            write_stream(folder / OPTIMIZER, lambda file: _save(content, file))
            write_json(folder / STATE, asdict(state))
    except OutputError as error:
        earlier = list_checkpoints(output)
        kept = (
            f"the previous checkpoint {earlier[-1]} is intact; go on later with --resume"
            if earlier
            else "there is none yet"
        )
        raise OutputError(f"{error}. Training stopped; {kept}") from error
    for old in list_checkpoints(output)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)  # a leftover costs space only
    return target


class _Writer:
    """A file for torch.save, which reports a full disk by a position in a zip file: this one knows the reason."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(content: dict[str, Any], file: BinaryIO) -> None:
    """torch.save as it goes: a paged optimizer's state may be larger than memory."""
    writer = _Writer(file)
    try:
        torch.save(content, writer)
    except Exception:
        if writer.error is not None:
            raise writer.error from None
        raise


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoint folders of an output folder, oldest first."""
    found = []
    for path in (output / FOLDER).glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found)]


def load_state(checkpoint: Path) -> TrainerState:
    """trainer_state.json of a checkpoint; OutputError where the folder is no complete checkpoint."""
    values = read_json(checkpoint / STATE)
    try:
        state = TrainerState(**values) if values is not None else None
    except TypeError:
        state = None
    numbers = state is not None and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and v >= -1 for v in asdict(state).values()
    )
    missing = [
        name
        for name in (STATE, OPTIMIZER, "adapter_config.json", "adapter_model.safetensors")
        if not (checkpoint / name).is_file()
    ]
    if missing or state is None or not numbers:
        what = f"{', '.join(missing)} missing" if missing else f"{STATE} is not readable"
        raise OutputError(
            f"{checkpoint} is no complete checkpoint: {what}; name another one with --resume-from, or remove the "
            "folder and use --resume for the newest of the others"
        )
    return state


def load_optimizer(
    checkpoint: Path, optimizer: torch.optim.Optimizer, names: list[str], device: torch.device
) -> dict[str, Any] | None:
    """Puts the saved state into `optimizer`; returns the loss scaler's state. OutputError where it does not fit."""
    path = checkpoint / OPTIMIZER
    try:
        # mapped: what a paged optimizer takes over need not be in memory as a whole
        saved = torch.load(path, map_location=device, weights_only=True, mmap=device.type == "cpu")
        saved_names, state, scaler = saved["names"], saved["optimizer"], saved["scaler"]
    except Exception as error:  # a truncated or tampered file: zip, pickle and key errors
        raise OutputError(f"{path} cannot be read: {reason(error).splitlines()[0]}; use another checkpoint") from error
    if saved_names != names:
        different = next((pair for pair in zip(saved_names, names, strict=False) if pair[0] != pair[1]), None)
        raise OutputError(
            f"{path} belongs to another model: it has {len(saved_names)} trained tensors, this run {len(names)}"
            + (f"; the first that differs is {different[0]}, here {different[1]}" if different else "")
        )
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, RuntimeError) as error:
        raise OutputError(f"{path} does not fit this optimizer: {error}") from error
    return scaler
