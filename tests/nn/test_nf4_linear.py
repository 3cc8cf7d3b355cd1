"""NF4Linear: numbers against the dense layer it stands for, and what a module must survive (casts, moves, files)."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyfastpeft as pf
from pyfastpeft.nn import NF4Linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATISTICS = ("absmax", "nested_absmax", "nested_map", "offset")


def make(k=48, n=37, bias=True, seed=0, dtype=torch.float32, **kwargs):
    """An NF4Linear and the dense fp64 layer that computes exactly what it should."""
    torch.manual_seed(seed)
    layer = NF4Linear.from_linear(nn.Linear(k, n, bias=bias, dtype=dtype), **kwargs)
    return layer, layer.dequantize(torch.float32).double()


def error(y, truth):
    return (y.double() - truth).norm().item() / truth.norm().item()


def same_statistics(a, b):
    return a.quantized == b.quantized


# --- forward and gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (0, 48)])
def test_forward_equals_the_dequantized_layer(shape, quant_type, dtype):
    layer, dense = make(quant_type=quant_type)
    x = (torch.randn(shape) + 0.5).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 37)
    if y.numel():
        truth = dense(x.double())
        torch_error = error(dense.to(dtype)(x), truth)
        assert error(y, truth) <= 2 * torch_error + 1e-7


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_input_and_bias(bias, dtype):
    layer, dense = make(bias=bias)
    x = (torch.randn(7, 48) + 0.5).to(dtype).requires_grad_()
    go = torch.randn(7, 37).to(dtype)
    layer(x).backward(go)
    truth_x = x.detach().double().requires_grad_()
    dense(truth_x).backward(go.double())
    tolerance = 1e-6 if dtype == torch.float32 else 6e-3
    assert error(x.grad, truth_x.grad) < tolerance
    assert layer.weight.grad is None and not layer.weight.requires_grad
    if bias:
        assert error(layer.bias.grad, dense.bias.grad) < tolerance


def test_compute_dtype_casts_the_input_and_back():
    layer, dense = make(compute_dtype=torch.bfloat16)
    x = torch.randn(5, 48)
    y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, y.bfloat16().float()), "the computation was in bf16"
    assert error(y, dense(x.double())) < 2e-2


def test_autocast_gives_its_dtype_whatever_compute_dtype_says():
    for compute_dtype in (None, torch.float32):
        layer, dense = make(compute_dtype=compute_dtype)
        x = torch.randn(5, 48)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert error(y, dense(x.double())) < 2e-2


def test_strided_input():
    layer, dense = make()
    x = torch.randn(48, 10).t()[::2]
    assert error(layer(x), dense(x.double())) < 1e-6


def test_from_linear_shares_the_bias_and_keeps_the_mode():
    linear = nn.Linear(64, 8).eval()
    layer = NF4Linear.from_linear(linear)
    assert layer.bias is linear.bias and not layer.training
    assert layer.quantized_dtype == torch.float32 and layer.double_quant
    assert (layer.in_features, layer.out_features, layer.blocksize, layer.quant_type) == (64, 8, 64, "nf4")


def test_from_linear_transposes_conv1d():
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(96, 64)
    with torch.no_grad():
        conv.bias.normal_()
    layer = NF4Linear.from_linear(conv)
    assert (layer.in_features, layer.out_features) == (64, 96)
    assert layer.quantized == pf.ops.quantize_4bit(conv.weight.t().contiguous(), double_quant=True)
    x = torch.randn(3, 64)
    assert error(layer(x), conv(x).double()) < 0.2


def test_dequantize_gives_a_linear():
    layer, _ = make(dtype=torch.bfloat16)
    linear = layer.eval().dequantize()
    assert type(linear) is nn.Linear and linear.weight.dtype == torch.bfloat16 and not linear.training
    assert torch.equal(linear.weight, pf.ops.dequantize_4bit(layer.quantized))
    assert torch.equal(linear.bias, layer.bias) and linear.bias is not layer.bias
    assert layer.dequantize(torch.float16).weight.dtype == torch.float16


def test_a_bare_layer_is_zero():
    for double_quant in (True, False):
        layer = NF4Linear(33, 7, double_quant=double_quant, quant_type="fp4")
        assert torch.equal(layer(torch.randn(2, 33)), torch.zeros(2, 7))


@pytest.mark.parametrize("double_quant", [True, False])
def test_compiles_without_a_break(double_quant):
    layer, _ = make(double_quant=double_quant)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 48, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    y.sum().backward()
    assert x.grad is not None


def test_functional_call_uses_the_tensor_it_is_given():
    layer, _ = make(bias=False)
    other = torch.full_like(layer.weight, 0x77)
    y = torch.func.functional_call(layer, {"weight": other}, torch.randn(2, 48))
    assert torch.equal(y, torch.zeros(2, 37))


# --- casts, moves, copies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.type(torch.float16),
        lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)),
    ],
    ids=["half", "bfloat16", "double", "to", "to device and dtype", "type", "to like a tensor"],
)
@pytest.mark.parametrize("inside", [False, True], ids=["itself", "in a parent"])
def test_casts_reach_only_the_bias(cast, inside):
    layer, _ = make(n=256, k=130)  # three nested blocks
    before = copy.deepcopy(layer)
    cast(nn.Sequential(layer) if inside else layer)
    assert same_statistics(layer, before)
    assert [getattr(layer, name).dtype for name in STATISTICS] == [torch.uint8] + 3 * [torch.float32]
    assert layer.weight.dtype == torch.uint8 and layer.bias.dtype != torch.float32
    assert layer.quantized_dtype == torch.float32


def test_a_cast_layer_still_computes_exactly_its_weight():
    layer, dense = make()
    x = torch.randn(4, 48, dtype=torch.bfloat16)
    assert error(layer.to(torch.bfloat16)(x), dense(x.double())) < 1e-2


@pytest.mark.parametrize("double_quant", [True, False])
def test_deepcopy_and_pickle(double_quant):
    layer, _ = make(double_quant=double_quant, compute_dtype=torch.bfloat16)
    x = torch.randn(2, 48)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same_statistics(other, layer) and other.compute_dtype == torch.bfloat16
        assert other.quantized.packed is other.weight, "one set of tensors, not two"
        assert torch.equal(other(x), layer(x))
        with torch.no_grad():
            other.weight.fill_(0x77)
        assert not torch.equal(other(x), layer(x)), "the copy has its own memory"


def test_share_memory():
    layer, _ = make()
    before = copy.deepcopy(layer)
    layer.share_memory()
    tensors = layer.quantized.tensors()
    assert all(tensor.is_shared() for tensor in tensors.values()) and len(tensors) == 5
    assert same_statistics(layer, before)


def test_meta_and_to_empty():
    layer, _ = make()
    saved = layer.state_dict()
    layer.to("meta")
    assert all(tensor.is_meta for tensor in layer.quantized.tensors().values())
    assert layer.state_dict().keys() == saved.keys()
    assert layer(torch.empty(3, 48, device="meta")).shape == (3, 37)
    layer.to_empty(device="cpu")
    assert [tensor.dtype for tensor in layer.quantized.tensors().values()] == [torch.uint8] * 2 + [torch.float32] * 3
    layer.load_state_dict(saved)
    assert layer.quantized == pf.QuantizedTensor.from_state_dict(saved)


# --- state dicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_state_dict_round_trip(quant_type, double_quant, assign):
    layer, _ = make(quant_type=quant_type, double_quant=double_quant, dtype=torch.bfloat16, blocksize=128)
    other = nn.ModuleDict({"fc": NF4Linear(48, 37)})  # another block size, type and dtype
    saved = {f"fc.{key}": value for key, value in layer.state_dict().items()}
    other.load_state_dict(saved, assign=assign)
    assert same_statistics(other["fc"], layer)
    assert torch.equal(other["fc"].bias, layer.bias.to(other["fc"].bias.dtype))
    assert (other["fc"].weight.data_ptr() == layer.weight.data_ptr()) == assign


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 70), k=st.integers(1, 70), blocksize=st.sampled_from([32, 64, 256]), assign=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4"]), double_quant=st.booleans(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_layer_survives_its_state_dict_and_computes_its_weight(
    n, k, blocksize, assign, quant_type, double_quant, dtype
):
    torch.manual_seed(n)
    linear = nn.Linear(k, n, dtype=dtype)
    layer = NF4Linear.from_linear(linear, blocksize=blocksize, quant_type=quant_type, double_quant=double_quant)
    other = NF4Linear(k, n, dtype=dtype)
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert same_statistics(other, layer)
    x = torch.randn(3, k)
    truth = layer.dequantize(torch.float32).double()(x.double())
    torch.testing.assert_close(other(x).double(), truth, atol=1e-5, rtol=1e-5)


def test_loading_writes_into_the_tensors_that_are_there():
    layer, _ = make()
    other, _ = make(seed=1)
    held = other.quantized.tensors()
    other.load_state_dict(layer.state_dict())
    assert all(torch.equal(tensor, getattr(layer.quantized, name)) for name, tensor in held.items())


def test_meta_construction_then_assign():
    layer, _ = make()
    with torch.device("meta"):
        other = nn.Sequential(NF4Linear(48, 37))
    saved = nn.Sequential(layer).state_dict()
    with pytest.raises(RuntimeError, match=r"0\.weight is on the meta device.*assign=True"):
        with pytest.warns(UserWarning, match="bias"):  # torch's own word about the bias
            other.load_state_dict(saved)
    other.load_state_dict(saved, assign=True)
    assert same_statistics(other[0], layer) and not other[0].weight.requires_grad
    x = torch.randn(2, 48)
    assert torch.equal(other(x), layer(x))


def test_weights_only_file():
    layer, _ = make()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = NF4Linear(48, 37)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same_statistics(other, layer)


def test_safetensors_file(tmp_path):
    from safetensors.torch import load_file, save_file

    model = nn.Sequential(make()[0], make(seed=1, double_quant=False)[0])
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = nn.Sequential(NF4Linear(48, 37), NF4Linear(48, 37))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert same_statistics(other[0], model[0]) and same_statistics(other[1], model[1])


def test_missing_keys_are_named_and_nothing_is_half_loaded():
    layer, _ = make()
    target, _ = make(seed=1)
    before = copy.deepcopy(target)
    for key in ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"):
        saved = layer.state_dict()
        del saved[key]
        with pytest.raises(RuntimeError, match=f'Missing key.*"0.{key}"'):
            nn.Sequential(target).load_state_dict({f"0.{k}": v for k, v in saved.items()})
        result = target.load_state_dict(saved, strict=False)
        assert key in result.missing_keys
        assert same_statistics(target, before), key
    result = target.load_state_dict({}, strict=False)
    assert result.missing_keys == ["weight", "bias"]


def test_unexpected_keys_are_named():
    layer, _ = make()
    saved = layer.state_dict() | {"weight.scales": torch.ones(1), "extra": torch.ones(1)}
    with pytest.raises(RuntimeError, match='Unexpected key.*"weight.scales", "extra"'):
        NF4Linear(48, 37).load_state_dict(saved)
    target = NF4Linear(48, 37)
    assert target.load_state_dict(saved, strict=False).unexpected_keys == ["weight.scales", "extra"]
    assert same_statistics(target, layer)


def test_bias_presence_must_agree():
    layer, _ = make(bias=False)
    with pytest.raises(RuntimeError, match='Missing key.*"bias"'):
        NF4Linear(48, 37).load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match='Unexpected key.*"bias"'):
        layer.load_state_dict(make()[0].state_dict())


def test_hooks_see_their_prefix_and_may_change_the_state_dict():
    layer, _ = make()
    calls = []

    def rename(module, state_dict, prefix, *rest):
        calls.append(prefix)
        for key in [key for key in state_dict if key.startswith(prefix + "old_weight")]:
            state_dict[key.replace("old_weight", "weight")] = state_dict.pop(key)

    target = nn.ModuleDict({"fc": NF4Linear(48, 37)})
    target["fc"].register_load_state_dict_pre_hook(rename)
    saved = {f"fc.{key}".replace("weight", "old_weight", 1): v for key, v in layer.state_dict().items()}
    target.load_state_dict(saved)
    assert same_statistics(target["fc"], layer) and calls == ["fc."]

    layer.register_state_dict_post_hook(lambda m, sd, prefix, meta: calls.append(prefix))
    nn.ModuleDict({"a": layer}).state_dict()
    assert calls == ["fc.", "a."]


# --- bad input -------------------------------------------------------------------------------------------------------


def bad_state(change):
    layer, _ = make()
    saved = layer.state_dict()
    change(saved)
    return saved


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (lambda: nn.Linear(48, 37).state_dict(), "dense torch.float32 weight of shape .*quantize_model"),
        (
            lambda: NF4Linear(49, 37).state_dict(),
            r"size mismatch for weight: the file holds \(37, 49\), expected \(37, 48\)",
        ),
        (lambda: bad_state(lambda s: s.update({"weight.absmax": torch.zeros(3)})), "absmax"),
        (lambda: bad_state(lambda s: s["weight.nested_absmax"].fill_(float("nan"))), "NaN"),
        (lambda: bad_state(lambda s: s["weight.quant_map"].zero_()), "quant_map"),
        (lambda: bad_state(lambda s: s["weight.quant_state.bitsandbytes__nf4"].fill_(0)), "JSON"),
        (lambda: bad_state(lambda s: s.pop("weight.nested_quant_map")), "nested_quant_map is missing"),
    ],
)
def test_bad_state_dicts_are_named_and_change_nothing(saved, message):
    target, _ = make(seed=1)
    before = copy.deepcopy(target)
    with pytest.raises(RuntimeError, match=message):
        target.load_state_dict(saved())
    assert same_statistics(target, before)


def nan_linear():
    linear = nn.Linear(8, 4)
    with torch.no_grad():
        linear.weight[2, 5] = float("nan")
    return linear


def hooked_linear():
    linear = nn.Linear(8, 4)
    linear.register_forward_hook(lambda *a: None)
    return linear


@pytest.mark.parametrize(
    ("make_linear", "kwargs", "exception", "message"),
    [
        (lambda: nn.Linear(8, 4), {"blocksize": 63}, ValueError, "blocksize"),
        (lambda: nn.Linear(8, 4), {"quant_type": "int4"}, ValueError, "quant_type|nf4"),
        (lambda: nn.Linear(8, 4), {"compute_dtype": torch.int8}, TypeError, "compute_dtype is torch.int8"),
        (lambda: nn.Linear(8, 4).double(), {}, TypeError, "float64"),
        (lambda: nn.Linear(8, 4, device="meta"), {}, ValueError, "meta device"),
        (lambda: nn.Embedding(8, 4), {}, TypeError, "got Embedding, expected torch.nn.Linear"),
        (lambda: NF4Linear(8, 4), {}, ValueError, "already quantised"),
        (nan_linear, {}, ValueError, r"weight\[2, 5\] is nan"),
        (hooked_linear, {}, ValueError, "hooks"),
    ],
)
def test_from_linear_refuses(make_linear, kwargs, exception, message):
    with pytest.raises(exception, match=message):
        NF4Linear.from_linear(make_linear(), **kwargs)


@pytest.mark.parametrize(
    ("x", "exception", "message"),
    [
        (torch.randn(2, 47), (ValueError, RuntimeError), "47"),
        (torch.zeros(2, 48, dtype=torch.uint8), TypeError, "torch.uint8.*skip="),
        (torch.zeros(2, 48, dtype=torch.float64), TypeError, "float64"),
    ],
)
def test_bad_x_is_named(x, exception, message):
    with pytest.raises(exception, match=message):
        make()[0](x)


def test_constructor_and_from_quantized_refuse():
    with pytest.raises(ValueError, match="blocksize is 0"):
        NF4Linear(8, 4, blocksize=0)
    with pytest.raises(ValueError, match=r"shape \(8,\), expected \[N, K\]"):
        NF4Linear.from_quantized(pf.ops.quantize_4bit(torch.randn(8)))
    with pytest.raises(ValueError, match=r"bias has shape \(3,\)"):
        NF4Linear.from_quantized(pf.ops.quantize_4bit(torch.randn(4, 8)), nn.Parameter(torch.zeros(3)))
