"""LoRA against installed Hugging Face PEFT: outputs, gradients, initial values and files."""

import copy
import json
import warnings

import pytest
import torch

import pyfastpeft as pf
from tests.methods.models import batch, build, randomise_adapters
from tests.parity.pairs import pair, run

peft = pytest.importorskip("peft")

KINDS = ["llama", "gpt2", "bert", "bert_tokens", "t5", "opt", "bloom"]
CONFIGS = {
    "default": {"r": 4, "lora_alpha": 8},
    "all-linear": {"r": 3, "lora_alpha": 16, "target_modules": "all-linear", "use_rslora": True},
}


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def assert_as_close(got, peer, truth):
    """Every tensor at most twice as far from the fp64 truth as the peer's (Frobenius), or within a few fp32 roundings."""
    assert set(got) == set(peer) == set(truth)
    for name, exact in truth.items():
        error, allowed = ((t.double() - exact).norm() for t in (got[name], peer[name]))
        assert error <= 2 * allowed + 5e-6 * exact.norm() + 1e-9, (name, error, allowed, exact.norm())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_gradients_and_initial_values_equal(kind, config):
    if kind == "bert_tokens" and config.get("target_modules") == "all-linear":
        pytest.skip("peft adapts the head as well and then refuses to save it")
    theirs, ours = pair(kind, **config)
    trainable = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    mine = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert list(mine) == list(trainable)
    for name in trainable:
        assert torch.equal(mine[name], trainable[name]), name
    randomise_adapters(theirs), randomise_adapters(ours)
    inputs = batch(kind)
    truth = run(copy.deepcopy(theirs).double(), inputs)
    results = run(ours, inputs)
    assert set(results) == {"logits", *mine}
    assert_as_close(results, run(theirs, inputs), truth)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_files_are_the_same_bytes_and_load_both_ways(kind, bias, tmp_path):
    theirs, ours = pair(kind, bias=bias, r=4)
    if bias == "none" or kind != "bert":
        randomise_adapters(theirs), randomise_adapters(ours)
    theirs.save_pretrained(tmp_path / "theirs"), ours.save_pretrained(tmp_path / "ours")
    weights = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("theirs", "ours")]
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[1] == configs[0]
    if not (bias == "all" and kind == "bert"):  # there theirs adds the frozen original head's bias
        assert weights[1] == weights[0]
    inputs = batch(kind)
    with torch.no_grad():
        expected = theirs.eval()(**inputs).logits
        read_by_us = pf.PeftModel.from_pretrained(build(kind), tmp_path / "theirs")(**inputs).logits
        read_by_them = peft.PeftModel.from_pretrained(build(kind), tmp_path / "ours")(**inputs).logits
    torch.testing.assert_close(read_by_us, expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(read_by_them, ours.eval()(**inputs).logits, rtol=1e-4, atol=2e-5)


OPTIONS = {
    "patterns": {"rank_pattern": {"q": 2, "q_proj": 2}, "alpha_pattern": {r".*\.1\..*v(_proj)?": 3}, "r": 5},
    "some layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": r".*\.(q|v|down)_proj", "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "rslora": {"use_rslora": True, "r": 3, "lora_alpha": 7},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random": {"init_lora_weights": False},
    "saved": {"modules_to_save": ["lm_head"], "target_modules": ["up_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embeddings saved": {"modules_to_save": ["embed_tokens"], "target_modules": ["up_proj"]},
}


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
def test_options(config, tmp_path):
    theirs, ours = pair("llama", **config)
    mine = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(mine.pop(name), parameter), name
    assert not mine
    randomise_adapters(theirs), randomise_adapters(ours)
    inputs = batch("llama")
    expected = theirs.eval()(**inputs).logits
    torch.testing.assert_close(ours.eval()(**inputs).logits, expected, rtol=1e-4, atol=2e-5)
    theirs.save_pretrained(tmp_path / "theirs"), ours.save_pretrained(tmp_path / "ours")
    read_by_us = pf.PeftModel.from_pretrained(build("llama"), tmp_path / "theirs")
    read_by_them = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours")
    torch.testing.assert_close(read_by_us(**inputs).logits, expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(read_by_them(**inputs).logits, expected, rtol=1e-4, atol=2e-5)


def test_several_adapters_disabling_and_merging():
    models = pair("llama", r=4)
    inputs = batch("llama")
    second = {"r": 2, "target_modules": ["down_proj", "q_proj"], "lora_alpha": 5}
    results = []
    for library, model in zip((peft, pf), models, strict=True):
        model.eval()
        randomise_adapters(model)
        steps = {}
        torch.manual_seed(11)
        model.add_adapter("b", library.LoraConfig(task_type="CAUSAL_LM", **second))
        steps["added"] = model(**inputs).logits
        model.set_adapter("b")
        randomise_adapters(model, seed=12)
        steps["second"] = model(**inputs).logits
        model.base_model.set_adapter(["default", "b"])
        steps["both"] = model(**inputs).logits
        with model.disable_adapter():
            steps["disabled"] = model(**inputs).logits
        model.merge_adapter()
        steps["merged"] = model(**inputs).logits
        model.unmerge_adapter()
        steps["unmerged"] = model(**inputs).logits
        model.delete_adapter("b")
        model.set_adapter("default")
        steps["deleted"] = model(**inputs).logits
        steps["unloaded"] = model.merge_and_unload()(**inputs).logits
        results.append(steps)
    for step, expected in results[0].items():
        torch.testing.assert_close(results[1][step], expected, rtol=1e-4, atol=2e-5, msg=step)


def test_adapters_of_several_names_in_one_folder(tmp_path):
    theirs, ours = pair("bert", r=4)
    for library, model in ((peft, theirs), (pf, ours)):
        torch.manual_seed(3)
        model.add_adapter("b", library.LoraConfig(task_type="SEQ_CLS", r=2))
        model.save_pretrained(tmp_path / library.__name__)
    for name in ("", "b"):
        files = [tmp_path / lib / name / "adapter_model.safetensors" for lib in ("peft", "pyfastpeft")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_bin_file(tmp_path):
    theirs, ours = pair("llama")
    randomise_adapters(theirs), randomise_adapters(ours)
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=False)
    ours.save_pretrained(tmp_path / "ours", safe_serialization=False)
    inputs = batch("llama")
    expected = theirs.eval()(**inputs).logits
    got = pf.PeftModel.from_pretrained(build("llama"), tmp_path / "theirs")(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
    got = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours")(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


def test_three_steps_of_training_stay_together():
    theirs, ours = pair("llama", r=4)
    losses = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        values = []
        for _ in range(3):
            loss = model.train()(**batch("llama")).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        losses.append(values)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[1][2] < losses[1][0]
