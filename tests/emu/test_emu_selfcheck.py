"""The executor finds every bug of tests/emu/bugs/, at its line, and stays silent on the same kernels without it."""

import functools
import re

import pytest
import torch
from emu import build

BUGS = build.HERE / "bugs"
LINES = {
    name: f"tests/emu/bugs/{file.name}:{number}"
    for file in sorted(BUGS.glob("*.cu"))
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
    for name in re.findall(r"BUG (\w+)", line)
}
KINDS = {
    "missing_syncthreads": "RACE, read after write on __shared__ partial",
    "missing_syncthreads_in_loop": "RACE, write after read on __shared__ tile",
    "missing_syncwarp": "RACE, read after write on __shared__ exchange",
    "shuffle_as_barrier": "RACE, read after write on __shared__ exchange",
    "write_after_lanes_read": "RACE, write after read on __shared__ value",
    "write_after_another_warp_read": "RACE, write after read on __shared__ value",
    "write_after_another_block_read": "RACE, write after read on byte 800 of y",
    "barrier_under_if": "DIVERGENT __syncthreads",
    "barrier_divergent_in_warp": "DIVERGENT __syncthreads",
    "return_before_barrier": "EXITED THREADS: __syncthreads",
    "barrier_never_reached": "DEADLOCK",
    "same_address": "RACE, write after write on byte 0 of y",
    "race_between_blocks": "RACE, write after write on byte 0 of y",
    "missing_threadfence": "RACE, read after write on byte 0 of y",
    "fence_before_write": "RACE, read after write on byte 0 of y",
    "hand_over_without_barrier": "RACE, read after write on byte",
    "fence_by_each_thread": "RACE, read after write on byte 20 of y",
    "no_syncwarp_before_fence": "RACE, read after write on byte",
    "no_syncwarp_after_atomic": "RACE, read after write on byte",
    "wait_for_another_block": "LIVELOCK",
    "shared_out_of_bounds": "OUT OF BOUNDS array index",
    "shared_out_of_bounds_by_pointer": "OUT OF BOUNDS write of 4 bytes at byte 128 of __shared__ tile (128 bytes)",
    "shared_access_beyond_end": "OUT OF BOUNDS read of 8 bytes at byte 8 of __shared__ tile (12 bytes)",
    "dynamic_shared_too_small": "OUT OF BOUNDS write of 4 bytes at byte 252 of dynamic shared memory (254 bytes)",
    "read_beyond_tail": "OUT OF BOUNDS read of 4 bytes",
    "write_beyond_tail": "OUT OF BOUNDS write of 4 bytes",
    "vector_read_beyond_tail": "OUT OF BOUNDS read of 4 bytes",
    "memcpy_beyond_tail": "OUT OF BOUNDS read of 160 bytes",
    "unregistered_pointer": "OUT OF BOUNDS read of 4 bytes",
    "write_to_input": "WRITE to byte 0 of x, which is read-only",
    "constant_out_of_bounds": "OUT OF BOUNDS read of 4 bytes",
    "write_to_constant": "WRITE to __constant__ memory",
    "misaligned_vector": "MISALIGNED",
    "uninitialised_shared": "UNINITIALISED read of __shared__ tile, element 63",
    "uninitialised_dynamic_shared": "UNINITIALISED read of byte 252 of dynamic shared memory",
    "shared_of_former_block": "UNINITIALISED read of __shared__ tile",
    "uninitialised_global": "UNINITIALISED read of byte 0 of y",
    "index_overflow": "OVERFLOW of a signed multiplication",
    "shift_out_of_range": "SHIFT out of range",
    "too_many_threads_for_bounds": "LAUNCH with 96 threads a block",
    "too_many_threads": "LAUNCH with blocks of (1056, 1, 1) threads",
    "too_much_shared": "LAUNCH with 232464 bytes of dynamic shared memory",
    "grid_too_high": "LAUNCH with a grid of (1, 65536, 1) blocks",
    "shuffle_in_half_a_warp": "DEADLOCK",
    "mask_without_caller": "MASK of __shfl_xor_sync is 0000ffff",
    "cp_async_without_wait": "RACE, read before the wait for cp.async",
    "cp_async_without_barrier": "RACE, read after write on byte",
    "pipeline_refill": "RACE, write after read on byte",
    "cp_async_misaligned": "MISALIGNED cp.async",
    "cp_async_beyond_source": "OUT OF BOUNDS read of 4 bytes",
    "ldmatrix_misaligned": "MISALIGNED ldmatrix",
    "ldmatrix_before_syncwarp": "RACE, read after write on __shared__ tile",
}


@functools.cache
def _module():
    return build.load_module(build.build("_C_bugs", sorted(BUGS.glob("*.cu")), [BUGS / "bugs_bind.cpp"]))


@pytest.fixture(scope="module")
def bugs():
    try:
        return _module()
    except build.Unavailable as missing:
        pytest.skip(f"the host executor cannot be built: {missing}")


def _run(module, name, bug, seed=0, preempt=0):
    x, y, count = torch.ones(256), torch.zeros(256), torch.zeros(1, dtype=torch.int32)
    module.emu_configure(seed, preempt)
    if name == "uninitialised_global":
        module.emu_mark_fresh(y.data_ptr(), y.nbytes)
    try:
        module.run(name, bug, x.data_ptr(), y.data_ptr(), count.data_ptr(), 256)
    finally:
        module.emu_forget_ranges()
        module.emu_forget_fresh()


@pytest.mark.parametrize("name", KINDS)
def test_the_bug_is_reported_at_its_line(bugs, name):
    with pytest.raises(bugs.Report) as caught:
        _run(bugs, name, bug=True)
    findings = str(caught.value).split("]\n")  # one may take several lines; it ends with [kernel …]
    fitting = [
        f for f in findings if KINDS[name] in f and LINES.get(name, "") in f and name in f.rsplit("[kernel", 1)[1]
    ]
    assert fitting, caught.value


@pytest.mark.parametrize("seed, preempt", [(0, 0), (1, 0), (2, 5)])
def test_clean_kernels_stay_silent(bugs, seed, preempt):
    for name in KINDS:
        _run(bugs, name, bug=False, seed=seed, preempt=preempt)


@pytest.mark.parametrize("seed, preempt", [(1, 0), (2, 5)])
def test_bugs_are_reported_on_every_schedule(bugs, seed, preempt):
    missed = set()
    for name in KINDS:
        try:
            _run(bugs, name, bug=True, seed=seed, preempt=preempt)
            missed.add(name)
        except bugs.Report as report:
            assert f"seed {seed}, preempt {preempt}" in str(report)
    assert missed <= {"wait_for_another_block"}  # that block may happen to come first


def test_the_portable_switch_between_threads_works_too():
    try:
        flags = ("-DEMU_PORTABLE_SWITCH",)
        path = build.build("_C_bugs", sorted(BUGS.glob("*.cu")), [BUGS / "bugs_bind.cpp"], flags)
    except build.Unavailable as missing:
        pytest.skip(f"the host executor cannot be built: {missing}")
    module = build.load_module(path)
    for name in KINDS:
        _run(module, name, bug=False)
    for name in ("missing_syncthreads", "shuffle_in_half_a_warp", "cp_async_without_wait"):
        with pytest.raises(module.Report):
            _run(module, name, bug=True)
        _run(module, name, bug=False)  # after threads were given up in the middle


def test_every_planted_bug_is_expected(bugs):
    assert sorted(bugs.names()) == sorted(KINDS)
