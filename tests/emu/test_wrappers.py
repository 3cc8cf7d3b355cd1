"""Every function of csrc/common/kport.cuh's namespace kp against a plain statement of what it does: by the host executor, by
the PTX interpreter (the asm as nvcc emits it) and on a GPU where there is one."""

import ctypes
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from emu import build
from emu.ptx import kernels
from emu.ptx.arithmetic import bf16_to_f32, f32_to_bf16
from emu.ptx.text import PtxError

HERE = build.HERE / "wrappers"
SOURCE = HERE / "wrappers.cu"
WRAPPERS = [
    "cp_async16", "cp_async_wait<0>", "cp_async_wait<1>", "cp_async_wait<2>", "ldmatrix_x4<false>", "ldmatrix_x4<true>",
    "mma_m16n8k16<bf16>", "mma_m16n8k16<fp16>", "max_magnitude",
]  # fmt: skip
NEED_SM80 = {"ldmatrix_x4<false>", "ldmatrix_x4<true>", "mma_m16n8k16<bf16>", "mma_m16n8k16<fp16>"}
MACHINES = ["emulated", "ptx-75", "ptx-80", "ptx-90a", "cuda"]


def _cp_async16(random):
    """Row r of 17 receives r · 5 % 17 bytes and zeros; the source ends with the last byte asked for."""
    source = random.integers(0, 256, 16 * 16 + 12, dtype=np.uint8)
    rows = np.zeros((17, 16), np.uint8)
    for r in range(17):
        for i in range(r * 5 % 17):
            rows[r, i] = source[16 * r + i]
    return source, rows[::-1]


def _cp_async_wait(random):
    source = random.integers(0, 256, (3, 32, 16), dtype=np.uint8)
    return source, source


def _ldmatrix(transpose):
    def statement(random):
        matrices = random.integers(0, 1 << 16, (4, 8, 8), dtype=np.uint16)
        result = np.zeros((32, 4, 2), np.uint16)
        for lane in range(32):
            for m in range(4):
                for half in range(2):
                    row, column = lane // 4, 2 * (lane % 4) + half
                    result[lane, m, half] = matrices[m, column, row] if transpose else matrices[m, row, column]
        return matrices, result

    return statement


def _mma(bits_of, value_of):
    """D = A [16, 16] · B [16, 8] + C, handed out over the lanes as the PTX ISA's figures show."""

    def statement(random):
        a, b = (bits_of(random.standard_normal(shape)) for shape in ((16, 16), (16, 8)))
        c = random.standard_normal((16, 8)).astype(np.float32)
        d = (value_of(a).astype(np.float64) @ value_of(b).astype(np.float64) + c).astype(np.float32)
        fragments = np.zeros(32, [("a", "u2", (4, 2)), ("b", "u2", (2, 2)), ("d", "f4", 4)])
        result = np.zeros((32, 4), np.float32)
        for lane in range(32):
            group, t = lane // 4, lane % 4
            for half in range(2):
                k = 2 * t + half
                for i, (row, column) in enumerate(((group, k), (group + 8, k), (group, k + 8), (group + 8, k + 8))):
                    fragments["a"][lane, i, half] = a[row, column]
                for i, row in enumerate((k, k + 8)):
                    fragments["b"][lane, i, half] = b[row, group]
            for i, (row, column) in enumerate(
                ((group, 2 * t), (group, 2 * t + 1), (group + 8, 2 * t), (group + 8, 2 * t + 1))
            ):
                fragments["d"][lane, i] = c[row, column]
                result[lane, i] = d[row, column]
        return fragments, result

    return statement


def _max_magnitude(random):
    pairs = random.standard_normal((32, 2)).astype(np.float32)
    pairs[:, 0] = np.abs(pairs[:, 0])  # a magnitude, as in a running maximum
    pairs[:6] = [[np.nan, 1], [1, np.nan], [0, -0.0], [np.inf, -np.inf], [2, -3], [0, -np.inf]]
    return pairs, np.array([np.maximum(abs(a), abs(b)) for a, b in pairs], np.float32)


STATEMENTS = {
    "cp_async16": _cp_async16,
    **{f"cp_async_wait<{n}>": _cp_async_wait for n in range(3)},
    "ldmatrix_x4<false>": _ldmatrix(False),
    "ldmatrix_x4<true>": _ldmatrix(True),
    "mma_m16n8k16<bf16>": _mma(lambda v: f32_to_bf16(v.astype(np.float32)), bf16_to_f32),
    "mma_m16n8k16<fp16>": _mma(lambda v: v.astype(np.float16).view(np.uint16), lambda u: u.view(np.float16)),
    "max_magnitude": _max_magnitude,
}


@pytest.fixture(scope="module")
def module():
    try:
        return build.load_module(build.build("_C_wrappers", [SOURCE], [HERE / "wrappers_bind.cpp"]))
    except build.Unavailable as missing:
        pytest.skip(f"the host executor cannot be built: {missing}")


