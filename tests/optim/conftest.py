"""Fixtures of the optimizers' tests."""

import pytest
import torch

from pyfastpeft._native import _C


@pytest.fixture
def one_thread():
    """Bits do not depend on the threads, and small tensors are quicker with one."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture
def faults():
    yield _C.inject_spill_fault
    _C.clear_spill_faults()
