"""BitFit: which biases, created ones, norms, values against changing the model's own, files, and bad input."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pyfastpeft as pf
from pyfastpeft.methods.bitfit import BitFitLayer
from tests.methods.contract import adapted, scatter
from tests.methods.models import batch, build
from tests.methods.test_targets import assert_unchanged, snapshot

BITFIT = pf.PeftType.BITFIT


def logits(model, kind):
    with torch.no_grad():
        return model(**batch(kind)).logits


def bitfit(kind, **config):
    return pf.get_peft_model(build(kind), pf.BitFitConfig(**config)).eval()


def keys(model):
    return {key.removeprefix("base_model.model.") for key in model.base_model.tensors("default")}


def test_all_biases_of_a_model_that_has_them():
    plain = build("gpt2")
    own = {name for name, _ in plain.named_parameters() if name.endswith("bias")}
    assert keys(bitfit("gpt2")) == own
    assert keys(bitfit("gpt2", create_biases=False)) == own
    own = {name for name, _ in build("bert").named_parameters() if name.endswith("bias")}
    model = bitfit("bert", task_type="SEQ_CLS")  # the head is trained whole, bias and all
    assert keys(model) == own | {"classifier.weight"}
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(t.numel() for t in model.base_model.tensors("default").values()) < total / 4


def test_biases_are_created_where_there_are_none():
    model = bitfit("llama")
    linears = {n for n, m in build("llama").named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert keys(model) == {f"{name}.bias" for name in linears} and len(linears) == 14
    assert all(not tensor.any() for tensor in model.base_model.tensors("default").values())
    norms = keys(bitfit("llama", train_norms=True)) - keys(model)
    assert norms == {n for n, _ in build("llama").named_parameters() if "norm" in n} and len(norms) == 5
    assert "lm_head.bias" in keys(bitfit("llama", target_modules=["lm_head", "q_proj"]))


@pytest.mark.parametrize(
    ("config", "ends"),
    [
        ({"target_modules": ["query", "attention.output.LayerNorm"]}, {"query.bias", "attention.output.LayerNorm.bias"}),
        ({"target_modules": r".*\.layer\.1\..*dense"}, {"dense.bias"}),
        ({"target_modules": "all-linear", "exclude_modules": ["dense"]}, {f"{n}.bias" for n in ("query", "key", "value")}),
    ],
)  # fmt: skip
def test_chosen_biases(config, ends):
    found = keys(bitfit("bert", task_type="SEQ_CLS", **config)) - {"classifier.weight", "classifier.bias"}
    assert found and all(any(key.endswith(end) for end in ends) for key in found)
    assert {end for end in ends if any(key.endswith(end) for key in found)} == ends


@pytest.mark.parametrize(("kind", "dtype"), [("bert", torch.float32), ("gpt2", torch.bfloat16)])
def test_the_same_as_changing_the_models_own(kind, dtype):
    """Truth: the trained values, rounded to the model's dtype, written into a plain copy of it; bit for bit."""
    model = scatter(pf.get_peft_model(build(kind, dtype=dtype), pf.BitFitConfig(train_norms=True)).eval())
    truth = build(kind, dtype=dtype)
    own = dict(truth.named_parameters())
    with torch.no_grad():
        for key, value in model.base_model.tensors("default").items():
            assert value.dtype == torch.float32
            own[key.removeprefix("base_model.model.")].copy_(value)
    assert torch.equal(logits(model, kind), logits(truth, kind))


def test_several_adapters_add_up():
    plain = build("gpt2")
    with torch.no_grad():
        for name, own in plain.named_parameters():
            if name.endswith("bias"):
                own.normal_(std=0.1)
    model = scatter(pf.get_peft_model(copy.deepcopy(plain), pf.BitFitConfig()).eval(), seed=4)
    model.add_adapter("b", pf.BitFitConfig(target_modules=["c_attn"]))
    model.set_adapter("b")
    scatter(model, seed=5)
    model.base_model.set_adapter(["default", "b"])
    both = logits(model, "gpt2")
    with torch.no_grad():
        for name, own in plain.named_parameters():
            key = f"base_model.model.{name}"
            held = [model.base_model.tensors(a).get(key) for a in ("default", "b")]
            own.add_(sum(value - own for value in held if value is not None))
    torch.testing.assert_close(both, logits(plain, "gpt2"), rtol=1e-5, atol=1e-6)
    for names in (["default"], ["b"], ["default", "b"]):  # one after the other is both at once
        model.merge_adapter(names)
    torch.testing.assert_close(logits(model, "gpt2"), both, rtol=1e-5, atol=1e-6)


