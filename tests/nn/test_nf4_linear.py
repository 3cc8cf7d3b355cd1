"""NF4Linear: numbers against the dense layer it stands for, and what a module must survive (casts, moves, files)."""

import copy
import pickle

import pytest
import torch
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


# --- bad input ------------------------------------------------------------------------------------------


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
