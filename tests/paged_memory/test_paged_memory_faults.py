"""Disks that are full, broken or gone: a named error, no content lost, and the same call succeeds when the disk does."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pyfastpeft._native import _C
from pyfastpeft.paged_memory import PagedMemory, SpillError

PAGE = 4096


def _memory(folder, frames, pages=0, **options):
    memory = PagedMemory(frames * PAGE, folder, page_bytes=PAGE, **options)
    memory.add_pages(pages)
    return memory


@pytest.fixture
def filled(tmp_path, content):
    memory = _memory(tmp_path, 3, 10, look_ahead=1, io_threads=1)
    pages = content(memory)
    for page in range(10):
        pages.put(page, page + 1)
    return memory, pages


def _intact(pages, n=10):
    return all(pages.is_all(page, page + 1) for page in range(n))


@pytest.mark.parametrize("op", ["allocate", "open"])
def test_a_full_disk_is_found_before_anything_changes(tmp_path, content, faults, op):
    memory = _memory(tmp_path, 4, 4)
    pages = content(memory)
    for page in range(4):
        pages.put(page, page + 1)
    faults(op, errno.ENOSPC)
    with pytest.raises(SpillError, match=str(tmp_path)) as raised:
        memory.add_pages(3)
    assert raised.value.errno == errno.ENOSPC and "No space left" in str(raised.value)
    assert memory.stats()["pages"] == 4 and _intact(pages, 4)
    assert list(memory.add_pages(3)) == [4, 5, 6]  # the disk has room again
    pages.put(6, 9)
    assert _intact(pages, 4)


def test_a_disk_that_is_really_full(tmp_path):
    """The limit on file sizes stands in for a small disk."""
    import resource
    import signal

    former, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    memory = _memory(tmp_path, 2, 2)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 * PAGE, former[1]))
        memory.add_pages(2)
        with pytest.raises(SpillError, match="no room for a spill file") as raised:
            memory.add_pages(20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)
    assert raised.value.errno == errno.EFBIG and memory.stats()["pages"] == 4
    memory.add_pages(20)


def test_a_failed_read_is_raised_and_can_be_tried_again(filled, faults):
    memory, pages = filled
    for attempt in range(3):
        absent = next(page for page, there in enumerate(memory.resident()) if not there)
        faults("read", errno.EIO, times=attempt + 1)
        for _ in range(attempt + 1):
            with pytest.raises(SpillError, match="reading") as raised:
                pages.get(absent)
            assert raised.value.errno == errno.EIO
        assert pages.is_all(absent, absent + 1)
    assert _intact(pages) and memory.stats()["held_pages"] == 0


def test_a_failed_write_keeps_the_page_in_memory(filled, faults):
    memory, pages = filled
    for page in range(3):
        pages.put(page, 100)
    faults("write", errno.EIO, times=-1)  # for good
    for _ in range(3):
        with pytest.raises(SpillError, match="writing") as raised:
            pages.get(8)
        assert raised.value.errno == errno.EIO
    _C.clear_spill_faults()
    assert pages.is_all(8, 9)
    assert all(pages.is_all(page, 100) for page in range(3))
    assert all(pages.is_all(page, page + 1) for page in range(3, 10))


@pytest.mark.parametrize("op", ["read", "write"])
def test_what_failed_before_somebody_asked_is_made_again_and_not_reported(filled, faults, op):
    """A transfer under way whose cause of failure is gone when a caller comes: its error would be news of the past."""
    memory, pages = filled
    if op == "read":
        assert _intact(pages)  # what is in memory now is clean, and goes without a write
    absent = next(page for page, there in enumerate(memory.resident()) if not there)
    memory.set_order([absent, *(page for page in range(10) if page != absent)])
    faults(op, errno.EIO, seconds=0.3)
    memory.prefetch()
    time.sleep(0.1)  # the transfer has begun
    _C.clear_spill_faults()
    assert pages.is_all(absent, absent + 1)
    assert _intact(pages) and memory.stats()["held_pages"] == 0


def test_enospc_on_a_write_is_named(filled, faults):
    memory, pages = filled
    for page in range(3):
        pages.put(page, page + 1)
    faults("write", errno.ENOSPC)
    with pytest.raises(SpillError) as raised:
        pages.get(8)
    assert raised.value.errno == errno.ENOSPC and _intact(pages)


@pytest.mark.parametrize("error", [errno.EINTR, 0])
def test_interrupted_and_short_transfers_are_carried_on(tmp_path, content, faults, error):
    memory = PagedMemory(4 * 8192, tmp_path, page_bytes=8192)
    memory.add_pages(10)
    pages = content(memory)
    for op in ("read", "write"):
        faults(op, error, after=1, times=40)
    for page in range(10):
        pages.put(page, page + 1, n=5000)
        pages.put(page, 50 + page, offset=5000)
    for page in range(10):
        assert pages.get(page) == bytes([page + 1]) * 5000 + bytes([50 + page]) * 3192


def test_a_read_ahead_that_fails_is_no_error_until_somebody_asks(filled, faults, content):
    memory, pages = filled
    resident = [page for page, there in enumerate(memory.resident()) if there]
    absent = [page for page in range(10) if page not in resident]
    faults("read", errno.EIO)
    memory.set_order([absent[0], *resident[:1]])
    memory.prefetch()
    assert pages.is_all(resident[-1], resident[-1] + 1)
    try:
        assert pages.is_all(absent[0], absent[0] + 1)
    except SpillError:  # it asked while the read ahead was under way: then the failure is its own
        assert pages.is_all(absent[0], absent[0] + 1)
    assert _intact(pages)


def test_a_folder_that_vanishes(tmp_path, content):
    folder = tmp_path / "spill"
    folder.mkdir()
    memory = _memory(folder, 3, 10)
    before = _memory(folder, 2, 2)  # has no file yet
    pages = content(memory)
    shutil.rmtree(folder)
    memory.add_pages(5)  # an open file outlives its folder
    for page in range(15):
        pages.put(page, page + 1)
    assert _intact(pages, 15)
    with pytest.raises(SpillError) as raised:
        before.add_pages(5)
    assert raised.value.errno == errno.ENOENT and before.stats()["pages"] == 2


def test_two_in_one_folder(tmp_path, content):
    both = [content(_memory(tmp_path, 2, 8)) for _ in range(2)]
    for page in range(8):
        for i, pages in enumerate(both):
            pages.put(page, 10 * i + page + 1)
    for page in range(8):
        for i, pages in enumerate(both):
            assert pages.is_all(page, 10 * i + page + 1)
    assert os.listdir(tmp_path) == []


def test_two_processes_in_one_folder(tmp_path, content):
    pages = content(_memory(tmp_path, 2, 8))
    for page in range(8):
        pages.put(page, page + 1)
    script = f"""
    import ctypes
    from pyfastpeft.paged_memory import PagedMemory
    memory = PagedMemory(8192, {str(tmp_path)!r}, page_bytes=4096)
    memory.add_pages(8)
    for cycle in range(3):
        for page in range(8):
            address = memory.acquire(page)
            assert ctypes.string_at(address, 4096) == bytes([100 + page if cycle else 0]) * 4096
            ctypes.memset(address, 100 + page, 4096)
            memory.release(page, True)
    """
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 0 and _intact(pages, 8) and os.listdir(tmp_path) == []


def test_spill_error_is_an_os_error():
    assert issubclass(SpillError, OSError) and SpillError.__module__ == "pyfastpeft.paged_memory"
