"""One pool of threads: our loops run on torch's OpenMP runtime, and torch.set_num_threads governs both.

Each case runs in a process of its own, where nothing else has started threads, and measures: the threads the kernel
lists in /proc/self/task, the libraries in /proc/self/maps.
"""

import os
import subprocess
import sys

import pytest

PRELUDE = """
import os, re, sys
import torch
import pyfastpeft
from pyfastpeft._native import _C

def threads():
    return len(os.listdir("/proc/self/task"))

def libraries():
    return set(re.findall(r"/\\S*/lib(?:gomp|iomp|omp)[^/\\s]*\\.so\\S*", open("/proc/self/maps").read()))

default = torch.get_num_threads(), _C.max_threads()
torch.set_num_threads(1)
big = torch.linspace(-3, 3, 1 << 20)  # on one thread: the cases count those that are started

def torch_op():
    return torch.exp(big)

def our_op():
    return pyfastpeft.ops.quantize_4bit(big)
"""


def run(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_torch_governs_our_threads():
    """One library, torch's; the thread count of torch is ours; and no count changes a bit of the result."""
    run("""
import pathlib
assert libraries() == {_C.openmp_library()}, (libraries(), _C.openmp_library())
assert pathlib.Path(torch.__file__).parents[1] in pathlib.Path(_C.openmp_library()).parents
before, results = threads(), []
our_op()
assert threads() == before, "one thread was asked for, and another was started"
for count in (1, 2, 5, 1):
    torch.set_num_threads(count)
    assert _C.max_threads() == count, (_C.max_threads(), count)
    q = our_op()
    results.append(q.packed.numpy().tobytes() + q.absmax.numpy().tobytes())
assert len(set(results)) == 1
""")


@pytest.mark.parametrize("ours_first", [False, True])
def test_both_share_one_team_of_threads(ours_first):
    """A second pool would start its own three threads beside torch's three."""
    first, second = ("our_op()", "torch_op()") if ours_first else ("torch_op()", "our_op()")
    out = run(f"""
torch.set_num_threads(4)
before = threads()
{first}
one = threads() - before
{second}
{first}
print(one, threads() - before)
""")
    assert out.split() == ["3", "3"]


def test_omp_num_threads_is_honoured():
    run("assert default == (1, 1), default", OMP_NUM_THREADS="1")


def test_forked_child_works_on_one_thread():
    """libgomp's pool does not survive a fork: a child that used it would wait for threads that are not there."""
    run("""
torch.set_num_threads(2)
expected = our_op().packed.numpy().tobytes()
pid = os.fork()
if pid == 0:
    ok = _C.max_threads() == 1 and our_op().packed.numpy().tobytes() == expected
    os._exit(0 if ok else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert _C.max_threads() == 2
""")


def test_a_torch_that_hides_its_openmp():
    """The import makes torch's library visible; without one it takes the system's and says so; other errors pass."""
    run("""
import ctypes, importlib, warnings
from pyfastpeft import _native

def failing_once(message, real=importlib.import_module):
    calls = []
    def import_module(name):
        calls.append(name)
        if len(calls) == 1:
            raise ImportError(message)
        return real(name)
    importlib.import_module = import_module

warnings.simplefilter("error")
failing_once("_C.so: undefined symbol: GOMP_parallel")
assert _native._load() is _C and len(libraries()) == 1

_native.openmp_libraries = lambda: []
loaded = []
ctypes.CDLL = lambda name, mode: loaded.append((name, mode))
failing_once("_C.so: undefined symbol: omp_get_max_threads")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert _native._load() is _C
assert loaded == [("libgomp.so.1", os.RTLD_GLOBAL)]
assert len(caught) == 1 and "two pools of threads" in str(caught[0].message), caught

def no_library(name, mode):
    raise OSError("libgomp.so.1: cannot open shared object file")
ctypes.CDLL = no_library
failing_once("_C.so: undefined symbol: GOMP_barrier")
try:
    _native._load()
    raise AssertionError("no error")
except ImportError as error:
    assert "apt install libgomp1" in str(error), error

failing_once("something else")
try:
    _native._load()
    raise AssertionError("no error")
except ImportError as error:
    assert str(error) == "something else"
""")