def test_packed_attention_and_torchs_fused_encoder():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True))
    model = pf.get_peft_model(copy.deepcopy(plain).eval(), pf.BitFitConfig()).eval()
    assert "0.self_attn.in_proj_bias" in keys(model) and "0.self_attn.out_proj.bias" in keys(model)
    scatter(model)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        for key, value in model.base_model.tensors("default").items():
            plain.get_parameter(key.removeprefix("base_model.model.")).copy_(value)
        torch.testing.assert_close(model(x), plain.train()(x), rtol=1e-5, atol=1e-6)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_merged_models_are_plain_and_created_biases_stay():
    model = scatter(adapted(BITFIT, "llama", "nf4"))
    before = logits(model, "llama")
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, "llama"), before) and not hasattr(merged, "merge_report")
    bias = merged.model.layers[0].self_attn.q_proj.bias
    assert isinstance(bias, nn.Parameter) and not bias.requires_grad
    assert not any(isinstance(module, BitFitLayer) for module in merged.modules())


@pytest.mark.parametrize("targets", [None, ["q_proj"], ["down_proj"]])
def test_merged_biases_survive_saving(targets, tmp_path):
    model = scatter(bitfit("llama", target_modules=targets))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert torch.equal(logits(again, "llama"), logits(merged, "llama"))
    wanted = (targets != ["down_proj"], targets != ["q_proj"])
    assert (again.config.attention_bias, again.config.mlp_bias) == wanted


def test_merged_biases_that_have_no_place_are_said():
    with pytest.warns(UserWarning, match="12 biases that its architecture has no place for"):
        bitfit("t5", target_modules=["q", "k"]).merge_and_unload()


def test_nan_is_not_merged():
    model = adapted(BITFIT, "gpt2")
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0] = torch.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"has NaN or infinities in .*; not merged"):
        model.merge_adapter()
    assert {n for n, v in before["values"].items() if v.isfinite().all()} == {
        n for n, p in model.named_parameters() if p.isfinite().all() and torch.equal(p, before["values"][n])
    }


WRONG = {
    "no biases": ({"create_biases": False}, "the model has no biases to train; with create_biases=True"),
    "no biases here": ({"create_biases": False, "target_modules": "all-linear"}, "'all-linear' has no biases to train"),
    "typo": ({"target_modules": ["q_proj", "k_prj"]}, r"\['k_prj'\] match no module with a bias; near misses: k_proj"),
    "nothing": ({"target_modules": "layers.*", "exclude_modules": "model.*"}, "has no biases to train; name other"),
    "norm": ({"target_modules": ["input_layernorm"]}, r"\['input_layernorm'\] match no module with a bias"),
    "head": ({"modules_to_save": ["lm_hed"]}, "'lm_hed' matches no module of the model; near misses: lm_head"),
}


@pytest.mark.parametrize(("config", "message"), WRONG.values(), ids=WRONG)
def test_models_it_cannot_serve(config, message):
    model = build("llama").train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pf.get_peft_model(model, pf.BitFitConfig(**config))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("field", "value"), [("create_biases", 1), ("train_norms", "yes"), ("target_modules", 3), ("exclude_modules", [1])]
)
def test_wrong_fields(field, value):
    with pytest.raises(TypeError, match=f"BitFitConfig: {field} is"):
        pf.BitFitConfig(**{field: value})
    with pytest.raises(ValueError, match="is not a valid regular expression"):
        pf.BitFitConfig(target_modules="((")


def test_other_methods_on_the_same_layer_are_refused():
    for first, second in ((pf.LoraConfig, pf.BitFitConfig), (pf.BitFitConfig, pf.LoraConfig)):
        model = pf.get_peft_model(build("llama"), first(target_modules=["q_proj"]))
        before = snapshot(model)
        with pytest.raises(ValueError, match="has an adapter of another method already"):
            model.add_adapter("b", second(target_modules=["q_proj"]))
        assert_unchanged(model, before)
        model.add_adapter("b", second(target_modules=["v_proj"]))


def test_files(tmp_path):
    model = scatter(bitfit("llama", task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == {f"base_model.model.model.layers.{i}.self_attn.q_proj.bias" for i in (0, 1)}
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["peft_type"] == "BITFIT" and fields["create_biases"] is True
    plain = build("llama")
    before = snapshot(plain)
    for change, message in (
        (lambda t: t.popitem(), "1 missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "1 unexpected: extra"),
        (lambda t: t.update({k: torch.zeros(31) for k in t}), r"shape \(31,\), the model expects \(32,\)"),
    ):
        damaged = dict(tensors)
        change(damaged)
        save_file(damaged, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            pf.PeftModel.from_pretrained(plain, tmp_path)
        assert_unchanged(plain, before)
