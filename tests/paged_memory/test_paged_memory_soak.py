"""Thousands of random operations on pages, disk failures among them, against a plain dict of bytes."""

import ctypes
import errno
import tempfile

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyfastpeft._native import _C
from pyfastpeft.paged_memory import PagedMemory, SpillError

PAGE = 4096


class PagedMemoryMachine(RuleBasedStateMachine):
    @initialize(frames=st.integers(2, 6), look_ahead=st.integers(0, 4), threads=st.integers(1, 3), direct=st.booleans())
    def begin(self, frames, look_ahead, threads, direct):
        self.folder = tempfile.TemporaryDirectory()
        self.frames = frames
        self.memory = PagedMemory(
            frames * PAGE,
            self.folder.name,
            page_bytes=PAGE,
            look_ahead=look_ahead,
            io_threads=threads,
            direct_io=direct,
        )
        self.model = []  # one byte a page, repeated
        self.held = {}  # page → (address, how often)

    def teardown(self):
        _C.clear_spill_faults()
        if hasattr(self, "folder"):
            del self.memory
            self.folder.cleanup()

    def _page(self, data):
        return data.draw(st.integers(0, len(self.model) - 1))

    def _acquire(self, page):
        """The address, or None where faults or the budget are in the way."""
        for _ in range(20):
            try:
                return self.memory.acquire(page)
            except SpillError as error:
                assert error.errno == errno.EIO
            except RuntimeError as error:
                assert "are held" in str(error) and len(self.held) == self.frames
                return None
        raise AssertionError("five faults, and twenty attempts were not enough")

    @rule(count=st.integers(1, 5))
    def grow(self, count):
        if len(self.model) < 24:
            assert list(self.memory.add_pages(count)) == list(range(len(self.model), len(self.model) + count))
            self.model += [0] * count

    @precondition(lambda self: self.model)
    @rule(data=st.data(), value=st.integers(0, 255), write=st.booleans())
    def visit(self, data, value, write):
        page = self._page(data)
        address = self._acquire(page)
        if address is None:
            return
        assert ctypes.string_at(address, PAGE) == bytes([self.model[page]]) * PAGE
        if write:
            ctypes.memset(address, value, PAGE)
            self.model[page] = value
        self.memory.release(page, write)

    @precondition(lambda self: self.model)
    @rule(value=st.integers(0, 255))
    def pass_over_all(self, value):
        self.memory.set_order(list(range(len(self.model))))
        for page in range(len(self.model)):
            address = self._acquire(page)
            if address is None:
                return
            assert ctypes.string_at(address, PAGE) == bytes([self.model[page]]) * PAGE
            ctypes.memset(address, (value + page) % 256, PAGE)
            self.model[page] = (value + page) % 256
            self.memory.release(page, True)

    @precondition(lambda self: self.model and len(self.held) < self.frames - 1)
    @rule(data=st.data())
    def hold(self, data):
        page = self._page(data)
        address = self._acquire(page)
        known, count = self.held.get(page, (address, 0))
        assert known == address
        self.held[page] = (address, count + 1)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), value=st.integers(0, 255))
    def change_and_let_go(self, data, value):
        page = data.draw(st.sampled_from(sorted(self.held)))
        address, count = self.held.pop(page)
        assert ctypes.string_at(address, PAGE) == bytes([self.model[page]]) * PAGE
        ctypes.memset(address, value, PAGE)
        self.model[page] = value
        for _ in range(count):
            self.memory.release(page, True)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def discard(self, data):
        page = self._page(data)
        if page not in self.held:
            self.memory.discard(page)
            self.model[page] = 0

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def order(self, data):
        self.memory.set_order(data.draw(st.permutations(range(len(self.model))))[: data.draw(st.integers(0, 24))])
        self.memory.prefetch()

    @rule(
        op=st.sampled_from(["read", "write"]), error=st.sampled_from([0, errno.EINTR, errno.EIO]), n=st.integers(1, 3)
    )
    def disk_fails(self, op, error, n):
        _C.clear_spill_faults()
        _C.inject_spill_fault(op, error, times=n)

    @invariant()
    def the_budget_holds(self):
        if hasattr(self, "memory"):
            stats = self.memory.stats()
            assert stats["peak_resident_pages"] <= self.frames
            assert stats["held_pages"] == len(self.held)
            resident = self.memory.resident()
            assert all(resident[page] for page in self.held) and sum(resident) <= self.frames


PagedMemoryMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSoak = PagedMemoryMachine.TestCase
