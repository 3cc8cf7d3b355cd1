"""The PTX interpreter by itself, on text written by hand: each family of instructions against numpy, control flow, and what
it refuses. Needs no CUDA."""

import numpy as np
import pytest
from emu.ptx import machine
from emu.ptx.arithmetic import bf16_to_f32, f32_to_bf16, fma_f32, fma_f64
from emu.ptx.ptx_types import DTYPES, Unknown
from emu.ptx.text import Module, PtxError

LANES = 32


def _module(body, shared="", parameters="q0 q1 q2 q3", before=""):
    listed = ", ".join(f".param .u64 {name}" for name in parameters.split())
    registers = (
        ".reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<40>; .reg .f32 %f<20>; .reg .b64 %rd<20>; .reg .f64 %d<20>;"
    )
    return Module(
        f".version 9.0\n.target sm_90a\n{before}\n.entry k({listed})\n{{\n{registers}\n{shared}\n{body}\nret;\n}}\n"
    )


def _launch(module, arrays, threads=LANES, blocks=1, read_only=()):
    buffers = [(a.ctypes.data, a.ctypes.data + a.nbytes, i in read_only, f"array {i}") for i, a in enumerate(arrays)]
    arguments = [np.uint64(a.ctypes.data).tobytes() for a in arrays]
    arguments += [bytes(8)] * (len(module.code("k").parameters) - len(arrays))
    return machine.launch(module, "k", (blocks, 1, 1), (threads, 1, 1), 0, arguments, sorted(buffers))


PREFIX = {"pred": "%p", 2: "%h", 4: "%r", 8: "%rd", "f32": "%f", "f64": "%d"}


def _register(kind, i):
    return PREFIX.get(kind, PREFIX.get(max(2, DTYPES[kind].itemsize))) + str(i)


def _memory_type(kind):
    return "b16" if kind == "bf16" else kind


def _calculate(instruction, kinds, to, values):
    """What `instruction` gives in 32 threads. It names its operands A, B, C and its result D; kinds are theirs, `to` its."""
    body = ["mov.u32 %r30, %tid.x;"]
    for i, kind in enumerate(kinds):
        body += [f"ld.param.u64 %rd10, [q{i}];", f"mul.wide.u32 %rd11, %r30, {DTYPES[kind].itemsize};",
                 "add.s64 %rd10, %rd10, %rd11;", f"ld.global.{_memory_type(kind)} {_register(kind, i)}, [%rd10];"]  # fmt: skip
        instruction = instruction.replace("ABC"[i], _register(kind, i))
    result = "u32" if to == "pred" else to
    body.append(instruction.replace("D", _register(to, 5)) + ";")
    if to == "pred":
        body.append("selp.u32 %r5, 1, 0, %p5;")
    body += [f"ld.param.u64 %rd10, [q{len(kinds)}];", f"mul.wide.u32 %rd11, %r30, {DTYPES[result].itemsize};",
             "add.s64 %rd10, %rd10, %rd11;", f"st.global.{_memory_type(result)} [%rd10], {_register(result, 5)};"]  # fmt: skip
    out = np.zeros(LANES, DTYPES[result])
    arrays = [np.ascontiguousarray(v, DTYPES[k]) for v, k in zip(values, kinds, strict=True)]
    _launch(_module("\n".join(body)), [*arrays, out], read_only=range(len(arrays)))
    return out != 0 if to == "pred" else out


def _values(kind, seed):
    random = np.random.default_rng(seed)
    if DTYPES[kind].kind == "f":
        values = (random.standard_normal(LANES) * 10.0 ** random.integers(-3, 4, LANES)).astype(DTYPES[kind])
        values[:6] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0]
        return np.roll(values, 5 * seed)
    info = np.iinfo(DTYPES[kind])
    values = random.integers(info.min, info.max, LANES, dtype=DTYPES[kind], endpoint=True)
    values[:4] = [0, 1, info.max, info.min]
    return np.roll(values, 3 * seed)


