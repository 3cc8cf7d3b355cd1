"""QuantizedTensor: what it holds, what it refuses, and its state-dict keys both ways."""

import copy
import dataclasses
import io
import json
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import pyfastpeft as pf
from pyfastpeft import QuantizedTensor
from pyfastpeft.reference.nf4 import dynamic_map, quant_map


def _weight(shape=(33, 65), dtype=torch.bfloat16, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1).to(dtype)


@pytest.fixture(params=[False, True], ids=["plain", "nested"])
def q(request):
    return pf.ops.quantize_4bit(_weight(), 32, "nf4", double_quant=request.param)


def test_what_it_holds(q):
    n, blocks = 33 * 65, -(-33 * 65 // 32)
    assert q.packed.shape == ((n + 1) // 2, 1) and q.packed.dtype == torch.uint8
    assert q.absmax.shape == (blocks,) and q.absmax.dtype == (torch.uint8 if q.is_nested else torch.float32)
    assert (q.blocksize, q.quant_type, q.shape, q.dtype) == (32, "nf4", torch.Size([33, 65]), torch.bfloat16)
    nested_bytes = 4 * -(-blocks // 256) + 1024 + 4
    assert q.nbytes == (n + 1) // 2 + (blocks + nested_bytes if q.is_nested else 4 * blocks)
    assert q.device == torch.device("cpu")
    assert "nf4" in repr(q) and "(33, 65)" in repr(q) and ("nested" in repr(q)) == q.is_nested
    assert torch.equal(torch.ops.pyfastpeft.dequantize_4bit(*q.flat()), pf.ops.dequantize_4bit(q))


def test_copies_are_equal_and_independent(q):
    file = io.BytesIO()
    torch.save(q.state_dict(), file)
    file.seek(0)
    loaded = QuantizedTensor.from_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), loaded):
        assert other == q
        other.packed[0] ^= 1
        assert other != q
    assert q != dataclasses.replace(q, dtype=torch.float32) and q != 3


def test_to(q):
    assert q.to("cpu") is q
    meta = q.to("meta")
    assert meta.device.type == "meta" and meta.shape == q.shape and meta.nbytes == q.nbytes and meta != q
    with pytest.raises(TypeError, match="expected a device; dequantize_4bit"):
        q.to(torch.float16)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            {"packed": torch.zeros(5, 1, dtype=torch.uint8)},
            ValueError,
            r"packed has shape \(5, 1\), expected \(1073, 1\)",
        ),
        ({"packed": torch.zeros(1073, dtype=torch.uint8)}, ValueError, r"packed has shape \(1073,\)"),
        ({"packed": torch.zeros(1073, 1)}, TypeError, "packed has dtype torch.float32, expected torch.uint8"),
        ({"absmax": torch.zeros(67, dtype=torch.uint8)}, ValueError, r"absmax has shape \(67,\), expected \(68,\)"),
        ({"absmax": torch.zeros(68)}, TypeError, "absmax has dtype torch.float32, expected torch.uint8"),
        (
            {"absmax": torch.zeros(68, dtype=torch.uint8, device="meta")},
            ValueError,
            "absmax is on meta, packed is on cpu",
        ),
        ({"nested_absmax": None}, ValueError, "come together or not at all"),
        ({"nested_absmax": torch.zeros(2)}, ValueError, r"nested_absmax has shape \(2,\), expected \(1,\)"),
        ({"nested_map": torch.zeros(16)}, ValueError, r"nested_map has shape \(16,\), expected \(256,\)"),
        ({"offset": torch.zeros(1)}, ValueError, r"offset has shape \(1,\), expected \(\)"),
        ({"blocksize": 48}, ValueError, "blocksize is 48"),
        ({"quant_type": "int8"}, ValueError, "quant_type is 'int8'"),
        ({"dtype": torch.float64}, TypeError, "dtype is torch.float64"),
        ({"shape": (33, 64)}, ValueError, "packed has shape"),
    ],
)
def test_parts_that_do_not_fit_are_named(change, error, match):
    q = pf.ops.quantize_4bit(_weight(), 32, "nf4", double_quant=True)
    with pytest.raises(error, match=match):
        dataclasses.replace(q, **change)


# ---- state dict ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    blocksize=st.sampled_from([32, 64, 4096]),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    nested=st.booleans(),
    prefix=st.sampled_from(["weight", "model.layers.0.q_proj.weight", "a"]),
)
def test_any_tensor_survives_its_state_dict(shape, blocksize, quant_type, dtype, nested, prefix):
    q = pf.ops.quantize_4bit(_weight(shape, dtype), blocksize, quant_type, nested)
    state = q.state_dict(prefix)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    others = {f"{prefix}_other": torch.zeros(1), "bias": torch.zeros(3), f"x.{prefix}.absmax": torch.zeros(1)}
    assert QuantizedTensor.from_state_dict({**state, **others}, prefix) == q


