"""quantize_4bit and quantize_absmax on every kind of device: the reference's bits, tails and odd addresses included."""

import pytest
import torch
from nf4_weights import BLOCKSIZES, DTYPES, as_finite, assert_same_bytes, extremes, near_thresholds

import pyfastpeft as pf
from pyfastpeft.reference import nf4 as reference

QUANT_TYPES = ["nf4", "fp4"]
TILE = 4096  # values a thread block takes: one whole, a whole and a tail, less than one
SIZES = [1, 2, 33, TILE - 1, TILE, TILE + 1, 2 * TILE + 95]


def check(weight, blocksize, quant_type, device, first=0):
    """`first`: how many values after a vector's address the weight begins on the device."""
    expected_packed, expected_absmax = reference.quantize_4bit(weight, blocksize, quant_type)
    memory = torch.empty(weight.numel() + first, dtype=weight.dtype, device=device)
    memory[first:] = weight.to(device)
    packed, absmax = torch.ops.pyfastpeft.quantize_4bit(memory[first:], blocksize, quant_type)
    assert packed.device.type == torch.device(device).type
    what = f"{quant_type} {weight.dtype} {tuple(weight.shape)} blocksize {blocksize}"
    assert_same_bytes(absmax.cpu(), expected_absmax, f"absmax of {what}")
    assert_same_bytes(packed.cpu(), expected_packed, f"packed of {what}")


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_every_tail(device, dtype, quant_type):
    generator = torch.Generator().manual_seed(0)
    for n in SIZES:
        weight = (torch.randn(n, generator=generator) * 0.05 + 0.01).to(dtype)
        for blocksize in (32, 64, 4096):
            check(weight, blocksize, quant_type, device)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_bytes_of_every_blocksize(device, blocksize):
    weight = torch.randn(2 * TILE + 95, generator=torch.Generator().manual_seed(blocksize))
    weight[:TILE] *= torch.logspace(-3, 3, TILE)  # no two blocks alike
    check(weight.bfloat16(), blocksize, "nf4", device)
    check(weight, blocksize, "fp4", device)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_bytes_next_to_every_threshold(device, quant_type):
    for weight in (near_thresholds(quant_type, 64), extremes(32)):
        check(weight, 64, quant_type, device)
        check(as_finite(weight, torch.float16), 32, quant_type, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_a_weight_at_any_address(device, dtype):
    weight = torch.randn(TILE + 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    for first in (1, 2, 4, 7):
        check(weight, 64, "nf4", device, first)


def test_strided_weights(device):
    base = torch.randn(65, 130, device=device)
    for view in (base.t(), base[::2, 1::3], base[:, :1].expand(65, 40)):
        assert not view.is_contiguous()
        assert pf.ops.quantize_4bit(view, 32) == pf.ops.quantize_4bit(view.contiguous(), 32)


@pytest.mark.parametrize("double_quant", [False, True])
def test_empty(device, double_quant):
    q = pf.ops.quantize_4bit(torch.empty(0, 64, device=device), double_quant=double_quant)
    assert q.packed.shape == (0, 1) and q.absmax.shape == (0,)
    assert pf.ops.dequantize_4bit(q).shape == (0, 64)
    if double_quant:
        assert_same_bytes(q.nested_map.cpu(), reference.dynamic_map(), "the map of no block")


# ---- values without a code ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("dtype", "blocksize"), [(torch.float32, 32), (torch.bfloat16, 64), (torch.float16, 4096)])
def test_the_first_value_without_a_code_is_named(device, value, dtype, blocksize):
    for position in (0, 63, TILE - 1, TILE + 31):  # a whole tile, a tail
        weight = torch.ones(TILE + 33, dtype=dtype, device=device)
        weight[position] = value
        weight[TILE + 32] = float("nan")
        with pytest.raises(ValueError, match=rf"weight\[{position}\] is (-?{abs(value)})"):
            pf.ops.quantize_4bit(weight, blocksize)


@pytest.mark.parametrize("double_quant", [False, True])
def test_unchecked_gives_the_same_bytes_and_no_error(device, double_quant):
    weight = torch.randn(40, 70, device=device)
    assert pf.ops.quantize_4bit(weight, 64, "nf4", double_quant, check_finite=False) == pf.ops.quantize_4bit(
        weight, 64, "nf4", double_quant
    )
    weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"weight\[3, 3\] is nan"):
        pf.ops.quantize_4bit(weight, 64, "nf4", double_quant)
    q = pf.ops.quantize_4bit(weight, 64, "nf4", double_quant, check_finite=False)
    assert q.shape == (40, 70)


@pytest.mark.parametrize("name", ["quantize_4bit", "quantize_absmax"])
def test_the_unchecked_overload_as_a_torch_op(name):
    op = getattr(torch.ops.pyfastpeft, name).unchecked
    args = (torch.rand(5, 33), 32, "nf4") if name == "quantize_4bit" else (torch.rand(300),)
    torch.library.opcheck(op, args)
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    assert [t.shape for t in op(*meta)] == [t.shape for t in op(*args)]


# ---- double quantisation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 31, 255, 256, 257, 2048, 2049])
def test_absmax_given_its_offset(device, blocks):
    generator = torch.Generator().manual_seed(blocks)
    for absmax in (torch.rand(blocks, generator=generator), torch.randn(blocks, generator=generator).exp() * 1e-3):
        codes, nested_absmax, nested_map, offset = (
            t.cpu() for t in torch.ops.pyfastpeft.quantize_absmax(absmax.to(device))
        )
        torch.testing.assert_close(offset, absmax.mean(), rtol=1e-6, atol=0)
        expected = by_offset(absmax, offset)
        assert_same_bytes(nested_map, reference.dynamic_map(), "nested_map")
        assert_same_bytes(nested_absmax, expected[1], f"nested_absmax of {blocks}")
        assert_same_bytes(codes, expected[0], f"codes of {blocks}")


def by_offset(absmax, offset):
    """(codes, nested_absmax) as the reference makes them, for an offset that is given."""
    levels = reference.dynamic_map()
    d = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % 256)).view(-1, 256)
    d.view(-1)[absmax.numel() :] = 0
    nested_absmax = d.abs().amax(1)
    scaled = (d * (1 / nested_absmax.clamp(min=reference.ABSMAX_FLOOR))[:, None]).view(-1)[: absmax.numel()]
    return torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2).to(torch.uint8), nested_absmax


