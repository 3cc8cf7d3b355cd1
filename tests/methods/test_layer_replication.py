"""layer_replication: the stack, its shared weights, files both ways with PEFT, merging, and the model given back."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from torch import nn

import pyfastpeft as pf
from pyfastpeft.nn import as_base_linear
from tests.methods.contract import scatter
from tests.methods.mixtures import mixture, tokens
from tests.methods.models import TASK, batch, build
from tests.methods.test_targets import assert_unchanged, snapshot

RANGES = [[0, 2], [1, 2], [0, 1]]
ORDER = [0, 1, 1, 0]


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def config(kind="llama", library=pf, **more):
    return library.LoraConfig(**{"r": 2, "layer_replication": RANGES, "task_type": TASK.get(kind)} | more)


def by_hand(kind):
    """The stacked model, with weights of its own."""
    model = build(kind)
    name, holder = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    stack = nn.ModuleList(copy.deepcopy(holder[i]) for i in ORDER)
    for place, layer in enumerate(stack):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    model.set_submodule(name, stack)
    model.config.num_hidden_layers = 4
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "opt", "bloom"])
def test_the_stack_shares_its_weights(kind):
    model = build(kind)
    size = sum(p.numel() for p in model.parameters())
    expected = by_hand(kind)(**batch(kind)).logits
    adapted = pf.get_peft_model(model, config(kind, target_modules="all-linear"))
    assert torch.equal(adapted(**batch(kind)).logits, expected)
    trainable, total = adapted.get_nb_trainable_parameters()
    heads = sum(p.numel() for n, p in model.named_parameters() if "modules_to_save" in n)
    assert total - trainable == size and trainable > heads
    scatter(adapted)
    assert not torch.equal(adapted(**batch(kind)).logits, expected)
    adapted(**batch(kind)).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("layers", [None, [2]], ids=["all layers", "a copy"])
def test_merging_gives_every_layer_its_own_weight(quantize, layers):
    base = pf.quantize_model(build("llama")) if quantize else build("llama")
    size = sum(p.numel() for p in base.parameters())
    more = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": layers}
    model = scatter(pf.get_peft_model(base, config(**more)), scale=0.3)
    y = model(**batch("llama")).logits
    with model.disable_adapter():
        before = model(**batch("llama")).logits
    model.merge_adapter()
    assert (model(**batch("llama")).logits - y).norm() < (0.25 if quantize else 1e-5) * (y - before).norm()
    model.unmerge_adapter()
    assert torch.equal(model(**batch("llama")).logits, y)
    wanted = {path: layer.merged_weights(["default"])[0] for path, layer in model.base_model.layers()}
    merged = model.merge_and_unload()
    for path, weight in wanted.items():  # each is what its own merging stored
        stored = as_base_linear(merged.get_submodule(path)).get_weight(torch.float32)
        error = getattr(merged, "merge_report", {}).get(path, 0.0)
        assert ((stored - weight).norm() / weight.norm()).item() == pytest.approx(error, abs=1e-6)
    assert (merged(**batch("llama")).logits - y).norm() < (0.25 if quantize else 1e-5) * (y - before).norm()
    assert merged.config.num_hidden_layers == 4 and sum(p.numel() for p in merged.parameters()) > size


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_files_and_logits_are_pefts(kind, tmp_path):
    peft = pytest.importorskip("peft")
    models = []
    for library in (peft, pf):
        base = build(kind)
        torch.manual_seed(5)
        models.append(scatter(library.get_peft_model(base, config(kind, library))))
    theirs, ours = (model.eval() for model in models)
    expected = theirs(**batch(kind)).logits
    torch.testing.assert_close(ours(**batch(kind)).logits, expected, rtol=1e-4, atol=2e-5)
    theirs.save_pretrained(tmp_path / "theirs"), ours.save_pretrained(tmp_path / "ours")
    weights = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("theirs", "ours")]
    assert weights[1] == weights[0]
    texts = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    for text in texts:
        text["target_modules"] = sorted(text["target_modules"])
    assert texts[1] == texts[0] and texts[0]["layer_replication"] == RANGES
    for library, folder in ((pf, "theirs"), (peft, "ours"), (pf, "ours")):
        again = library.PeftModel.from_pretrained(build(kind), tmp_path / folder).eval()
        torch.testing.assert_close(again(**batch(kind)).logits, expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(ours.merge_and_unload()(**batch(kind)).logits, expected, rtol=1e-4, atol=2e-5)
    merged = theirs.merge_and_unload()(**batch(kind)).logits
    assert (merged - expected).abs().max() > 1e-3  # PEFT adds all updates to the shared weight


def test_a_second_adapter_on_the_stack(tmp_path):
    model = scatter(pf.get_peft_model(build("llama"), config()))
    first = model(**batch("llama")).logits
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "b")
    model.add_adapter("c", config(layer_replication=None, target_modules=["o_proj"]))
    assert len(model.get_base_model().model.layers) == 4
    model.set_adapter("b")
    assert torch.equal(model(**batch("llama")).logits, first)
    with pytest.raises(ValueError, match="an earlier adapter has stacked the model's layers as"):
        model.add_adapter("d", config(layer_replication=[[0, 2]]))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch("llama")).logits, first)
    made = model.generate(
        input_ids=batch("llama")["input_ids"][:1], max_new_tokens=3, min_new_tokens=3, do_sample=False
    )
    assert torch.equal(model(input_ids=made).logits[0, -4:-1].argmax(-1), made[0, -3:])
    model.unload()
    assert len(model.get_base_model().model.layers) == 4


def test_the_model_is_given_back(tmp_path):
    model = build("llama")
    before, settings = snapshot(model), model.config.to_dict()

    def unchanged():
        assert_unchanged(model, before)
        assert model.config.to_dict() == settings and "_replicated_layers" not in vars(model)

    for wrong, message in (
        ({"layer_replication": [[0, 3]]}, "model.layers has 2 layers"),
        ({"target_modules": ["q_porj"]}, "match no module"),
        ({"init_lora_weights": "pissa"}, "which another adapted layer shares"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": []}, "too .tied weights"),
    ):
        with pytest.raises(ValueError, match=message):
            pf.get_peft_model(model, config(**wrong))
        unchanged()
    scatter(pf.get_peft_model(build("llama"), config())).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit the model"):
        pf.PeftModel.from_pretrained(model, tmp_path, config=config(r=3))
    unchanged()
    adapted = pf.get_peft_model(model, config())
    adapted.delete_adapter("default")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    unchanged()
    plain = pf.get_peft_model(build("llama"), config(layer_replication=None))
    with pytest.raises(ValueError, match="hold an earlier adapter already"):
        plain.add_adapter("b", config())
    for strange, message in (
        (build("t5"), "several lists of layers"),
        (nn.Sequential(nn.Linear(2, 2)), "no list of layers"),
    ):
        with pytest.raises(ValueError, match=message):
            pf.get_peft_model(strange, config(target_modules=["q", "0"]))


def test_per_layer_settings_follow():
    """A mixture with two kinds of attention: PEFT leaves layer_types at two entries for four layers."""
    model = pf.get_peft_model(mixture("gpt_oss"), config(target_modules=["q_proj"]))
    settings = model.get_base_model().config
    assert settings.layer_types == [["sliding_attention", "full_attention"][i] for i in ORDER]
    scatter(model)
    made = model.generate(input_ids=tokens()["input_ids"][:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(model(input_ids=made).logits[0, -4:-1].argmax(-1), made[0, -3:])


@pytest.mark.parametrize(
    ("value", "error"),
    [([], ValueError), ([[1, 1]], ValueError), ([[-1, 2]], ValueError), ([0, 2], TypeError), ([[0]], TypeError)]
    + [("0:2", TypeError), ([[0.0, 1.0]], TypeError), (3, TypeError)],
    ids=str,
)
def test_bad_fields(value, error):
    with pytest.raises(error, match="layer_replication"):
        pf.LoraConfig(layer_replication=value)