def test_keys(q):
    state = q.state_dict("m.weight")
    nested = {"m.weight.nested_absmax", "m.weight.nested_quant_map"} if q.is_nested else set()
    assert (
        set(state)
        == {"m.weight", "m.weight.absmax", "m.weight.quant_map", STATE.replace("weight", "m.weight")} | nested
    )
    assert torch.equal(state["m.weight.quant_map"], quant_map("nf4"))


STATE = "weight.quant_state.bitsandbytes__nf4"


def _json(value) -> torch.Tensor:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return torch.tensor(list(data), dtype=torch.uint8)


def _meta(state) -> dict:
    return json.loads(bytes(state[STATE].tolist()))


def _with_meta(**changes):
    def change(state):
        meta = _meta(state) | changes
        state[STATE] = _json({key: value for key, value in meta.items() if value is not ...})

    return change


def _without(key):
    return lambda state: state.pop(key)


def _with(key, value):
    return lambda state: state.update({key: value})


BROKEN = [
    (_without("weight"), "there is no key 'weight'.*weight.absmax"),
    (_without("weight.absmax"), "weight.absmax is missing"),
    (_without("weight.quant_map"), "weight.quant_map is missing"),
    (_without("weight.nested_absmax"), "weight.nested_absmax is missing"),
    (_without("weight.nested_quant_map"), "weight.nested_quant_map is missing"),
    (_without(STATE), r"weight.quant_state.bitsandbytes__nf4 \(or __fp4\) is missing"),
    (_with("weight.scale", torch.zeros(1)), "unknown key weight.scale"),
    (_with("weight.quant_state.bitsandbytes__fp4", _json({})), "expected exactly one of"),
    (_with("weight.quant_state.other", _json({})), "weight.quant_state.other found, expected exactly one of"),
    (_with("weight", torch.zeros(33, 65)), r"weight has shape \(33, 65\), expected \[bytes, 1\]"),
    (_with("weight", "bytes"), "weight is a str, expected packed bytes"),
    (_with("weight", torch.zeros(1072, 1, dtype=torch.uint8)), r"packed has shape \(1072, 1\), expected \(1073, 1\)"),
    (_with("weight.absmax", torch.zeros(68)), "absmax has dtype torch.float32, expected torch.uint8"),
    (_with("weight.absmax", torch.zeros(9, dtype=torch.uint8)), r"absmax has shape \(9,\), expected \(68,\)"),
    (_with("weight.absmax", [1.0]), "weight.absmax is a list, expected a tensor"),
    (_with("weight.nested_absmax", torch.tensor([float("nan")])), "nested_absmax holds NaN or infinity"),
    (_with("weight.nested_quant_map", torch.zeros(255)), r"nested_map has shape \(255,\)"),
    (_with("weight.quant_map", torch.zeros(16)), "differs from the nf4 table at code 0: 0.0, expected -1.0"),
    (_with("weight.quant_map", quant_map("fp4")), "differs from the nf4 table at code 0"),
    (_with("weight.quant_map", torch.zeros(15)), r"quant_map has shape \(15,\)"),
    (_with(STATE, torch.zeros(3)), "expected a 1-D uint8 tensor of UTF-8 JSON"),
    (_with(STATE, _json({}).to("meta")), "holds no data"),
    (_with(STATE, _json(b"")), "is not valid UTF-8 JSON"),
    (_with(STATE, _json(b'{"quant_type": "nf4"')), "is not valid UTF-8 JSON"),
    (_with(STATE, _json(b'\xff\xfe{"quant_type"')), "is not valid UTF-8 JSON"),
    (_with(STATE, _json(b"__import__('os').abort()")), "is not valid UTF-8 JSON"),
    (_with(STATE, _json(b"[" * 100000)), "is not valid UTF-8 JSON"),
    (_with(STATE, _json([1])), "holds a JSON list, expected an object"),
    (_with_meta(quant_type="fp4"), "says quant_type 'fp4', which its name denies"),
    (_with_meta(blocksize=48), "blocksize is 48"),
    (_with_meta(blocksize=64), r"absmax has shape \(68,\), expected \(34,\)"),
    (_with_meta(blocksize="32"), "blocksize is '32', expected a whole number"),
    (_with_meta(blocksize=True), "blocksize is True, expected a whole number"),
    (_with_meta(dtype="float64"), "dtype is 'float64', expected one of float32, float16, bfloat16"),
    (_with_meta(dtype="load"), "dtype is 'load'"),
    (_with_meta(dtype=["float32"]), "dtype is .'float32'."),
    (_with_meta(shape=None), "shape is None, expected a list of sizes"),
    (_with_meta(shape=[33, -65]), "expected a list of sizes"),
    (_with_meta(shape=[33.0, 65]), "expected a list of sizes"),
    (_with_meta(shape=[33, 1 << 62]), "expected a list of sizes"),
    (_with_meta(shape=[65, 66]), "packed has shape"),
    (_with_meta(shape=...), "shape is missing"),
    (_with_meta(extra=1), "extra is unknown"),
    (_with_meta(nested_blocksize=128), "nested_blocksize is 128, expected 256"),
    (_with_meta(nested_blocksize=...), "nested_blocksize is missing"),
    (_with_meta(nested_dtype="float16"), "nested_dtype is 'float16', expected one of float32"),
    (_with_meta(nested_offset=float("nan")), "nested_offset is nan, expected a finite float32"),
    (_with_meta(nested_offset="0.1"), "nested_offset is '0.1'"),
    (_with_meta(nested_offset=10**400), "nested_offset is"),
    (_with_meta(nested_offset=1e300), "nested_offset is 1e"),
]


