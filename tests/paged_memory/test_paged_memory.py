"""PagedMemory: contents, budget, what is moved and what is not, threads, forks."""

import os
import random
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from pyfastpeft.paged_memory import PagedMemory, available_memory, page_size_for, parse_bytes, spill_folder

PAGE = 4096


def _memory(folder, frames, pages=0, **options):
    memory = PagedMemory(frames * PAGE, folder, page_bytes=PAGE, **options)
    memory.add_pages(pages)
    return memory


@pytest.mark.parametrize("frames", [2, 3, 5, 12, 20])
@pytest.mark.parametrize("direct", [True, False])
def test_contents_survive_at_every_budget(tmp_path, content, frames, direct):
    memory = _memory(tmp_path, frames, 12, direct_io=direct)
    pages = content(memory)
    memory.set_order(range(12))
    for cycle in range(1, 8):
        for page in range(12):
            assert pages.is_all(page, (cycle - 1) * 16 + page if cycle > 1 else 0), (cycle, page)
            pages.put(page, cycle * 16 + page)
    stats = memory.stats()
    assert stats["peak_resident_pages"] <= frames and stats["held_pages"] == 0
    assert (stats["pages_out"] == 0) == (frames >= 12)
    assert os.listdir(tmp_path) == []


def test_a_part_of_a_page_keeps_the_rest(tmp_path, content):
    memory = _memory(tmp_path, 2, 6)
    pages = content(memory)
    for page in range(6):
        pages.put(page, 7, offset=100, n=50)
    for page in range(6):
        assert pages.get(page) == bytes(100) + b"\7" * 50 + bytes(PAGE - 150)


def test_no_file_while_the_budget_suffices(tmp_path, content):
    memory = _memory(tmp_path, 4, 4)
    for page in range(4):
        content(memory).put(page, 1)
    assert memory.stats()["spill_file_bytes"] == 0
    memory.add_pages(1)
    assert memory.stats()["spill_file_bytes"] == 5 * PAGE


def test_unchanged_pages_are_never_written(tmp_path, content):
    memory = _memory(tmp_path, 3, 10)
    pages = content(memory)
    for page in range(10):
        pages.put(page, page + 1)
    for _ in range(3):
        for page in range(10):
            assert pages.is_all(page, page + 1)
    assert memory.stats()["pages_out"] <= 10


def test_a_known_cycle_keeps_a_part_in_memory(tmp_path, content):
    """40 pages, room for 20: least recently used would read all 40 in each cycle, the order's best is 21."""
    moved = {}
    for order in (True, False):
        memory = _memory(tmp_path, 20, 40)
        pages = content(memory)
        if order:
            memory.set_order(range(40))
        for cycle in range(12):
            if cycle == 2:
                before = memory.stats()["pages_in"]
            for page in range(40):
                pages.put(page, cycle)
        moved[order] = (memory.stats()["pages_in"] - before) / 10
    assert 20 <= moved[True] <= 28 and moved[False] == 40


def test_pages_are_read_before_they_are_asked_for(tmp_path, content):
    memory = _memory(tmp_path, 8, 16, look_ahead=4)
    memory.set_order(range(16))
    pages = content(memory)
    for page in range(16):
        pages.put(page, page)
    before = memory.stats()
    memory.record_events(True)
    for page in range(16):
        for _ in range(500):  # as long as a computation may take
            if memory.resident()[page]:
                break
            time.sleep(0.01)
        pages.put(page, page)
    memory.record_events(False)
    after = memory.stats()
    assert after["pages_in"] - before["pages_in"] >= 8 and after["waits"] - before["waits"] <= 1
    events = memory.events()
    assert sum(kind == "read" for kind, *_ in events) >= 8
    assert all(kind in ("read", "write", "wait") and begin <= end for kind, _, _, begin, end in events)


def test_prefetch_needs_nobody_to_ask(tmp_path, content):
    memory = _memory(tmp_path, 4, 12, look_ahead=3)
    pages = content(memory)
    for page in range(12):
        pages.put(page, page)
    memory.set_order([5, 6, 7, 0, 1])
    before = memory.stats()["acquires"]
    memory.prefetch()
    deadline = threading.Event()
    for _ in range(500):
        if all(memory.resident()[page] for page in (5, 6, 7)):
            break
        deadline.wait(0.01)
    assert all(memory.resident()[page] for page in (5, 6, 7)) and memory.stats()["acquires"] == before
    assert pages.is_all(6, 6)


def test_discarded_pages_read_as_zeros(tmp_path, content):
    memory = _memory(tmp_path, 3, 8)
    pages = content(memory)
    for page in range(8):
        pages.put(page, 9)
    for page in (0, 7):
        memory.discard(page)
        assert pages.is_all(page, 0)
    assert pages.is_all(3, 9)


def test_a_held_page_stays_where_it_is(tmp_path, content):
    memory = _memory(tmp_path, 3, 9)
    pages = content(memory)
    address = memory.acquire(4)
    assert memory.acquire(4) == address
    memory.release(4, False)
    for page in (0, 1, 2, 3, 5, 6, 7, 8):
        pages.put(page, page)
    assert memory.acquire(4) == address
    memory.release(4, False)
    memory.release(4, False)
    with pytest.raises(ValueError, match="nobody holds it"):
        memory.release(4, False)