CASES = [
    *((f"{op}.{t} D, A, B", (t, t), t, f) for op, f in (("add", np.add), ("sub", np.subtract), ("min", np.fmin),
      ("max", np.fmax)) for t in ("s32", "u32", "s64", "u64", "s16", "f32", "f64")),
    *((f"mul.lo.{t} D, A, B", (t, t), t, np.multiply) for t in ("s32", "u32", "s64", "u64", "s16")),
    ("mul.hi.u32 D, A, B", ("u32", "u32"), "u32", lambda a, b: (a.astype("u8") * b.astype("u8") >> np.uint64(32)).astype("u4")),
    ("mul.hi.s32 D, A, B", ("s32", "s32"), "s32", lambda a, b: (a.astype("i8") * b.astype("i8") >> np.int64(32)).astype("i4")),
    ("mul.hi.u64 D, A, B", ("u64", "u64"), "u64",
     lambda a, b: np.array([int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)], np.uint64)),
    ("mul.wide.s32 D, A, B", ("s32", "s32"), "s64", lambda a, b: a.astype("i8") * b),
    ("mul.wide.u16 D, A, B", ("u16", "u16"), "u32", lambda a, b: a.astype("u4") * b),
    ("mad.lo.s32 D, A, B, C", ("s32", "s32", "s32"), "s32", lambda a, b, c: a * b + c),
    ("mad.wide.s32 D, A, B, C", ("s32", "s32", "s64"), "s64", lambda a, b, c: a.astype("i8") * b + c),
    ("mul.f32 D, A, B", ("f32", "f32"), "f32", np.multiply),
    ("mul.rn.f64 D, A, B", ("f64", "f64"), "f64", np.multiply),
    ("div.rn.f32 D, A, B", ("f32", "f32"), "f32", np.divide),
    ("rcp.rn.f32 D, A", ("f32",), "f32", lambda a: np.float32(1) / a),
    ("sqrt.rn.f32 D, A", ("f32",), "f32", np.sqrt),
    ("neg.f32 D, A", ("f32",), "f32", np.negative),
    ("neg.s32 D, A", ("s32",), "s32", np.negative),
    ("abs.f32 D, A", ("f32",), "f32", np.abs),
    ("max.NaN.f32 D, A, B", ("f32", "f32"), "f32", np.maximum),
    ("and.b32 D, A, B", ("u32", "u32"), "u32", np.bitwise_and),
    ("or.b64 D, A, B", ("u64", "u64"), "u64", np.bitwise_or),
    ("xor.b16 D, A, B", ("u16", "u16"), "u16", np.bitwise_xor),
    ("not.b32 D, A", ("u32",), "u32", np.invert),
    ("lop3.b32 D, A, B, C, 0xca", ("u32", "u32", "u32"), "u32", lambda a, b, c: (a & b) | (~a & c)),
    ("popc.b32 D, A", ("u32",), "u32", lambda a: np.array([bin(v).count("1") for v in a], np.uint32)),
    ("clz.b32 D, A", ("u32",), "u32", lambda a: np.array([32 - int(v).bit_length() for v in a], np.uint32)),
    ("bfi.b32 D, A, B, 9, 7", ("u32", "u32"), "u32",
     lambda a, b: (b & ~np.uint32(127 << 9)) | ((a & np.uint32(127)) << np.uint32(9))),
    ("bfe.u32 D, A, 5, 11", ("u32",), "u32", lambda a: a >> np.uint32(5) & np.uint32(2047)),
    ("bfe.s32 D, A, 20, 12", ("s32",), "s32", lambda a: a >> np.int32(20)),
    ("prmt.b32 D, A, B, 0x7610", ("u32", "u32"), "u32",
     lambda a, b: (a & np.uint32(0xFFFF)) | (b & np.uint32(0xFFFF0000))),
    ("prmt.b32 D, A, B, 0x888b", ("u32", "u32"), "u32",
     lambda a, b: np.where(a >> 31, 255, 0).astype("u4") | np.where(a >> 7 & 1, 0xFFFFFF00, 0).astype("u4")),
    ("shf.l.wrap.b32 D, A, B, 8", ("u32", "u32"), "u32", lambda a, b: b << np.uint32(8) | a >> np.uint32(24)),
    ("shl.b32 D, A, 33", ("u32",), "u32", lambda a: a * 0),
    ("shl.b64 D, A, 33", ("u64",), "u64", lambda a: a << np.uint64(33)),
    ("shr.s32 D, A, 40", ("s32",), "s32", lambda a: a >> np.int32(31)),
    ("shr.u64 D, A, 7", ("u64",), "u64", lambda a: a >> np.uint64(7)),
    ("setp.gt.f32 %p1, A, B; selp.f32 D, A, B, %p1", ("f32", "f32"), "f32", lambda a, b: np.where(a > b, a, b)),
    ("setp.lt.s32 D, A, B", ("s32", "s32"), "pred", np.less),
    ("setp.hi.u32 D, A, B", ("u32", "u32"), "pred", np.greater),
    ("setp.ne.f32 D, A, B", ("f32", "f32"), "pred", lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)),
    ("setp.neu.f32 D, A, B", ("f32", "f32"), "pred", np.not_equal),
    ("setp.geu.f32 D, A, B", ("f32", "f32"), "pred", lambda a, b: ~(a < b)),
    ("setp.gtu.f64 D, A, 0d3FF0000000000000", ("f64",), "pred", lambda a: ~(a <= 1)),
    ("setp.nan.f32 D, A, A", ("f32",), "pred", np.isnan),
    ("cvt.s64.s32 D, A", ("s32",), "s64", lambda a: a.astype("i8")),
    ("cvt.u32.u64 D, A", ("u64",), "u32", lambda a: a.astype("u4")),
    ("cvt.rn.f32.s32 D, A", ("s32",), "f32", lambda a: a.astype("f4")),
    ("cvt.rn.f16.f32 D, A", ("f32",), "f16", lambda a: a.astype("f2")),
    ("cvt.f32.f16 D, A", ("f16",), "f32", lambda a: a.astype("f4")),
    ("cvt.rn.bf16.f32 D, A", ("f32",), "bf16", f32_to_bf16),
    ("cvt.f32.bf16 D, A", ("bf16",), "f32", bf16_to_f32),
    ("cvt.rn.f16x2.f32 D, A, B", ("f32", "f32"), "u32",
     lambda a, b: a.astype("f2").view("u2").astype("u4") << np.uint32(16) | b.astype("f2").view("u2")),
    ("cvt.rn.bf16x2.f32 D, A, B", ("f32", "f32"), "u32",
     lambda a, b: f32_to_bf16(a).astype("u4") << np.uint32(16) | f32_to_bf16(b)),
    ("cvt.rzi.f64.f64 D, A", ("f64",), "f64", np.trunc),
    ("cvt.rni.s32.f32 D, A", ("f32",), "s32",
     lambda a: np.clip(np.rint(np.nan_to_num(a.astype("f8"), nan=0)), -(2**31), 2**31 - 1).astype("i4")),
    ("fma.rn.f32 D, A, B, C", ("f32", "f32", "f32"), "f32", fma_f32),
    ("fma.rn.f64 D, A, B, C", ("f64", "f64", "f64"), "f64", fma_f64),
]  # fmt: skip


