"""LoRA against installed Hugging Face PEFT: outputs, gradients, initial values and files."""

import copy
import json
import warnings

import pytest
import torch

import pyfastpeft as pf
from tests.methods.models import TASK, batch, build, randomise_adapters

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


def pair(kind, **config):
    """The same adapted model from both libraries, with random adapters."""
    models = []
    for library in (peft, pf):
        base = build(kind)
        torch.manual_seed(5)
        model = library.get_peft_model(base, library.LoraConfig(task_type=TASK[kind], **config))
        models.append(model)
    return models


def run(model, inputs):
    """Loss's gradients by name, and the logits under the name "logits"."""
    output = model(**inputs)
    output.loss.backward()
    return {"logits": output.logits} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


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
