"""Atomic files: whole or not there, whatever fails; the reason in words."""

import errno
import os
import subprocess
import sys
import textwrap

import pytest

from pyfastpeft.finetune import OutputError
from pyfastpeft.finetune.files import (
    TEMPORARY,
    move_files,
    new_folder,
    read_json,
    reason,
    remove_leftovers,
    write_bytes,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces(tmp_path):
    write_bytes(tmp_path / "a", b"one")
    write_bytes(tmp_path / "a", b"two")
    write_json(tmp_path / "b.json", {"x": "é"})
    assert (tmp_path / "a").read_bytes() == b"two" and read_json(tmp_path / "b.json") == {"x": "é"}
    assert names(tmp_path) == ["a", "b.json"]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_bytes(tmp_path / "a", b"one")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_bytes(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one" and names(tmp_path) == ["a"]


def test_folder_appears_whole_or_not_at_all(tmp_path):
    with new_folder(tmp_path / "new", "it") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "new").exists()
    assert names(tmp_path / "new") == ["x"]
    with (
        pytest.raises(OutputError, match="it could not be written to .*other.*boom"),
        new_folder(tmp_path / "other", "it"),
    ):
        raise RuntimeError("boom")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "other", "it"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["new"]


def test_folder_replaced_only_when_the_new_one_is_whole(tmp_path):
    for content in ("1", "2"):
        with new_folder(tmp_path / "new", "it", replace=True) as folder:
            (folder / content).write_text(content)
    assert names(tmp_path / "new") == ["2"]
    with pytest.raises(OutputError), new_folder(tmp_path / "new", "it", replace=True):
        raise OSError(errno.EDQUOT, "quota")
    assert names(tmp_path / "new") == ["2"] and names(tmp_path) == ["new"]
    with pytest.raises(OutputError), new_folder(tmp_path / "new", "it") as folder:
        (folder / "x").write_text("not over an existing one")
    assert names(tmp_path / "new") == ["2"]


def test_move_files_and_leftovers(tmp_path):
    source, target = tmp_path / "s", tmp_path / "t"
    source.mkdir()
    target.mkdir()
    (source / "a").write_text("new")
    (target / "a").write_text("old")
    (target / "b").write_text("kept")
    move_files(source, target)
    assert (target / "a").read_text() == "new" and names(target) == ["a", "b"] and not source.exists()
    (target / f"{TEMPORARY}x").mkdir()
    (target / f"{TEMPORARY}y").write_text("")
    remove_leftovers(target)
    assert names(target) == ["a", "b"]


def test_reason_names_the_way_out():
    assert "disk is full" in reason(OSError(errno.ENOSPC, "x"))
    assert "disk is full" in reason(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert "quota" in reason(OSError(errno.EDQUOT, "x"))
    assert "no permission" in reason(PermissionError(errno.EACCES, "x"))
    assert reason(RuntimeError("plain")) == "plain" and reason(ValueError()) == "ValueError"


def test_read_json_of_anything_else(tmp_path):
    for content in (b"", b"{", b"[1]", b"\xff"):
        (tmp_path / "a").write_bytes(content)
        assert read_json(tmp_path / "a") is None
    assert read_json(tmp_path / "missing") is None


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_disk_that_really_refuses_the_bytes(tmp_path):
    """A process that may write no file larger than 64 KiB: the write fails half-way, the earlier folder stays whole."""
    script = f"""
        import resource
        from pathlib import Path
        from pyfastpeft.finetune.files import new_folder
        from pyfastpeft.finetune import OutputError
        import torch
        from safetensors.torch import save_file
        out = Path({str(tmp_path)!r})
        with new_folder(out / "step-1", "checkpoint") as folder:
            save_file({{"x": torch.zeros(100_000)}}, folder / "model.safetensors")
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            with new_folder(out / "step-2", "checkpoint") as folder:
                save_file({{"x": torch.zeros(100_000)}}, folder / "model.safetensors")
        except OutputError as error:
            print("refused:", error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("refused: checkpoint could not be written"), done.stdout + done.stderr
    assert names(tmp_path) == ["step-1"]
    assert (tmp_path / "step-1" / "model.safetensors").stat().st_size > 400_000