@pytest.mark.parametrize("instruction, kinds, to, function", CASES, ids=[c[0].split()[0] for c in CASES])
def test_against_numpy(instruction, kinds, to, function):
    values = [_values(kind, i) for i, kind in enumerate(kinds)]
    with np.errstate(all="ignore"):
        want = function(*values)
        got = _calculate(instruction, kinds, to, values)
    assert np.asarray(want).dtype == got.dtype
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("instruction, function", [("div.s32 D, A, B", lambda a, b: int(a / b)),
                                                   ("rem.s32 D, A, B", lambda a, b: a - int(a / b) * b)])  # fmt: skip
def test_integer_division_goes_towards_zero(instruction, function):
    a = np.arange(-16, 16, dtype=np.int32)
    b = np.tile(np.array([-7, -3, 2, 5], np.int32), 8)
    want = [function(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    assert _calculate(instruction, ("s32", "s32"), "s32", (a, b)).tolist() == want


def test_fma_rounds_once():
    """Sums that lie almost in the middle of two floats, where rounding in double first goes wrong."""
    x = np.array([1 + 2**-12, 1 + 2**-23, 3.0], np.float32)
    y = np.array([1 + 2**-12, 1 - 2**-23, -(2.0**-24)], np.float32)
    z = np.array([2.0**-60, -1.0, 1.0], np.float32)
    exact = [np.float32(float(1 + 2**-11 + 2**-23)), np.float32(-(2.0**-46)), np.float32(1 - 3 * 2**-24)]
    np.testing.assert_array_equal(fma_f32(x, y, z)[[1, 2]], exact[1:])
    assert fma_f32(x, y, z)[0] > fma_f32(x, y, -z)[0]  # 1 + 2^-11 + 2^-24 is the middle; ± 2^-60 decides
    assert fma_f64(*(np.array([v]) for v in (1 + 2.0**-52, 1 - 2.0**-52, -1.0)))[0] == -(2.0**-104)


def test_vectors_predicates_packing_and_special_registers():
    out = np.zeros((64, 4), np.uint32)
    body = """
    ld.param.u64 %rd1, [q0]; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x;
    mad.lo.s32 %r4, %r1, %r2, %r3; mul.wide.u32 %rd2, %r4, 16; add.s64 %rd3, %rd1, %rd2;
    setp.lt.u32 %p1, %r3, 5; mov.u32 %r5, 7; @%p1 mov.u32 %r5, 9; @!%p1 add.u32 %r5, %r5, 1;
    { .reg .b16 low, high; mov.b32 {low, high}, 0x12345678; mov.b32 %r6, {high, low}; }
    mov.u32 %r7, %laneid;
    st.global.v4.u32 [%rd3], {%r4, %r5, %r6, %r7};"""
    _launch(_module(body), [out], threads=32, blocks=2)
    assert out[:, 0].tolist() == list(range(64)) and out[:, 3].tolist() == list(range(32)) * 2
    assert out[:32, 1].tolist() == [9] * 5 + [8] * 27 and set(out[:, 2]) == {0x56781234}


def test_threads_part_and_meet_again():
    """Each thread loops as often as its index says; afterwards the warp shuffles."""
    out = np.zeros(32, np.uint32)
    body = """
    ld.param.u64 %rd1, [q0]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;
    mov.u32 %r2, 0; mov.u32 %r3, 0;
    $L1: setp.ge.u32 %p1, %r2, %r1; @%p1 bra $L2;
    add.u32 %r3, %r3, %r2; add.u32 %r2, %r2, 1; bra.uni $L1;
    $L2: shfl.sync.bfly.b32 %r4|%p2, %r3, 1, 31, -1;
    st.global.u32 [%rd3], %r4;"""
    _launch(_module(body), [out])
    sums = [i * (i - 1) // 2 for i in range(32)]
    assert out.tolist() == [sums[i ^ 1] for i in range(32)]


@pytest.mark.parametrize(
    "mode, operand, clamp, source",
    [("idx", "3", 0x181F, lambda lane: lane & 24 | 3), ("up", "2", 0, lambda lane: lane - 2 if lane >= 2 else lane),
     ("down", "4", 0x101F, lambda lane: lane + 4 if lane % 16 + 4 < 16 else lane), ("bfly", "16", 31, lambda lane: lane ^ 16)],
)  # fmt: skip
def test_shuffles(mode, operand, clamp, source):
    values = np.arange(100, 132, dtype=np.uint32)
    got = _calculate(f"shfl.sync.{mode}.b32 D, A, {operand}, {clamp}, -1", ("u32",), "u32", (values,))
    assert got.tolist() == [100 + source(lane) for lane in range(32)]


def test_votes_and_block_reductions():
    out = np.zeros(96, np.uint32)
    body = """
    ld.param.u64 %rd1, [q0]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;
    setp.lt.u32 %p1, %r1, 40; vote.sync.ballot.b32 %r2, %p1, -1; bar.red.popc.u32 %r3, 0, %p1;
    bar.red.and.pred %p2, 0, %p1; bar.red.or.pred %p3, 0, %p1; selp.u32 %r4, 1, 0, %p2; selp.u32 %r5, 2, 0, %p3;
    add.u32 %r6, %r4, %r5; shl.b32 %r7, %r3, 8; add.u32 %r6, %r6, %r7; add.u32 %r6, %r6, %r2;
    st.global.u32 [%rd3], %r6;"""
    _launch(_module(body), [out], threads=96)
    base = 2 + (40 << 8)
    assert [int(v) for v in out[::32]] == [(base + 0xFFFFFFFF) & 0xFFFFFFFF, base + 255, base]


def test_a_block_that_is_no_whole_number_of_warps():
    out = np.zeros(40, np.uint32)
    body = """
    ld.param.u64 %rd1, [q0]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;
    setp.lt.u32 %p1, %r1, 40; bar.red.and.pred %p2, 0, %p1; bar.red.popc.u32 %r2, 0, %p1;
    selp.u32 %r3, 100, 0, %p2; add.u32 %r4, %r2, %r3; st.global.u32 [%rd3], %r4;"""
    _launch(_module(body), [out], threads=40)
    assert set(out.tolist()) == {140}


def test_atomics_take_turns():
    count, taken = np.zeros(1, np.uint32), np.zeros(70, np.uint32)
    body = """
    ld.param.u64 %rd1, [q0]; ld.param.u64 %rd2, [q1]; mov.u32 %r1, %tid.x; mov.u32 %r3, %ctaid.x;
    mad.lo.s32 %r1, %r3, 35, %r1; mul.wide.u32 %rd3, %r1, 4; add.s64 %rd3, %rd2, %rd3;
    atom.global.add.u32 %r2, [%rd1], 2; st.global.u32 [%rd3], %r2;"""
    _launch(_module(body), [count, taken], threads=35, blocks=2)
    assert count[0] == 140 and sorted(taken.tolist()) == list(range(0, 140, 2))


SHARED = ".shared .align 4 .b8 tile[128];"
EXCHANGE = """
    ld.param.u64 %rd1, [q0]; mov.u32 %r1, %tid.x; mov.u32 %r2, tile; shl.b32 %r3, %r1, 2; add.s32 %r4, %r2, %r3;
    st.shared.u32 [%r4+{offset}], %r1; {barrier} xor.b32 %r5, %r3, 4; add.s32 %r5, %r2, %r5; ld.shared.u32 %r6, [%r5];
    cvt.u64.u32 %rd2, %r3; add.s64 %rd2, %rd1, %rd2; st.global.u32 [%rd2], %r6;"""


PARTING = "setp.lt.u32 %p1, %r1, 3; @%p1 bra $L;"


def test_shared_memory_of_each_block():
    out = np.zeros(32, np.uint32)
    _launch(_module(EXCHANGE.format(offset=0, barrier="bar.sync 0;"), SHARED), [out], blocks=3)
    assert out.tolist() == [i ^ 1 for i in range(32)]


@pytest.mark.parametrize(
    "body, message",
    [
        (EXCHANGE.format(offset=4, barrier=""),
         r"out-of-bounds access of 4 bytes in shared memory at st.shared.u32 .*thread \(31, 0, 0\)"),
        (EXCHANGE.format(offset=2, barrier=""), "misaligned 4-byte access"),
        (EXCHANGE.format(offset=0, barrier=PARTING + "bar.sync 0; bra $M; $L: bar.sync 0; $M:"),
         "wait at different barriers"),
        (EXCHANGE.format(offset=0, barrier=PARTING + "shfl.sync.idx.b32 %r9, %r1, 0, 31, -1; $L: bar.sync 0;"),
         "deadlock"),
        (EXCHANGE.format(offset=0, barrier=PARTING + "shfl.sync.idx.b32 %r9, %r1, 0, 31, 0xfffffff8; $L:"),
         "a lane that takes no part"),
        ("trap;", "runs into a trap"),
        ("ld.param.u64 %rd1, [q0+4];", "beyond the parameter"),
        ("ld.param.u64 %rd1, [q0]; ld.global.u32 %r1, [%rd1+128];", r"byte 128 of array 0, which has 128"),
        ("ld.param.u64 %rd1, [q0]; ld.global.u32 %r1, [%rd1+-4];", r"byte -4 of array 0"),
        ("ld.param.u64 %rd1, [q1]; st.global.u32 [%rd1], 1;", r"array 1 is read-only"),
        ("mov.u64 %rd1, 64; ld.u32 %r1, [%rd1];", "out-of-bounds"),
    ],
)  # fmt: skip
def test_what_a_kernel_must_not_do(body, message):
    arrays = [np.zeros(32, np.uint32), np.zeros(32, np.uint32)]
    with pytest.raises(PtxError, match=message):
        _launch(_module(body, SHARED), arrays, read_only=(1,))


@pytest.mark.parametrize(
    "instruction",
    ["add.sat.s32 %r1, %r2, %r3", "ex2.approx.f32 %f1, %f2", "setp.lt.and.s32 %p1, %r1, %r2, %p2", "bar.sync 1", "membar.sys",
     "bar.sync 0, 64", "cvt.rz.f16.f32 %h1, %f1", "ld.global.v8.u32 %r1, [%rd1]", "shfl.sync.idx.b64 %rd1, %rd2, 0, 31, -1",
     "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2}, {%r3}, {%f1,%f2,%f3,%f4}",
     "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1,%r2}, [%r3]", "cp.async.ca.shared.global [%r1], [%rd1], 8",
     "atom.global.xor.b32 %r1, [%rd1], 1", "tex.2d.v4.f32.s32 %f1, %r1", "fma.rz.f32 %f1, %f2, %f3, %f4", "mad.hi.s64 %rd1, %rd2, %rd3, %rd4"],
)  # fmt: skip
def test_what_is_unknown_is_named_and_never_skipped(instruction):
    with pytest.raises(Unknown, match=instruction.split()[0].replace(".", r"\.")):
        _launch(_module(instruction + ";"), [np.zeros(1, np.uint32)])