def test_absmax_on_and_around_every_midpoint(device):
    levels = reference.dynamic_map()
    midpoints = ((levels[:-1] + levels[1:]) / 2).view(torch.int32)
    grid = torch.cat([(midpoints + step).view(torch.float32) for step in (-1, 0, 1)] + [levels])
    parts = [torch.cat([torch.ones(1), part]) for part in grid.split(127)]
    absmax = torch.cat([torch.cat([part, -part]) for part in parts])  # mean 0, largest 1: d and x are the values
    codes, nested_absmax, _, offset = (t.cpu() for t in torch.ops.pyfastpeft.quantize_absmax(absmax.to(device)))
    expected, expected_nested = by_offset(absmax, offset)
    assert_same_bytes(codes, expected, "codes")
    assert_same_bytes(nested_absmax, expected_nested, "nested_absmax")
    assert len(codes.unique()) == 256


def test_absmax_without_a_code(device):
    for absmax, message in [
        (torch.tensor([1.0, float("nan")]), "is not finite"),
        (torch.full((3,), 3e38), r"absmax\[0\] = .* quantise it with double_quant=False"),
    ]:
        with pytest.raises(ValueError, match=message):
            torch.ops.pyfastpeft.quantize_absmax(absmax.to(device))
        assert torch.ops.pyfastpeft.quantize_absmax.unchecked(absmax.to(device))[0].shape == absmax.shape


# ---- what only a GPU has ------------------------------------------------------------------------------------------

only_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@only_gpu
def test_stream_and_device_of_the_caller_are_used():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        weight = torch.randn(1 << 24, device="cuda").mul_(2)
        q = pf.ops.quantize_4bit(weight)
        assert q.to("cpu") == pf.ops.quantize_4bit(weight.cpu())
    if torch.cuda.device_count() > 1:
        q = pf.ops.quantize_4bit(torch.ones(1000, device="cuda:1"))
        assert q.device.index == 1 and torch.cuda.current_device() == 0


@only_gpu
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_graph_captures_the_unchecked_op(double_quant):
    weight = torch.randn(300, 64, device="cuda")
    pf.ops.quantize_4bit(weight, double_quant=double_quant, check_finite=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = pf.ops.quantize_4bit(weight, double_quant=double_quant, check_finite=False)
        back = pf.ops.dequantize_4bit(q)
    weight.copy_(torch.randn(300, 64))
    graph.replay()
    expected = pf.ops.quantize_4bit(weight, double_quant=double_quant)
    assert q == expected and torch.equal(back, pf.ops.dequantize_4bit(expected))


@only_gpu
def test_more_than_2_to_the_31_values():
    n = 2**31 + 4097
    if torch.cuda.get_device_properties(0).total_memory < 16 << 30:
        pytest.skip("needs a GPU of 16 GB")
    weight = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    places = torch.tensor([0, 2**31 - 1, 2**31, 2**31 + 4095, n - 1], device="cuda")
    weight[places] = torch.tensor([1, -1, 2, -3, 4], dtype=torch.bfloat16, device="cuda")
    q = pf.ops.quantize_4bit(weight)
    assert torch.equal(pf.ops.dequantize_4bit(q), weight)
    weight[n - 2] = float("nan")
    with pytest.raises(ValueError, match=rf"weight\[{n - 2}\] is nan"):
        pf.ops.quantize_4bit(weight)