def _interpreted(module, name, source, result, architecture, include=None):
    try:
        with kernels.interpreted(module, architecture, include, SOURCE) as ran:
            assert (
                module.run(WRAPPERS.index(name), source.ctypes.data, source.nbytes, result.ctypes.data, result.nbytes)
                == 0
            )
        assert len(ran) == 1
    finally:
        module.emu_forget_ranges()


@pytest.fixture(scope="module")
def silicon(tmp_path_factory):
    """run_wrapper, compiled for the GPU of this machine."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    major, minor = torch.cuda.get_device_capability()
    library = tmp_path_factory.mktemp("wrappers") / "wrappers.so"
    command = [
        "nvcc", "-shared", "-Xcompiler", "-fPIC", "-std=c++17", f"-arch=sm_{major}{minor}", "-DPYFASTPEFT_WITH_CUDA",
        f"-I{build.ROOT / 'csrc'}", "-o", str(library), str(SOURCE),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library)).run_wrapper


def _on_the_gpu(run, name, source, result):
    device_in = torch.from_numpy(source.reshape(-1).view(np.uint8).copy()).cuda()
    device_out = torch.from_numpy(result.reshape(-1).view(np.uint8).copy()).cuda()
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (device_in, device_out)]
    assert run(WRAPPERS.index(name), *pointers, stream) == 0
    result.reshape(-1).view(np.uint8)[:] = device_out.cpu().numpy()


def _agree(name, got, want):
    if name.startswith("mma"):  # tensor cores sum in an order and with roundings of their own
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_wrapper_does_what_is_said(request, module, machine, name):
    source, want = STATEMENTS[name](np.random.default_rng(WRAPPERS.index(name)))
    source, want = np.ascontiguousarray(source), np.ascontiguousarray(want)
    got = np.full(want.nbytes, 0xA5, np.uint8).view(want.dtype).reshape(want.shape)
    if machine == "cuda":
        run = request.getfixturevalue("silicon")
        if name in NEED_SM80 and torch.cuda.get_device_capability() < (8, 0):
            pytest.skip("needs compute capability 8.0")
        _on_the_gpu(run, name, source, got)
    elif machine == "emulated":
        try:
            module.run(WRAPPERS.index(name), source.ctypes.data, source.nbytes, got.ctypes.data, got.nbytes)
        finally:
            module.emu_forget_ranges()
    else:
        architecture = machine.removeprefix("ptx-")
        if architecture == "75" and name in NEED_SM80:  # ends the kernel rather than computing something else
            with pytest.raises(PtxError, match="runs into a trap"):
                _interpreted(module, name, source, got, architecture)
            return
        _interpreted(module, name, source, got, architecture)
    _agree(name, got, want)


def test_every_wrapper_is_here():
    text = (build.ROOT / "csrc/common/kport.cuh").read_text(encoding="utf-8")
    functions = re.findall(r"__device__ __forceinline__ [\w:]+ (\w+)\(", text[text.index("namespace kp {") :])
    tried = {re.split("[<]", name)[0] for name in WRAPPERS} | {"cp_async_commit"}  # the latter by every cp_async test
    assert set(functions) == tried


FAULTS = [
    ("swapped B registers", "{%8,%9}", "{%9,%8}", "mma_m16n8k16<bf16>"),
    ("swapped A registers", "{%4,%5,%6,%7}", "{%4,%6,%5,%7}", "mma_m16n8k16<fp16>"),
    ("C not added", '{%8,%9}, {%0,%1,%2,%3};\\n"', '{%8,%9}, {%4,%5,%6,%7};\\n"', "mma_m16n8k16<bf16>"),
    ("lost .trans", "m8n8.x4.trans.shared", "m8n8.x4.shared", "ldmatrix_x4<true>"),
    ("lost zero-fill operand", "[%0], [%1], 16, %2;", "[%0], [%1], 16;", "cp_async16"),
    ("wrong wait count", '"n"(kPending)', '"n"(kPending + 1)', "cp_async_wait<1>"),
    ("no wait", "cp.async.wait_group %0", "// cp.async.wait_group %0", "cp_async16"),
    ("no commit", "cp.async.commit_group;", "", "cp_async_wait<2>"),
    ("max that drops NaN", "max.NaN.f32", "max.f32", "max_magnitude"),
]


@pytest.mark.parametrize("what, right, wrong, name", FAULTS, ids=[f[0].replace(" ", "_") for f in FAULTS])
def test_a_fault_in_the_asm_is_noticed(module, tmp_path, what, right, wrong, name):
    text = (build.ROOT / "csrc/common/kport.cuh").read_text(encoding="utf-8")
    assert right in text
    (tmp_path / "common").mkdir()
    (tmp_path / "common/kport.cuh").write_text(text.replace(right, wrong), encoding="utf-8")
    source, want = STATEMENTS[name](np.random.default_rng(1))
    source, want = np.ascontiguousarray(source), np.ascontiguousarray(want)
    got = np.full(want.nbytes, 0xA5, np.uint8).view(want.dtype).reshape(want.shape)
    # wrong numbers, or a read beyond the source
    with pytest.raises(AssertionError, match=r"Arrays are not equal|Not equal to tolerance|out-of-bounds access"):
        _interpreted(module, name, source, got, "90a", tmp_path)
        _agree(name, got, want)