def test_when_everything_is_held_an_error_says_so(tmp_path):
    memory = _memory(tmp_path, 2, 4)
    memory.acquire(0)
    memory.acquire(1)
    with pytest.raises(RuntimeError, match="all 2 pages of the budget are held"):
        memory.acquire(2)
    assert memory.try_acquire(2) == 0
    memory.release(1, False)
    assert memory.acquire(2)


def test_bad_input(tmp_path):
    memory = _memory(tmp_path, 2, 4)
    for page in (-1, 4):
        for call in (memory.acquire, memory.discard, lambda p: memory.release(p, False)):
            with pytest.raises(ValueError, match=f"page {page}"):
                call(page)
    for order, text in (([0, 4], "names page 4"), ([1, 1], "twice")):
        with pytest.raises(ValueError, match=text):
            memory.set_order(order)
    with pytest.raises(ValueError, match="of a page of"):
        memory.read(0, PAGE - 4, 1, 8)
    with pytest.raises(ValueError, match="multiple of 4096"):
        PagedMemory(1 << 20, tmp_path, page_bytes=5000)


def test_threads_share_one(tmp_path):
    """Each of four threads owns pages and finds in them what it wrote, while they push each other's out."""
    memory = _memory(tmp_path, 5, 24, look_ahead=1)
    errors = []

    def work(number):
        try:
            rng = random.Random(number)
            from ctypes import memset, string_at

            held = {page: 0 for page in range(number, 24, 4)}
            for step in range(300):
                page = rng.choice(list(held))
                address = memory.acquire(page)
                found = string_at(address, PAGE)
                if found != bytes([held[page]]) * PAGE:
                    errors.append((number, step, page))
                write = rng.random() < 0.5
                if write:
                    held[page] = rng.randrange(256)
                    memset(address, held[page], PAGE)
                memory.release(page, write)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and memory.stats()["peak_resident_pages"] <= 5


def test_a_forked_child_gets_an_error_and_ends_well(tmp_path, content):
    memory = _memory(tmp_path, 2, 6)
    pages = content(memory)
    for page in range(6):
        pages.put(page, page)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            memory.acquire(0)
        except RuntimeError as error:
            code = 0 if "make the optimizer after the fork" in str(error) else 2
        del memory, pages  # destroys it: nothing to join, nothing to wait for
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for page in range(6):
        assert pages.is_all(page, page)


def test_the_spill_file_is_private_and_has_no_name(tmp_path, content):
    memory = _memory(tmp_path, 2, 6)
    content(memory).put(0, 1)
    spill = [
        os.stat(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if str(tmp_path) in _target(f"/proc/self/fd/{fd}")
    ]
    assert len(spill) == 1 and spill[0].st_nlink == 0 and stat.S_IMODE(spill[0].st_mode) == 0o600
    assert spill[0].st_blocks * 512 >= 6 * PAGE  # its space is taken, not promised
    assert os.listdir(tmp_path) == []


def _target(link):
    try:
        return os.readlink(link)
    except OSError:
        return ""


def test_it_is_freed_with_its_owner(tmp_path):
    def counted():
        return sum(str(tmp_path) in _target(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))

    threads = threading.active_count(), len(os.listdir("/proc/self/task"))
    memories = [_memory(tmp_path, 2, 6) for _ in range(5)]
    for memory in memories:
        memory.acquire(0)
    assert counted() == 5
    del memories, memory
    assert counted() == 0 and (threading.active_count(), len(os.listdir("/proc/self/task"))) == threads


def test_kill_9_leaves_nothing(tmp_path):
    script = f"""
    import ctypes, os, signal
    from pyfastpeft.paged_memory import PagedMemory
    memory = PagedMemory(8192, {str(tmp_path)!r}, page_bytes=4096)
    memory.add_pages(64)
    for page in range(64):
        ctypes.memset(memory.acquire(page), 1, 4096)
        memory.release(page, True)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env={**os.environ, "PYTHONPATH": _root()})
    assert done.returncode == -9 and os.listdir(tmp_path) == []


def _root():
    return str(Path(__file__).resolve().parents[2])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2GB", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("512M", 2**29),
        ("4096", 4096),
        (7, 7),
        (" 3 kb ", 3000),
        ("1T", 2**40),
    ],
)
def test_sizes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "2 apples", "-1", 0, "0", True, "nan", float("nan"), "1e9", 2**70])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="expected a number of bytes"):
        parse_bytes(text)


def test_page_sizes_follow_the_budget():
    sizes = [page_size_for(2**i) for i in range(10, 40)]
    assert sizes == sorted(sizes) and sizes[0] == 64 << 10 and sizes[-1] == 8 << 20
    assert all(size & (size - 1) == 0 for size in sizes)
    assert 2**20 < available_memory() < 2**50


def test_unusable_folders(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder, text in ((tmp_path / "none", "no such folder"), (tmp_path / "file", "no folder")):
        with pytest.raises(OSError, match=text):
            spill_folder(folder)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert spill_folder(None) == str(tmp_path)


def test_a_folder_in_memory_is_warned_of():
    if not os.path.isdir("/dev/shm") or not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm")
    with pytest.warns(RuntimeWarning, match="in memory"):
        spill_folder("/dev/shm")
