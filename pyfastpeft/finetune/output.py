"""The output folder of a run: what may be in it before, what is written into it, and run.json."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyfastpeft.finetune.checkpoint import FOLDER, TrainerState, list_checkpoints, load_state
from pyfastpeft.finetune.config import FinetuneConfig
from pyfastpeft.finetune.errors import ConfigError, OutputError
from pyfastpeft.finetune.files import (
    TEMPORARY,
    move_files,
    prepare_output,
    read_json,
    reason,
    remove_leftovers,
    sync_tree,
    write_json,
)

RUN = "run.json"
METRICS = "metrics.csv"
PLOT = "loss.png"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
OURS = (RUN, METRICS, PLOT, FOLDER, *ADAPTER_FILES)


class OutputFolder:
    """Decides how a run begins in its output folder and writes run.json there."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self.path = Path(config.output).expanduser()
        self.record: dict[str, Any] = {}
        self.earlier: dict[str, Any] | None = None
        self.checkpoint: Path | None = None
        self.state = TrainerState()

    def open(self) -> list[str]:
        """Checks the folder against the options, changing nothing but leftovers; returns notes.

        Raises ConfigError where it holds an earlier run and the options do not say what to do with it, or where a run
        is to be resumed with other options; OutputError where the folder or the checkpoint cannot be used.
        """
        config = self.config
        prepare_output(self.path)
        remove_leftovers(self.path)
        if (self.path / FOLDER).is_dir():
            remove_leftovers(self.path / FOLDER)
        present = [name for name in OURS if (self.path / name).exists()]
        self.earlier = read_json(self.path / RUN)
        resume = config.resume or config.resume_from is not None
        if not present and config.resume_from is None:
            return [f"nothing to resume in {self.path}: starting from the beginning"] if resume else []
        if config.overwrite:
            return []
        if not resume:
            raise ConfigError(
                f"output folder {self.path} holds an earlier run ({', '.join(present)}); --resume goes on with it, "
                "--overwrite replaces it, or choose another --output"
            )
        if self.earlier is None:
            raise OutputError(
                f"{self.path / RUN} is missing or unreadable, so the run in {self.path} cannot be resumed; "
                "--overwrite replaces it"
            )
        if differences := config.differences(self.earlier.get("options", {})):
            raise ConfigError(
                f"the run in {self.path} was made with other options ({'; '.join(differences)}); resume it with its "
                f"own ones (they are in {RUN}), or use --overwrite or another --output"
            )
        if config.resume_from is not None:
            self.checkpoint = Path(config.resume_from).expanduser()
            if not self.checkpoint.is_dir():
                raise ConfigError(f"--resume-from: expected a checkpoint folder, got {config.resume_from!r}")
        else:
            checkpoints = list_checkpoints(self.path)
            self.checkpoint = checkpoints[-1] if checkpoints else None
        if self.checkpoint is None:
            return [f"no checkpoint in {self.path} yet: starting from the beginning"]
        self.state = load_state(self.checkpoint)
        return [f"resuming from {self.checkpoint} (step {self.state.step})"]

    def begin(self, data: dict[str, str], resolved: dict[str, Any]) -> None:
        """Checks that a resumed run has the same data and sizes, clears a replaced run, and writes run.json."""
        if self.checkpoint is not None and self.earlier is not None:
            for kind, now in (("data", data), ("resolved", resolved)):
                before = self.earlier.get(kind, {})
                for name, value in now.items():
                    if before.get(name) != value:
                        raise ConfigError(
                            f"the run in {self.path} cannot be resumed exactly: {name} was {before.get(name)}, now "
                            f"it is {value}"
                            + (" (SHA-256: the file has changed)" if kind == "data" else "")
                            + "; restore it, or use --overwrite"
                        )
        else:
            self._clear()
        self.record = {
            "format": 1,
            "status": "running",
            "base_model": self.config.model,
            "options": self.config.to_dict(),
            "data": data,
            "resolved": resolved,
            "versions": versions(),
        }
        self.write()

    def write(self, **values: Any) -> None:
        self.record.update(values)
        try:
            write_json(self.path / RUN, self.record)
        except OSError as error:
            raise OutputError(f"{self.path / RUN} could not be written: {reason(error)}") from error

    def save_adapter(self, save: Callable[[str], Any]) -> None:
        """The final adapter, beside run.json: written and synced in a folder of its own, then moved file by file."""
        folder: Path | None = None
        try:
            folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self.path))
            save(str(folder))
            sync_tree(folder)
            move_files(folder, self.path)
        except Exception as error:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise OutputError(
                f"the adapter could not be written to {self.path}: {reason(error)}; the last checkpoint in "
                f"{self.path / FOLDER} holds the same weights"
            ) from error

    def _clear(self) -> None:
        """Removes what a replaced run left, and nothing else of the folder."""
        for name in OURS:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Versions that decide a run's bits."""
    from importlib.metadata import PackageNotFoundError, version

    result = {"python": platform.python_version()}
    for name in ("pyfastpeft", "torch", "transformers", "safetensors", "numpy"):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = "not installed as a package"
    return result
