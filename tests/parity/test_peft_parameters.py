"""target_parameters against installed Hugging Face PEFT: outputs, gradients, initial values, files, merged models."""

import json
import warnings

import pytest
import torch
from torch import nn

import pyfastpeft as pf
from tests.methods.mixtures import EXPERTS, KINDS, mixture, tokens
from tests.parity.pairs import pair

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


ADAPTED = {"target_modules": [], "target_parameters": EXPERTS, "r": 3, "task_type": "CAUSAL_LM"}


def fill(model):
    """The same values for both libraries, by the keys of the files."""
    tensors = (
        model.base_model.tensors("default")
        if isinstance(model, pf.PeftModel)
        else peft.get_peft_model_state_dict(model)
    )
    generator = torch.Generator().manual_seed(2)
    for key in sorted(tensors):
        tensors[key].data.copy_(torch.randn(tensors[key].shape, generator=generator) * 0.2)
    return model


def gradients(model):
    """By the keys of the files."""
    if isinstance(model, pf.PeftModel):
        return {key: tensor.grad for key, tensor in model.base_model.tensors("default").items()}
    return {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_outputs_gradients_files_and_merged_models(kind, implementation, tmp_path):
    theirs, ours = pair(lambda: mixture(kind, implementation), **ADAPTED, use_rslora=kind == "mixtral")
    inputs = tokens()
    drawn = [library for library in (peft.get_peft_model_state_dict(theirs), ours.base_model.tensors("default"))]
    assert set(drawn[0]) == set(drawn[1])
    for key, value in drawn[0].items():
        assert torch.equal(drawn[1][key], value), key
    outputs = []
    for model in (fill(theirs), fill(ours)):
        output = model(**inputs)
        output.loss.backward()
        outputs.append(output.logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=2e-5)
    mine = gradients(ours)
    for key, value in gradients(theirs).items():
        torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-5 * value.abs().max().item() + 1e-7, msg=key)
    theirs.save_pretrained(tmp_path / "theirs"), ours.save_pretrained(tmp_path / "ours")
    weights = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("theirs", "ours")]
    assert weights[1] == weights[0]
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    for config in configs:
        config["target_parameters"] = sorted(config["target_parameters"])
    assert configs[1] == configs[0]
    for library, folder in ((pf, "theirs"), (peft, "ours")):
        again = library.PeftModel.from_pretrained(mixture(kind), tmp_path / folder).eval()
        torch.testing.assert_close(again(**inputs).logits, outputs[0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(ours.merge_and_unload()(**inputs).logits, outputs[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("init", [False, "gaussian", True])
def test_beside_layers_with_patterns_and_initial_values(init, tmp_path):
    config = {"target_modules": ["q_proj"], "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"gate_up_proj": 5}}
    theirs, ours = pair(lambda: mixture("mixtral", "eager"), **(ADAPTED | config), init_lora_weights=init)
    mine = ours.base_model.tensors("default")
    for key, value in peft.get_peft_model_state_dict(theirs).items():
        torch.testing.assert_close(mine[key], value, rtol=1e-6, atol=0, msg=key)
    fill(theirs), fill(ours)
    expected = theirs(**tokens()).logits
    torch.testing.assert_close(ours(**tokens()).logits, expected, rtol=1e-4, atol=2e-5)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(mixture("mixtral"), tmp_path).eval()
    torch.testing.assert_close(again(**tokens()).logits, expected, rtol=1e-4, atol=2e-5)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 5)
        self.other = nn.Linear(5, 3)

    def forward(self, x):
        return self.other(self.inner(x))


def test_a_plain_layers_weight(tmp_path):
    x, results = torch.randn(4, 6), []
    for library in (peft, pf):
        torch.manual_seed(1)
        config = library.LoraConfig(target_modules=[], target_parameters=["inner.weight"], r=2, lora_alpha=6)
        model = fill(library.get_peft_model(Two(), config))
        y = model(x)
        y.square().sum().backward()
        results.append((y, gradients(model)))
        model.save_pretrained(tmp_path / library.__name__)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    for key, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], value, rtol=1e-4, atol=1e-5)
    for library, folder in ((pf, "peft"), (peft, "pyfastpeft")):
        again = library.PeftModel.from_pretrained(Two(), tmp_path / folder)
        torch.testing.assert_close(again(x), results[0][0], rtol=1e-5, atol=1e-6)
