"""Files that are whole or not there: written under a temporary name beside their place, synced, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pyfastpeft.finetune.errors import OutputError

TEMPORARY = ".tmp-"  # how the name of an unfinished file or folder begins


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`, atomically."""
    write_stream(path, lambda file: file.write(data))


def write_stream(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    """Replaces `path` by what fill(file) writes, atomically."""
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.name, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where the file is missing or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


@contextmanager
def new_folder(path: Path, what: str, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` when the block ends well; replace: an existing one goes then.

    Whatever fails inside, the temporary folder goes and OutputError names `what`, the reason and that nothing else
    was touched.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, suffix=path.name, dir=path.parent))
        yield temporary
        sync_tree(temporary)
        temporary.chmod(0o755)
        old = None
        if replace and path.exists():
            old = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
            os.rename(path, old / path.name)
        os.rename(temporary, path)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        sync_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, Exception):
            raise OutputError(f"{what} could not be written to {path}: {reason(error)}") from error
        raise


def move_files(source: Path, target: Path) -> None:
    """Moves every file of `source` into `target`, each replacing its namesake atomically; `source` is removed."""
    for file in sorted(source.iterdir()):
        os.replace(file, target / file.name)
    source.rmdir()
    sync_folder(target)


def sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable, on systems where a folder can be synced."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process left unfinished in `folder`."""
    for path in folder.glob(TEMPORARY + "*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def reason(error: BaseException) -> str:
    """What went wrong in words, with the way out where the cause is known."""
    text = str(error) or type(error).__name__
    number = getattr(error, "errno", None)
    if number == errno.ENOSPC or "No space left" in text or "os error 28" in text:
        return f"{text} (the disk is full: free some space, or choose another output folder)"
    if number == errno.EDQUOT or "os error 122" in text:
        return f"{text} (the disk quota is used up: free some space, or choose another output folder)"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) or "os error 13" in text:
        return f"{text} (no permission to write there: choose another output folder)"
    return text


def prepare_output(folder: Path) -> None:
    """Creates the output folder and proves that files can be written in it; OutputError otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder")
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
        os.close(handle)
        os.unlink(name)
    except FileExistsError as error:
        raise OutputError(f"output {folder}: expected a folder, got a file; choose another output folder") from error
    except OSError as error:
        raise OutputError(f"output folder {folder} cannot be written: {reason(error)}") from error
