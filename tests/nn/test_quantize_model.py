"""quantize_model: what it replaces, what it leaves and says so, what it refuses, and the memory it takes."""

import copy
import weakref

import pytest
import torch
from small_model import Model, kinds, make
from torch import nn

import pyfastpeft as pf
from pyfastpeft.nn import NF4Linear, nf4_linear
from pyfastpeft.nn.quantization_report import readable_bytes

pytestmark = pytest.mark.filterwarnings("ignore:quantize_model. 1 3-D expert weights")


def test_replaces_the_linear_layers_in_place():
    model = make()
    dense = copy.deepcopy(model)
    assert pf.quantize_model(model) is model
    for name in ("layers.0.q_proj", "layers.1.down_proj"):
        layer = model.get_submodule(name)
        assert layer.quantized == pf.ops.quantize_4bit(dense.get_submodule(name).weight, double_quant=True)
        assert layer.compute_dtype is None
    assert torch.equal(model.layers[0].q_proj.bias, dense.layers[0].q_proj.bias)
    assert type(model.lm_head) is nn.Linear
    x = torch.randn(3, 64)
    assert (model.layers[0](x) - dense.layers[0](x)).norm() / dense.layers[0](x).norm() < 0.2


def test_dense_experts_are_warned_of():
    with pytest.warns(
        UserWarning, match=r"1 3-D expert weights stay dense, 32.8 kB of .*: experts.gate_up_proj \[4, 32, 64\]"
    ):
        pf.quantize_model(make())


def test_options_reach_the_layers():
    model = pf.quantize_model(
        make(), blocksize=32, quant_type="fp4", double_quant=False, skip=(), compute_dtype=torch.bfloat16
    )
    for layer in (model.layers[0].q_proj, model.lm_head):
        assert (layer.blocksize, layer.quant_type, layer.double_quant) == (32, "fp4", False)
        assert layer.compute_dtype == torch.bfloat16


def test_the_report_names_everything():
    model = pf.quantize_model(make(tie=True))
    report = model.quantization_report
    assert [entry.name for entry in report.quantized] == [
        f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "down_proj")
    ]
    entry = report.quantized[1]
    assert (entry.kind, entry.shape, entry.dtype, entry.bytes_before) == ("Linear", (128, 64), "float32", 4 * 128 * 64)
    assert entry.bytes_after == model.layers[0].down_proj.quantized.nbytes
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert reasons["lm_head.weight"] == "tied to embed.weight"
    assert reasons["embed.weight"] == "an embedding" and reasons["conv.weight"] == "a convolution"
    assert reasons["experts.gate_up_proj"].startswith("a 3-D weight of Experts (all experts")
    assert report.reason("lm_head") == reasons["lm_head.weight"] and report.reason("layers.0.q_proj") is None
    assert len(reasons) == 4, "no more than these have two dimensions"
    assert report.bytes_before == 4 * 2 * 64 * (64 + 128)
    assert 4.1 < report.bits_per_weight < 8.0  # small layers: the 1 kB nested map weighs

    text = str(report)
    for part in (
        "NF4, block size 64, double quantisation: 4 layers, 98.3 kB ->",
        "layers.*.q_proj × 2  Linear [64, 64] float32",
        "not quantised",
        "lm_head.weight  Linear [100, 64] float32: tied to embed.weight",
        "experts.gate_up_proj  Experts [4, 32, 64] float32: a 3-D weight",
    ):
        assert part in text, text


def test_model_bytes_count_shared_tensors_once():
    model = make(tie=True)
    dense = sum(p.nbytes for p in model.parameters())
    pf.quantize_model(model)
    report = model.quantization_report
    assert report.model_bytes_before == dense
    assert report.model_bytes_after == dense - report.bytes_before + report.bytes_after


def test_readable_bytes():
    assert [readable_bytes(n) for n in (0, 999, 1000, 98304, 13_480_000_000, 2 * 10**12)] == [
        "0 bytes", "999 bytes", "1 kB", "98.3 kB", "13.5 GB", "2 TB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (None, []),
        ((), []),
        ("lm_head", ["lm_head"]),
        (["layers.0"], ["layers.0.q_proj", "layers.0.down_proj"]),
        (["down_proj", "lm_head"], ["layers.0.down_proj", "layers.1.down_proj", "lm_head"]),
        ([r"layers\.\d\.q_.*"], ["layers.0.q_proj", "layers.1.q_proj"]),
        (["0.q_proj"], ["layers.0.q_proj"]),
        (["embed"], []),
    ],
)
def test_skip(skip, left):
    model = pf.quantize_model(make(), skip=skip)
    assert sorted(name for name, kind in kinds(model).items() if kind is nn.Linear) == sorted(left)
    for name in left:
        assert "in skip (" in model.quantization_report.reason(name)


