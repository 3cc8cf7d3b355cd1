"""quantize_4bit and quantize_absmax: the reference's bytes on every instruction set, and errors that name the fault."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from nf4_weights import BLOCKSIZES, DTYPES, as_finite, assert_same_bytes, extremes, near_thresholds
from torch._subclasses.fake_tensor import FakeTensorMode

import pyfastpeft as pf
from pyfastpeft._native import _C
from pyfastpeft.reference import nf4 as reference

SIZES = [1, 31, 33, 65, 96, 4097, 9000]
QUANT_TYPES = ["nf4", "fp4"]


def _check(weight, blocksize, quant_type):
    packed, absmax = torch.ops.pyfastpeft.quantize_4bit(weight, blocksize, quant_type)
    expected_packed, expected_absmax = reference.quantize_4bit(weight, blocksize, quant_type)
    what = f"{quant_type} {weight.dtype} {tuple(weight.shape)} blocksize {blocksize}"
    assert_same_bytes(absmax, expected_absmax, f"absmax of {what}")
    assert_same_bytes(packed, expected_packed, f"packed of {what}")


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_random_weights(isa, dtype, quant_type):
    generator = torch.Generator().manual_seed(0)
    for blocksize in BLOCKSIZES:
        for n in SIZES:
            weight = (torch.randn(n, generator=generator) * 0.05 + 0.01).to(dtype)
            _check(weight, blocksize, quant_type)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_adversarial_weights(isa, dtype, quant_type):
    for blocksize in (32, 64, 4096):
        for weight in (near_thresholds(quant_type, blocksize), extremes(blocksize)):
            weight = as_finite(weight, dtype)
            _check(weight, blocksize, quant_type)
            _check(weight[: -blocksize // 2 + 1], blocksize, quant_type)  # a ragged, odd end
            _check(weight[1:], blocksize, quant_type)  # an address that is not a vector's


@settings(deadline=None, max_examples=60)
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200),
    blocksize=st.sampled_from([32, 64, 128]),
    quant_type=st.sampled_from(QUANT_TYPES),
)
def test_any_finite_bits_on_every_instruction_set(bits, blocksize, quant_type):
    weight = torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32).copy())
    weight = torch.where(weight.isfinite(), weight, torch.zeros(()))
    former = _C.cpu_isa()
    try:
        for name in ("scalar", "avx2", "avx512")[: 1 + ["scalar", "avx2", "avx512", "amx"].index(former)]:
            _C.force_cpu_isa(name)
            _check(weight, blocksize, quant_type)
    finally:
        _C.force_cpu_isa(former)


def test_threads_and_flush_denormal_do_not_change_a_bit(isa):
    weight = torch.cat([extremes(64), torch.randn(1 << 20), extremes(64) * 1e-3])
    expected = pf.ops.quantize_4bit(weight, 64, "nf4", double_quant=False)
    plain = pf.ops.dequantize_4bit(expected)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for flush in (False, True):
                assert torch.set_flush_denormal(flush)
                q = pf.ops.quantize_4bit(weight)
                back = pf.ops.dequantize_4bit(q)
                torch.set_flush_denormal(False)
                assert q == expected
                assert_same_bytes(back, plain, f"dequantised with {count} threads, flush {flush}")
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def test_the_callers_flush_flag_survives():
    assert torch.set_flush_denormal(True)
    try:
        pf.ops.quantize_4bit(torch.randn(64))
        assert (torch.tensor([1e-40]) * 1.5).item() == 0
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_is_named_with_its_position(isa, dtype, bad):
    for position in (0, 1, 63, 64, 1000, 4095, 4096, 4998, 4999):
        weight = torch.ones(5000, dtype=dtype)
        weight[position] = bad
        weight[4999] = bad  # never the first, except in its own turn
        with pytest.raises(ValueError, match=rf"weight\[{position}\] is (-?{abs(bad)})"):
            pf.ops.quantize_4bit(weight)
    weight = torch.ones(3, 5, 7, dtype=dtype).transpose(0, 1)
    weight[4, 1, 6] = bad
    with pytest.raises(ValueError, match=r"weight\[4, 1, 6\] is .*expected finite values \(shape \(5, 3, 7\)\)"):
        pf.ops.quantize_4bit(weight)


def test_the_first_of_many_bad_values_whatever_the_threads():
    weight = torch.ones(1 << 20)
    weight[5::3] = float("nan")
    with pytest.raises(ValueError, match=r"weight\[5\] is nan"):
        pf.ops.quantize_4bit(weight)


def test_strided_weights():
    base = torch.randn(65, 130)
    for view in (base.t(), base[::2, 1::3], base[:, :1].expand(65, 40), base[3:, 5:]):
        assert not view.is_contiguous()
        assert pf.ops.quantize_4bit(view, 32) == pf.ops.quantize_4bit(view.contiguous(), 32)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(0,), (0, 64), (64, 0), (2, 0, 3)])
def test_empty(isa, shape, double_quant):
    q = pf.ops.quantize_4bit(torch.empty(shape, dtype=torch.bfloat16), double_quant=double_quant)
    assert q.packed.shape == (0, 1) and q.absmax.shape == (0,)
    back = pf.ops.dequantize_4bit(q)
    assert back.shape == shape and back.dtype == torch.bfloat16


def test_a_scalar_weight():
    q = pf.ops.quantize_4bit(torch.tensor(-3.5))
    assert q.packed.tolist() == [[0x07]] and q.absmax.tolist() == [3.5]
    assert pf.ops.dequantize_4bit(q).item() == -3.5


def test_what_each_nibble_holds():
    weight = torch.zeros(65)
    weight[0], weight[3], weight[64] = -1.0, 1.0, 2.0
    q = pf.ops.quantize_4bit(weight)
    assert q.packed[:3, 0].tolist() == [0x07, 0x7F, 0x77] and q.packed[-1].item() == 0xF7
    assert pf.ops.quantize_4bit(weight, 64, "fp4").packed[[0, 1, 2, -1], 0].tolist() == [0xB0, 0x03, 0x00, 0x30]


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((torch.ones(64, dtype=torch.int32),), TypeError, "weight has dtype torch.int32, expected float32"),
        ((torch.ones(64, dtype=torch.float64),), TypeError, "weight has dtype torch.float64, expected float32"),
        ((torch.ones(64, dtype=torch.complex64),), TypeError, "weight has dtype torch.complex64"),
        ((torch.ones(64), 63), ValueError, "blocksize is 63, expected a power of two from 32 to 4096"),
        ((torch.ones(64), 48), ValueError, "blocksize is 48"),
        ((torch.ones(64), 16), ValueError, "blocksize is 16"),
        ((torch.ones(64), 8192), ValueError, "blocksize is 8192"),
        ((torch.ones(64), 0), ValueError, "blocksize is 0"),
        ((torch.ones(64), -64), ValueError, "blocksize is -64"),
        ((torch.ones(64), 64, "int4"), ValueError, "quant_type is 'int4', expected 'nf4' or 'fp4'"),
        ((torch.ones(64), 64, ""), ValueError, "quant_type is ''"),
    ],
)
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_bad_input(args, error, match, where):
    with pytest.raises(error, match=match):
        pf.ops.quantize_4bit(args[0].to(where), *args[1:])


def test_the_binding_refuses_null_and_wrong_sizes():
    w, p, a = torch.ones(64), torch.empty(32, dtype=torch.uint8), torch.empty(1)
    good = (w.data_ptr(), 0, 64, 64, "nf4", p.data_ptr(), 32, a.data_ptr(), 1)
    assert _C.nf4_quantize_cpu(*good) == -1
    for index, value, match in [
        (0, 0, "weight has no memory"),
        (5, 0, "packed has no memory"),
        (7, 0, "absmax has no memory"),
        (1, 7, "dtype code is 7"),
        (2, -1, "the weight has -1 values"),
        (6, 31, r"packed has 31 values, expected 32 \(= \(64 \+ 1\) / 2"),
        (8, 2, r"absmax has 2 values, expected 1 \(= ceil\(64 / blocksize 64\)\)"),
    ]:
        with pytest.raises(ValueError, match=match):
            _C.nf4_quantize_cpu(*good[:index], value, *good[index + 1 :])


# ---- double quantisation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 5000])
def test_double_quantisation_equals_the_reference(isa, blocks):
    generator = torch.Generator().manual_seed(blocks)
    for absmax in (torch.rand(blocks, generator=generator), torch.randn(blocks, generator=generator).exp() * 1e-3):
        results = torch.ops.pyfastpeft.quantize_absmax(absmax)
        expected = reference.quantize_absmax(absmax)
        for name, a, e in zip(("codes", "nested_absmax", "nested_map", "offset"), results, expected, strict=True):
            assert_same_bytes(a, e, f"{name} of {blocks} blocks")
        assert results[3].item() == absmax.mean().item()


def test_every_code_is_the_nearest_and_all_are_reached():
    levels = reference.dynamic_map().double()
    grid = torch.cat([levels, (levels[:-1] + levels[1:]) / 2, torch.linspace(-1, 1, 4001).double()]).float()
    grid = torch.cat([torch.cat([torch.ones(1), chunk]) for chunk in grid.split(255)])
    absmax = torch.cat([grid + 2, 2 - grid])  # mean 2: d is ±grid
    codes, nested_absmax, nested_map, offset = torch.ops.pyfastpeft.quantize_absmax(absmax)
    assert len(codes.unique()) == 256
    d = (absmax - offset).double()
    scale = nested_absmax.repeat_interleave(256)[: d.numel()].double()
    chosen = (levels[codes.long()] * scale - d).abs()
    best = (levels[None, :] * scale[:, None] - d[:, None]).abs().amin(1)
    assert (chosen <= best + 2e-7 * scale).all()


def test_a_tie_between_two_codes_goes_to_the_lower():
    levels = reference.dynamic_map()
    midpoints = (levels[:-1] + levels[1:]) / 2
    absmax = torch.cat([midpoints, torch.ones(1)])  # one nested block, scale 1, offset 0: x is the midpoint itself
    codes, nested_absmax = torch.empty(256, dtype=torch.uint8), torch.empty(1)
    bad = _C.nf4_quantize_absmax_cpu(
        absmax.data_ptr(), 256, 0.0, levels.data_ptr(), 256, codes.data_ptr(), 256, nested_absmax.data_ptr(), 1
    )
    assert bad == -1 and nested_absmax.item() == 1
    assert codes.tolist() == [*range(255), 255]


# The search starts from buckets of values: maps whose levels crowd into one of them, lie beyond 1 or are all the same.
MAPS = {
    "dynamic": reference.dynamic_map(),
    "evenly spaced": torch.linspace(-1, 1, 256),
    "crowded": torch.cat([torch.linspace(-0.9, -0.2, 56), torch.linspace(0.5, 0.501, 200)]),
    "tiny and huge": torch.cat([torch.linspace(-1e-30, 1e-30, 128), torch.logspace(-8, 8, 128)]),
    "constant": torch.full((256,), 0.25),
}


@pytest.mark.parametrize("name", MAPS)
def test_codes_count_the_midpoints_below_in_any_ascending_map(name):
    levels = MAPS[name].contiguous()
    midpoints = (levels[:-1] + levels[1:]) * 0.5
    infinity = torch.full((), float("inf"))
    x = torch.cat([midpoints, torch.nextafter(midpoints, infinity), torch.nextafter(midpoints, -infinity)])
    x = torch.cat([x, torch.randn(200) * 0.3, torch.tensor([0.0, -0.0, 1e-45, -1e-45])]).clamp(-1, 1)
    x = torch.cat([x, -torch.ones(-x.numel() % 255)]).reshape(-1, 255)
    x = torch.cat([x, torch.ones(len(x), 1)], 1)  # the scale of every nested block is 1
    codes, nested_absmax = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x))
    bad = _C.nf4_quantize_absmax_cpu(
        x.data_ptr(), x.numel(), 0.0, levels.data_ptr(), 256, codes.data_ptr(), codes.numel(),
        nested_absmax.data_ptr(), len(x),
    )  # fmt: skip
    assert bad == -1
    assert torch.equal(codes.long(), (midpoints < x[..., None]).sum(-1))


def test_equal_blocks_decode_exactly():
    for value in (0.25, 0.3):  # 0.3's mean is rounded: d is not zero there
        q = pf.ops.quantize_4bit(torch.full((512, 64), value), double_quant=True)
        assert value == 0.3 or q.absmax.unique().tolist() == [127]  # the entry of zero
        assert pf.ops.dequantize_4bit(q).unique().tolist() == [torch.tensor(value).item()]


@pytest.mark.parametrize(
    ("absmax", "error", "match"),
    [
        (torch.ones(4, dtype=torch.float64), TypeError, "absmax is torch.float64 of shape"),
        (torch.ones(2, 2), TypeError, r"of shape \(2, 2\), expected float32 \[blocks\]"),
        (torch.tensor([1.0, float("nan")]), ValueError, "is not finite"),
        (torch.full((3,), 3e38), ValueError, r"absmax\[0\] = .* quantise it with double_quant=False"),
    ],
)
def test_bad_absmax(absmax, error, match):
    with pytest.raises(error, match=match):
        torch.ops.pyfastpeft.quantize_absmax(absmax)


# ---- as torch ops -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    op = torch.ops.pyfastpeft
    weight = torch.randn(5, 33, dtype=torch.float32, requires_grad=requires_grad)
    torch.library.opcheck(op.quantize_4bit.default, (weight, 32, "nf4"))
    torch.library.opcheck(op.quantize_4bit.default, (weight.bfloat16()[:, ::2], 64, "fp4"))
    torch.library.opcheck(op.quantize_absmax.default, (torch.rand(300, requires_grad=requires_grad),))


def test_no_gradient_whatever_the_weight_requires():
    weight = torch.randn(64, 64, requires_grad=True)
    for double_quant in (False, True):
        q = pf.ops.quantize_4bit(weight, double_quant=double_quant)
        assert not any(t.requires_grad for t in q.tensors().values())
        assert not pf.ops.dequantize_4bit(q).requires_grad


@pytest.mark.parametrize("double_quant", [False, True])
def test_meta_and_fake_tensors_give_the_shapes_of_real_ones(double_quant):
    real = pf.ops.quantize_4bit(torch.randn(33, 65).half(), 32, "fp4", double_quant)
    meta = pf.ops.quantize_4bit(torch.empty(33, 65, device="meta", dtype=torch.half), 32, "fp4", double_quant)
    with FakeTensorMode():
        fake = pf.ops.quantize_4bit(torch.empty(33, 65, dtype=torch.half), 32, "fp4", double_quant)
    for other in (meta, fake):
        assert {k: (t.shape, t.dtype) for k, t in other.tensors().items()} == {
            k: (t.shape, t.dtype) for k, t in real.tensors().items()
        }
        assert (other.shape, other.dtype, other.nbytes) == (real.shape, real.dtype, real.nbytes)
    assert meta.device.type == "meta" and fake.device.type == "cpu"
    assert pf.ops.dequantize_4bit(meta).shape == (33, 65)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_break(dynamic):
    def round_trip(weight):
        q = pf.ops.quantize_4bit(weight, 32, "nf4", double_quant=True)
        return pf.ops.dequantize_4bit(q) * 2, q

    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((48, 40), (7, 33)):
        weight = torch.randn(shape)
        (value, q), (expected, expected_q) = compiled(weight), round_trip(weight)
        assert torch.equal(value, expected) and q == expected_q


def test_inside_torch_func():
    weight = torch.randn(8, 64)
    q = pf.ops.quantize_4bit(weight)
    x = torch.randn(64)
    grad = torch.func.grad(lambda x: (pf.ops.dequantize_4bit(q) @ x).sum())(x)
    torch.testing.assert_close(grad, pf.ops.dequantize_4bit(q).sum(0))
