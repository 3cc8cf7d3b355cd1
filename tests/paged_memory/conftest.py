"""A page's bytes as a bytes object, and faults that end with the test."""

import ctypes

import pytest

from pyfastpeft._native import _C


@pytest.fixture
def faults():
    """inject(op, errno, after=0, times=1, seconds=0): makes spill files fail."""
    yield _C.inject_spill_fault
    _C.clear_spill_faults()


class Bytes:
    """Writes and reads through acquire and release, as an optimizer does."""

    def __init__(self, memory):
        self.memory = memory

    def put(self, page, value, offset=0, n=None):
        n = self.memory.page_bytes - offset if n is None else n
        address = self.memory.acquire(page)
        ctypes.memset(address + offset, value, n)
        self.memory.release(page, True)

    def get(self, page):
        address = self.memory.acquire(page)
        content = ctypes.string_at(address, self.memory.page_bytes)
        self.memory.release(page, False)
        return content

    def is_all(self, page, value):
        return self.get(page) == bytes([value]) * self.memory.page_bytes


@pytest.fixture
def content():
    return Bytes