@pytest.mark.parametrize(("change", "match"), BROKEN, ids=[match[:40] for _, match in BROKEN])
def test_a_broken_state_dict_is_named(change, match):
    state = pf.ops.quantize_4bit(_weight(), 32, "nf4", double_quant=True).state_dict()
    change(state)
    with pytest.raises((ValueError, TypeError), match=match):
        QuantizedTensor.from_state_dict(state)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_no_damaged_json_does_anything_but_raise(data):
    state = pf.ops.quantize_4bit(_weight(), 32, "nf4", double_quant=True).state_dict()
    raw = bytearray(bytes(state[STATE].tolist()))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    state[STATE] = _json(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    try:
        loaded = QuantizedTensor.from_state_dict(state)
    except (ValueError, TypeError):
        return
    assert loaded.shape.numel() == 33 * 65 and loaded.offset.isfinite()


def test_the_stored_map_is_trusted():
    state = pf.ops.quantize_4bit(_weight(), 32, "nf4", double_quant=True).state_dict()
    state["weight.nested_quant_map"] = state["weight.nested_quant_map"] * 2
    q = QuantizedTensor.from_state_dict(state)
    assert torch.equal(q.nested_map, dynamic_map() * 2)


@pytest.mark.parametrize("storage", [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_other_storage_dtypes_and_transposed_weights_are_read(q, storage, transposed):
    q = pf.ops.quantize_4bit(_weight((32, 64)), 32, "nf4", q.is_nested)
    state = q.state_dict()
    state["weight"] = state["weight"].view(-1).view(storage)[:, None]
    if transposed:
        state["weight"] = state["weight"].t()
    assert QuantizedTensor.from_state_dict(state) == q
    assert q.state_dict()["weight"].shape == (1024, 1) and q.state_dict()["weight"].dtype == torch.uint8


def test_plain_entries_instead_of_json_are_read(q):
    state = q.state_dict()
    meta = _meta(state)
    del state[STATE]
    state |= {f"weight.{key}": value for key, value in meta.items()}
    assert QuantizedTensor.from_state_dict(state) == q
    state["weight.dtype"] = torch.bfloat16
    assert QuantizedTensor.from_state_dict(state) == q


@pytest.mark.parametrize("seven", [False, True])
@pytest.mark.parametrize("with_map", [False, True])
def test_the_list_of_old_releases_is_read(q, seven, with_map):
    nested = None
    if q.is_nested:
        inner = (
            [q.nested_absmax, q.nested_map] if with_map else [q.nested_absmax, (68,), torch.float32, 256, None, None]
        )
        nested = [q.offset, inner]
    state = [q.absmax, tuple(q.shape), q.dtype, q.blocksize, nested, q.quant_type]
    state += [quant_map("nf4")] if seven else []
    assert QuantizedTensor.from_state_dict({"weight": q.packed, "weight.quant_state": state}) == q
    for broken, match in [
        (state[:5], "is a list of 5 parts, expected 6 or 7"),
        ([*state[:4], [1.0], "nf4"], r"quant_state\[4\] is a list, expected None or"),
        ([*state[:4], [1.0, []], "nf4"], "has no nested absmax"),
        ([torch.zeros(3), *state[1:]], "absmax has"),
        ([*state[:2], "float64", *state[3:]], "dtype is 'float64'"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            QuantizedTensor.from_state_dict({"weight": q.packed, "weight.quant_state": broken})


def test_compiled_code_takes_and_returns_one(q):
    def f(q, x):
        return pf.ops.dequantize_4bit(q, torch.float32) @ x

    x = torch.randn(65)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(q, x), f(q, x))