@pytest.mark.parametrize(
    ("skip", "exception", "message"),
    [
        (["dwon_proj"], ValueError, "'dwon_proj' matches no module; did you mean down_proj"),
        (["xyz"], ValueError, "its linear layers end in down_proj, lm_head, q_proj"),
        (["*.q_proj"], ValueError, "neither a module's path nor a regular expression"),
        ([3], TypeError, "3 .int., expected paths as strings"),
    ],
)
def test_a_skip_entry_without_a_match_is_an_error(skip, exception, message):
    model = make()
    before = kinds(model)
    with pytest.raises(exception, match=message):
        pf.quantize_model(model, skip=skip)
    assert kinds(model) == before


def test_the_default_skip_needs_no_lm_head():
    model = pf.quantize_model(nn.Sequential(nn.Linear(64, 64), nn.ReLU()))
    assert type(model[0]) is NF4Linear and model.quantization_report.skipped == []


def test_a_layer_used_twice_stays_one_layer():
    shared = nn.Linear(64, 64)
    inner = nn.ModuleDict({"again": shared})
    model = pf.quantize_model(nn.ModuleDict({"a": shared, "b": inner, "c": inner}))
    assert type(model["a"]) is NF4Linear and model["b"]["again"] is model["a"] and model["c"] is model["b"]
    assert len(model.quantization_report.quantized) == 1


def test_two_layers_sharing_one_weight_are_tied():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    model[2].weight = nn.Parameter(model[2].weight.detach())
    pf.quantize_model(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear, NF4Linear]
    assert model.quantization_report.reason("0") == "tied to 1.weight"


def test_equal_memory_behind_two_parameters_is_tied_too():
    model = nn.ModuleDict({"embed": nn.Embedding(64, 64), "out": nn.Linear(64, 64), "fc": nn.Linear(64, 64)})
    model["out"].weight = nn.Parameter(model["embed"].weight.detach())
    pf.quantize_model(model)
    assert model.quantization_report.reason("out") == "tied to embed.weight"


def test_layers_whose_weight_others_read_are_left():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(64, 2, batch_first=True),
            "encoder": nn.TransformerEncoderLayer(64, 2, 64, batch_first=True),
            "fc": nn.Linear(64, 64),
            "hooked": nn.Linear(64, 64),
            "empty": nn.Linear(0, 4),
        }
    )
    model["hooked"].register_forward_pre_hook(lambda *a: None)
    pf.quantize_model(model.eval())
    report = model.quantization_report
    assert [entry.name for entry in report.quantized] == ["fc"]
    assert report.reason("attention.out_proj") == "MultiheadAttention reads its weight directly"
    assert report.reason("encoder.linear1") == "TransformerEncoderLayer reads its weight directly"
    assert "hooks" in report.reason("hooked") and report.reason("empty") == "has no values"
    x = torch.randn(1, 3, 64)
    with torch.no_grad():
        model["encoder"](x)  # the fast path, which takes weights and calls no module
        model["attention"](x, x, x)


# --- refusals: named, and the model is as it was -----------------------------------------------------------------------


def nan_model():
    model = make()
    with torch.no_grad():
        model.layers[1].down_proj.weight[3, 7] = float("nan")
    return model


def meta_model():
    with torch.device("meta"):
        return Model()


def int8_model():
    model = make()
    model.layers[1].q_proj.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    return model


def bitsandbytes_model():
    import bitsandbytes as bnb

    return nn.Sequential(nn.Linear(64, 64), bnb.nn.Linear4bit(64, 64))


def huge_model():
    model = make()
    nn.init.constant_(model.layers[1].q_proj.weight, 3e38)
    return model


