"""NF4Linear's state dict: round trips, files, what is missing, unexpected or damaged is named, nothing is half loaded."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyfastpeft.nn import NF4Linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(k=48, n=37, bias=True, seed=0, dtype=torch.float32, **kwargs):
    """An NF4Linear and the dense fp64 layer that computes exactly what it should."""
    torch.manual_seed(seed)
    layer = NF4Linear.from_linear(nn.Linear(k, n, bias=bias, dtype=dtype), **kwargs)
    return layer, layer.dequantize(torch.float32).double()


def error(y, truth):
    return (y.double() - truth).norm().item() / truth.norm().item()


def same_statistics(a, b):
    return a.quantized == b.quantized


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


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_does_not_reach_the_tables(device):
    from pyfastpeft.reference import nf4

    nf4._table.cache_clear(), nf4._dynamic_map.cache_clear()
    with torch.device(device):
        other = NF4Linear(48, 37)
    layer, dense = make()
    with torch.device(device):
        again = NF4Linear.from_linear(nn.Linear(48, 37, device="cpu"))
        other.load_state_dict(layer.state_dict(), assign=True)
    assert other.quantized == layer.quantized and again.weight.device.type == "cpu"
    x = torch.randn(3, 48)
    assert error(other(x), dense(x.double())) < 1e-6 and again(x).isfinite().all()


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


# --- damaged -------------------------------------------------------------------------------------------------------


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
