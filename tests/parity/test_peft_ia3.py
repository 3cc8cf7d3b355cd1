"""(IA)³ against installed Hugging Face PEFT: defaults, initial values, outputs, gradients, merged weights, files."""

import json
import warnings

import pytest
import torch

import pyfastpeft as pf
from tests.methods.models import TASK, batch, build, randomise_adapters

peft = pytest.importorskip("peft")
KINDS = ["llama", "gpt2", "bert", "t5", "opt", "bloom"]


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model(kind, init, tmp_path):
    models = []
    for library in (peft, pf):
        base = build(kind)
        torch.manual_seed(5)
        models.append(library.get_peft_model(base, library.IA3Config(task_type=TASK[kind], init_ia3_weights=init)))
    theirs, ours = models
    trainable = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    mine = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert list(mine) == list(trainable)
    for name, parameter in trainable.items():
        assert torch.equal(mine[name], parameter), name
    results = []
    for library, model in zip((peft, pf), models, strict=True):
        randomise_adapters(model, scale=0.8)
        model.save_pretrained(tmp_path / library.__name__)
        output = model.eval()(**batch(kind))
        output.loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        merged = model.merge_and_unload()
        results.append({"logits": output.logits} | gradients | {f"merged {n}": p for n, p in merged.named_parameters()})
    for name, expected in results[0].items():
        torch.testing.assert_close(
            results[1][name], expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item(), msg=name
        )
    weights = [(tmp_path / lib / "adapter_model.safetensors").read_bytes() for lib in ("peft", "pyfastpeft")]
    configs = [json.loads((tmp_path / lib / "adapter_config.json").read_text()) for lib in ("peft", "pyfastpeft")]
    for config in configs:
        config["target_modules"], config["feedforward_modules"] = (
            sorted(config[name]) for name in ("target_modules", "feedforward_modules")
        )
    assert configs[1] == configs[0] and weights[1] == weights[0]


def test_defaults_of_every_architecture():
    from peft.utils import constants

    from pyfastpeft.methods.ia3.targets import TARGETS

    targets = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    inputs = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert {m: a | b for m, (a, b) in TARGETS.items()} == {m: set(names) for m, names in targets.items()}
    assert {m: b for m, (_, b) in TARGETS.items()} == {m: set(names) for m, names in inputs.items()}