def adapted_model():
    import peft

    return peft.get_peft_model(make(), peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("make_model", "kwargs", "exception", "message"),
    [
        (nan_model, {}, ValueError, r"layers\.1\.down_proj\.weight\[3, 7\] is nan"),
        (meta_model, {}, ValueError, r"layers\.0\.q_proj\.weight is on the meta device"),
        (int8_model, {}, TypeError, r"layers\.1\.q_proj\.weight has dtype torch\.int8"),
        (lambda: make().double(), {}, TypeError, r"float64.*model\.float\(\)"),
        (lambda: pf.quantize_model(make()), {}, ValueError, r"already quantised: layers\.0\.q_proj is an NF4Linear"),
        (bitsandbytes_model, {}, ValueError, r"already quantised: 1 is a bitsandbytes.*Linear4bit"),
        (adapted_model, {}, ValueError, "has adapters: .* is a peft.tuners"),
        (huge_model, {}, ValueError, r"layers\.1\.q_proj: .*double_quant=False"),
        (make, {"blocksize": 48}, ValueError, "blocksize is 48"),
        (make, {"quant_type": "nf3"}, ValueError, "quant_type is 'nf3'"),
        (make, {"compute_dtype": torch.float64}, TypeError, "compute_dtype is torch.float64"),
        (lambda: nn.Linear(64, 64), {}, ValueError, "itself a Linear.*from_linear"),
        (lambda: nn.Sequential(nn.ReLU()), {}, ValueError, "nothing to quantise.*no linear layer"),
        (make, {"skip": ["layers", "lm_head"]}, ValueError, "nothing to quantise.*in skip"),
    ],
)
def test_refusals(make_model, kwargs, exception, message):
    model = make_model()
    before = kinds(model)
    with pytest.raises(exception, match=message):
        pf.quantize_model(model, **kwargs)
    assert kinds(model) == before


def test_a_skipped_layer_may_hold_anything():
    model = pf.quantize_model(nan_model(), skip=("down_proj", "lm_head"))
    assert type(model.layers[0].q_proj) is NF4Linear


# --- memory ----------------------------------------------------------------------------------------------------------


def test_each_dense_weight_is_freed_before_the_next_is_touched(monkeypatch):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []
    original = NF4Linear.from_linear.__func__

    def watched(cls, linear, *args):
        alive.append(sum(weight() is not None for weight in weights))
        return original(cls, linear, *args)

    monkeypatch.setattr(nf4_linear.NF4Linear, "from_linear", classmethod(watched))
    pf.quantize_model(model)
    assert alive == [5, 4, 3, 2, 1]
    assert not any(weight() is not None for weight in weights)


def test_a_failure_after_the_checks_says_where_it_stopped(monkeypatch):
    model = make()
    original = NF4Linear.from_linear.__func__

    def failing(cls, linear, *args):
        if linear is model.layers[1].q_proj:
            raise RuntimeError("out of memory")
        return original(cls, linear, *args)

    monkeypatch.setattr(nf4_linear.NF4Linear, "from_linear", classmethod(failing))
    with pytest.raises(RuntimeError, match=r"stopped at layers\.1\.q_proj: out of memory; 2 of 4 layers"):
        pf.quantize_model(model)


def test_progress_bar_only_for_large_models(monkeypatch):
    import rich.progress

    from pyfastpeft import quantize_model as _function  # noqa: F401

    shown = []
    monkeypatch.setattr(rich.progress.Progress, "advance", lambda self, task: shown.append(task))
    pf.quantize_model(make())
    assert shown == []
    import sys

    monkeypatch.setattr(sys.modules["pyfastpeft.quantize_model"], "_PROGRESS_FROM", 1000)
    pf.quantize_model(make())
    assert len(shown) == 4


# --- the way back, and files --------------------------------------------------------------------------------------------


def test_dequantize_model():
    model = pf.quantize_model(make().to(torch.bfloat16))
    weight = pf.ops.dequantize_4bit(model.layers[0].q_proj.quantized)
    assert pf.dequantize_model(model) is model
    assert NF4Linear not in kinds(model).values() and not hasattr(model, "quantization_report")
    assert model.layers[0].q_proj.weight.dtype == torch.bfloat16
    assert torch.equal(model.layers[0].q_proj.weight, weight)
    assert pf.dequantize_model(pf.quantize_model(make()), torch.float16).layers[0].q_proj.weight.dtype == torch.float16
