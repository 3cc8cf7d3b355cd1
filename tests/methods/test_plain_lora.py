"""PiSSA and OLoRA saved as plain LoRA: the same function on the original base, in ours and in PEFT; errors."""

import json
import warnings

import pytest
import torch

import pyfastpeft as pf
from tests.methods.contract import scatter
from tests.methods.models import batch, build

OPTIONS = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora", "lora_alpha": 5},
    "rslora": {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
    "patterns": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 7}},
    "embedding": {"init_lora_weights": "pissa", "target_modules": ["embed_tokens", "q_proj"]},
    "saved": {"init_lora_weights": "pissa", "modules_to_save": ["lm_head"], "bias": "none"},
}


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def config(library=pf, **more):
    more = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "down_proj"]} | more
    return library.LoraConfig(**more)


def trained(folder, library=pf, **more):
    torch.manual_seed(5)
    model = library.get_peft_model(build("llama"), config(library, **more))
    if library is not pf:
        model.peft_config["default"].init_lora_weights = True  # as its documentation asks for
    model.save_pretrained(folder)
    return scatter(model).eval()


@pytest.mark.parametrize("more", OPTIONS.values(), ids=OPTIONS)
def test_the_same_function_on_the_original_base(more, tmp_path):
    peft = pytest.importorskip("peft")
    model = trained(tmp_path / "first", **more)
    expected = model(**batch("llama")).logits
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "first")
    text = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert text["init_lora_weights"] is True and text["r"] == 8
    assert model.peft_config["default"].r == 4 and torch.equal(model(**batch("llama")).logits, expected)
    base = build("llama")
    original = base(**batch("llama")).logits
    for library in (pf, peft):
        again = library.PeftModel.from_pretrained(build("llama"), tmp_path / "plain").eval()
        torch.testing.assert_close(again(**batch("llama")).logits, expected, rtol=1e-3, atol=1e-4)
        with again.disable_adapter():
            if "modules_to_save" not in more:
                torch.testing.assert_close(again(**batch("llama")).logits, original, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["pissa", "olora", "rslora", "patterns"])
def test_config_and_shapes_are_pefts(kind, tmp_path):
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file

    texts, shapes = [], []
    for library in (peft, pf):
        folder = tmp_path / library.__name__
        model = trained(folder / "first", library, **OPTIONS[kind])
        first = str(folder / "first")
        model.save_pretrained(folder / "plain", path_initial_model_for_weight_conversion=first)
        text = json.loads((folder / "plain" / "adapter_config.json").read_text())
        text["target_modules"] = sorted(text["target_modules"])
        texts.append(text)
        shapes.append({key: t.shape for key, t in load_file(folder / "plain" / "adapter_model.safetensors").items()})
    assert texts[0] == texts[1] and shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "not one that has taken from its base"),
        ({"init_lora_weights": "loftq"}, "belongs to its quantised base"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "use_dora and the conversion"),
        (
            {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
            "rank_pattern or alpha_pattern",
        ),
    ],
)
def test_adapters_without_a_plain_form(more, message, tmp_path):
    model = trained(tmp_path / "first", **more)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "first")
    assert not (tmp_path / "plain").exists()


def test_a_folder_of_another_adapter(tmp_path):
    model = trained(tmp_path / "first", init_lora_weights="pissa")
    for name, more, message in (
        ("rank", {"r": 3}, "has r=3, the adapter 4"),
        ("fewer", {"target_modules": ["q_proj"]}, "is not this adapter before training"),
        ("more", {"target_modules": ["q_proj", "down_proj", "v_proj"]}, "it has more layers"),
    ):
        trained(tmp_path / name, init_lora_weights="pissa", **more)
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / name)
    with pytest.raises(ValueError, match="has no adapter_model.safetensors"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "nowhere")
    assert not (tmp_path / "plain").exists()
