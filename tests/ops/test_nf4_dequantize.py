"""dequantize_4bit: the reference's bits on every instruction set, plain and nested, into new and given tensors."""

import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from nf4_weights import BLOCKSIZES, DTYPES, assert_same_bytes

import pyfastpeft as pf
from pyfastpeft._native import _C
from pyfastpeft.reference import nf4 as reference

QUANT_TYPES = ["nf4", "fp4"]


def _random(n, blocksize, quant_type, nested, dtype=torch.float32, absmax=None, seed=0):
    """Every code and any absmax, not only what quantise would make."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, ((n + 1) // 2, 1), dtype=torch.uint8, generator=generator)
    blocks = -(n // -blocksize)
    if absmax is None:
        absmax = torch.rand(blocks, generator=generator) * 0.1 + 1e-3
    parts = {}
    if nested:
        codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
        parts = {
            "nested_absmax": torch.rand(-(blocks // -256), generator=generator),
            "nested_map": reference.dynamic_map() * 1.01,  # a stored map is trusted
            "offset": torch.tensor(0.73),
        }
        absmax = codes
    return pf.QuantizedTensor(packed, absmax, blocksize, quant_type, torch.Size([n]), dtype, **parts)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_equal_the_reference(isa, dtype, quant_type, nested):
    for blocksize in BLOCKSIZES:
        for n in (1, 32, 33, 65, 4097, 9001):
            q = _random(n, blocksize, quant_type, nested)
            expected = reference.dequantize_4bit(*q.flat()[:-1], dtype)
            out = torch.full((n,), float("nan"), dtype=dtype)
            assert pf.ops.dequantize_4bit(q, dtype, out) is out
            assert_same_bytes(out, expected, f"{quant_type} {dtype} n {n} blocksize {blocksize} nested {nested}")
            assert_same_bytes(pf.ops.dequantize_4bit(q, dtype), expected, "new tensor")


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_huge_and_not_finite_absmax(isa, dtype, quant_type):
    absmax = torch.tensor(
        [0, 1e-45, 3e-41, 1e-38, 1.2e-38, 2e-38, 6e-8, 6.1e-5, 1e-4, 3, 65504, 65519, 65520, 7e4, 3.3e38, 3.4028235e38]
    )
    q = _random(absmax.numel() * 32 - 1, 32, quant_type, False, absmax=absmax)
    expected = reference.dequantize_4bit(*q.flat()[:-1], dtype)
    assert_same_bytes(pf.ops.dequantize_4bit(q, dtype), expected, f"{dtype} {quant_type}")
    # a damaged file's scale gives NaN and infinity as arithmetic does; sign and payload of a NaN mean nothing
    absmax = torch.tensor([float("inf"), float("nan")])
    q = _random(64, 32, quant_type, False, absmax=absmax)
    back, expected = pf.ops.dequantize_4bit(q, dtype), reference.dequantize_4bit(*q.flat()[:-1], dtype)
    assert torch.equal(back.isnan(), expected.isnan()) and torch.equal(back.isinf(), expected.isinf())


def test_every_byte_gives_its_two_levels(isa):
    for quant_type in QUANT_TYPES:
        table = reference.quant_map(quant_type)
        q = pf.QuantizedTensor(
            torch.arange(256, dtype=torch.uint8)[:, None],
            torch.ones(16),
            32,
            quant_type,
            torch.Size([512]),
            torch.float32,
        )
        code = torch.arange(256)
        expected = torch.stack([table[code // 16], table[code % 16]], 1).reshape(-1)
        assert torch.equal(pf.ops.dequantize_4bit(q), expected)


def test_zero_block_of_their_gpu_build():
    q = pf.QuantizedTensor(
        torch.zeros(32, 1, dtype=torch.uint8), torch.zeros(1), 64, "nf4", torch.Size([64]), torch.bfloat16
    )
    assert (pf.ops.dequantize_4bit(q) == 0).all()


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 300),
    blocksize=st.sampled_from([32, 64, 128]),
    quant_type=st.sampled_from(QUANT_TYPES),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 0.02, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_round_trip_error_and_idempotence(n, blocksize, quant_type, dtype, scale, seed):
    weight = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    q = pf.ops.quantize_4bit(weight, blocksize, quant_type)
    back = pf.ops.dequantize_4bit(q)
    # half the widest gap between levels, times absmax, plus the rounding of the output
    levels = reference.quant_map(quant_type).unique()
    half_gap = (levels[1:] - levels[:-1]).max().item() / 2
    absmax = q.absmax.repeat_interleave(blocksize)[:n]
    eps = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * 4
    assert ((weight.float() - back.float()).abs() <= absmax * (half_gap + eps) + 1e-7).all()
    # levels encode to themselves, and the largest value of a block is a level: nothing moves the second time. (fp16
    # subnormals are too coarse for that.)
    if absmax.min() > 1e-2:
        again = pf.ops.quantize_4bit(back, blocksize, quant_type)
        assert again == q


# ---- out= ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_out_of_any_stride(nested):
    q = pf.ops.quantize_4bit(torch.randn(33, 65), 32, double_quant=nested)
    expected = pf.ops.dequantize_4bit(q)
    for out in (
        torch.full((33, 65), float("nan")),
        torch.full((65, 33), float("nan")).t(),
        torch.full((66, 130), float("nan"))[::2, ::2],
        torch.full((34, 65), float("nan"))[1:],
    ):
        version = out._version
        assert pf.ops.dequantize_4bit(q, out=out) is out
        assert torch.equal(out, expected)
        assert out._version > version


def test_out_gives_the_dtype_and_overwriting_a_saved_tensor_is_noticed():
    q = pf.ops.quantize_4bit(torch.randn(8, 64))
    out = torch.empty(8, 64, dtype=torch.bfloat16)
    assert torch.equal(pf.ops.dequantize_4bit(q, out=out), pf.ops.dequantize_4bit(q, torch.bfloat16))
    x = torch.ones(8, 64, dtype=torch.bfloat16, requires_grad=True)
    product = (x * out).sum()
    pf.ops.dequantize_4bit(q, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_bad_out():
    q = pf.ops.quantize_4bit(torch.randn(8, 64))
    for out, error, match in [
        (torch.empty(8, 63), ValueError, r"out is torch.float32 \(8, 63\) on cpu, expected torch.float32 \(8, 64\)"),
        (torch.empty(8, 64, dtype=torch.int32), TypeError, "the output has dtype torch.int32"),
        (torch.empty(8, 64, device="meta"), ValueError, "on meta, expected"),
        (torch.empty(8, 64, requires_grad=True), RuntimeError, "out requires grad"),
    ]:
        with pytest.raises(error, match=match):
            pf.ops.dequantize_4bit(q, out=out)
    with pytest.raises(ValueError, match="out is torch.float32 .* expected torch.float16"):
        pf.ops.dequantize_4bit(q, torch.float16, torch.empty(8, 64))
    with torch.no_grad():
        pf.ops.dequantize_4bit(q, out=torch.empty(8, 64, requires_grad=True))


# ---- as a torch op ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_opcheck(nested):
    q = pf.ops.quantize_4bit(torch.randn(5, 33), 32, double_quant=nested)
    op = torch.ops.pyfastpeft.dequantize_4bit
    torch.library.opcheck(op.default, q.flat())
    torch.library.opcheck(op.out, q.flat(), {"out": torch.empty(5, 33)})
    torch.library.opcheck(op.out, q.flat(), {"out": torch.empty(33, 5).t()})


def test_out_compiled_without_a_break():
    q = pf.ops.quantize_4bit(torch.randn(8, 64), double_quant=True)

    def fill(q, out):
        pf.ops.dequantize_4bit(q, out=out)
        return out + 1

    out = torch.full((8, 64), float("nan"))
    result = torch.compile(fill, fullgraph=True, backend="aot_eager")(q, out)
    expected = pf.ops.dequantize_4bit(q)
    assert torch.equal(out, expected) and torch.equal(result, expected + 1)


def test_strided_parts():
    q = pf.ops.quantize_4bit(torch.randn(70, 64), 32, double_quant=True)
    expected = pf.ops.dequantize_4bit(q)
    flat = list(q.flat())
    for index in (0, 1, 2, 3):
        part = flat[index]
        flat[index] = torch.stack([part, torch.zeros_like(part)], -1)[..., 0]
        assert part.numel() < 2 or not flat[index].is_contiguous()
    assert torch.equal(torch.ops.pyfastpeft.dequantize_4bit(*flat), expected)


@pytest.mark.parametrize(
    ("index", "value", "error", "match"),
    [
        (0, torch.zeros(31, 1, dtype=torch.uint8), ValueError, r"packed has 31 values, expected 32"),
        (0, torch.zeros(32, 1, dtype=torch.int8), TypeError, "packed has dtype torch.int8, expected torch.uint8"),
        (
            1,
            torch.zeros(3, dtype=torch.uint8),
            ValueError,
            r"absmax has 3 values, expected 2 \(= ceil\(64 / blocksize 32",
        ),
        (1, torch.zeros(2), TypeError, "absmax has dtype torch.float32, expected torch.uint8"),
        (2, torch.zeros(0), ValueError, r"nested_absmax has 0 values, expected 1 \(= ceil\(2 blocks / 256\)\)"),
        (2, None, ValueError, "given together"),
        (3, torch.zeros(0), ValueError, "nested_map has 0 values, expected 256"),
        (3, torch.zeros(255), ValueError, "nested_map has 255 values, expected 256"),
        (4, torch.zeros(2), ValueError, "offset has 2 values, expected 1"),
        (4, torch.zeros((), dtype=torch.float64), TypeError, "offset has dtype torch.float64"),
        (4, torch.zeros((), device="meta"), ValueError, "offset is on meta, packed is on cpu"),
        (5, 16, ValueError, "blocksize is 16, expected a power of two"),
        (6, "af4", ValueError, "quant_type is 'af4'"),
        (7, [8, 9], ValueError, "packed has 32 values, expected 36"),
        (8, torch.float64, TypeError, "the output has dtype torch.float64"),
    ],
)
def test_malformed_arguments_are_named(index, value, error, match):
    flat = list(pf.ops.quantize_4bit(torch.randn(8, 8), 32, double_quant=True).flat())
    flat[index] = value
    with pytest.raises(error, match=match):
        torch.ops.pyfastpeft.dequantize_4bit(*flat)


def test_the_binding_refuses_null():
    q = pf.ops.quantize_4bit(torch.randn(64))
    out = torch.empty(64)
    good = (q.packed.data_ptr(), 32, q.absmax.data_ptr(), 1, 0, 0, 0, 0, 0, 64, 64, "nf4", 0, out.data_ptr(), 64)
    _C.nf4_dequantize_cpu(*good)
    for index, name in ((0, "packed"), (2, "absmax"), (13, "out")):
        with pytest.raises(ValueError, match=f"{name} has no memory"):
            _C.nf4_dequantize_cpu(*good[:index], 0, *good[index + 1 :])


@pytest.mark.skipif("PYFASTPEFT_TEST_LARGE" not in os.environ, reason="needs 7 GB: set PYFASTPEFT_TEST_LARGE=1")
@pytest.mark.parametrize("nested", [False, True])
def test_more_than_2_to_the_31_values(nested):
    n = 2**31 + 4097
    weight = torch.zeros(n, dtype=torch.bfloat16)
    places = torch.tensor([0, 2**31 - 1, 2**31, 2**31 + 4095, n - 1])
    expected = torch.tensor([1, -1, 2, -3, 4], dtype=torch.bfloat16)
    weight[places] = expected
    q = pf.ops.quantize_4bit(weight, 64, double_quant=nested)
    del weight
    out = pf.ops.dequantize_4bit(q)
    # a step of the 8-bit map near 1 is 1.4 % of the largest absmax
    assert (out[places].float() - expected.float()).abs().max() <= (0.06 if nested else 0)
    assert sum(int(part.count_nonzero()) for part in out.split(1 << 26)) == len(places)
    out[n - 2] = float("nan")
    with pytest.raises(ValueError, match=f"weight\\[{n - 2}\\] is nan"):
        pf.ops.quantize_4bit(out)
