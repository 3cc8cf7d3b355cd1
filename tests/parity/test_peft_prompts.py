"""Prompt tuning, P-tuning and prefix tuning against installed Hugging Face PEFT: initial values, losses, gradients, files."""

import warnings

import pytest
import torch
from safetensors.torch import load_file

from tests.methods.contract import scatter
from tests.methods.models import batch
from tests.methods.test_prompt_inputs import tokenizer_at
from tests.parity.pairs import pair

peft = pytest.importorskip("peft")

V = 6
METHODS = {
    "random": ("PromptTuningConfig", {}),
    "vocabulary": ("PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "text": ("PromptTuningConfig", {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "w1 w20 w3 w4"}),
    "MLP": ("PromptEncoderConfig", {"encoder_hidden_size": 24}),
    "LSTM": (
        "PromptEncoderConfig",
        {
            "encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.1, "encoder_num_layers": 2,
            "encoder_hidden_size": 24,
        },
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trained(model):
    """Gradients by the last part of the parameters' names, which both libraries share."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name.rpartition("default.")[2]] = parameter
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "opt", "bloom"])  # theirs has no TOKEN_CLS with labels
def test_initial_values_losses_gradients_and_files(kind, method, tmp_path):
    name, options = METHODS[method]
    if method == "text":
        tokenizer_at(tmp_path)
        options = options | {"tokenizer_name_or_path": str(tmp_path)}
    theirs, ours = pair(kind, name, num_virtual_tokens=V, **options)
    mine, expected = trained(ours), trained(theirs)
    assert set(mine) == set(expected)
    for key, value in expected.items():
        assert torch.equal(mine[key], value), key
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    inputs = batch(kind)
    inputs["attention_mask"][0, -3:] = 0
    if inputs["labels"].shape == inputs["input_ids"].shape:  # padding counts its positions in another way
        inputs["labels"][0, -3:] = -100
    outputs = [model.eval()(**inputs) for model in (theirs, ours)]
    torch.testing.assert_close(outputs[1].logits[1], outputs[0].logits[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=1e-5, atol=1e-6)
    for output in outputs:
        output.loss.backward()
    for key, value in expected.items():
        assert (mine[key].grad - value.grad).norm() <= 1e-4 * value.grad.norm() + 1e-9, key
    theirs.save_pretrained(tmp_path / "theirs"), ours.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")]
    assert set(files[1]) == set(files[0])
    for key in files[0]:
        torch.testing.assert_close(files[1][key], files[0][key], rtol=1e-5, atol=1e-6)


TRAINED = {
    "PromptTuningConfig": {"prompt_tuning_init": "SAMPLE_VOCAB"},
    "PromptEncoderConfig": {"encoder_reparameterization_type": "LSTM"},
    "PrefixTuningConfig": {"prefix_projection": True},
}


@pytest.mark.parametrize("name", TRAINED)
def test_steps_of_training_stay_together(name):
    losses = []
    for model in pair("llama", name, num_virtual_tokens=V, **TRAINED[name]):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        values = []
        for _ in range(5):
            loss = model.train()(**batch("llama")).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        losses.append(values)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[1][-1] < losses[1][0]


def test_generating_equals_theirs():
    theirs, ours = pair("llama", "PromptTuningConfig", num_virtual_tokens=V)
    scatter(theirs, scale=0.3), scatter(ours, scale=0.3)
    inputs = {key: batch("llama")[key] for key in ("input_ids", "attention_mask")}
    inputs["attention_mask"][1, :3] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    results = [model.eval().generate(**inputs, **options) for model in (theirs, ours)]
    assert torch.equal(results[1], results[0])


PREFIXES = {
    "flat": {},
    "projection": {"prefix_projection": True, "encoder_hidden_size": 24},
    "zero": {"init_weights": "zero"},
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "bert_tokens", "opt", "bloom"])
def test_prefixes(kind, prefix, tmp_path):
    theirs, ours = pair(kind, "PrefixTuningConfig", num_virtual_tokens=V, **PREFIXES[prefix])
    mine, expected = trained(ours), trained(theirs)
    assert set(mine) == set(expected)
    for key, value in expected.items():
        assert torch.equal(mine[key], value), key
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    scatter(theirs, scale=0.3), scatter(ours, scale=0.3)
    inputs = batch(kind)
    inputs["attention_mask"][0, -3:] = 0
    if inputs["labels"].shape == inputs["input_ids"].shape:
        inputs["labels"][0, -3:] = -100
    outputs = [model.eval()(**inputs) for model in (theirs, ours)]
    torch.testing.assert_close(outputs[1].logits[1], outputs[0].logits[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=1e-5, atol=1e-6)
    for output in outputs:
        output.loss.backward()
    for key, value in expected.items():
        assert (mine[key].grad - value.grad).norm() <= 1e-4 * value.grad.norm() + 1e-9, key
    theirs.save_pretrained(tmp_path / "theirs"), ours.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")]
    assert set(files[1]) == set(files[0])
    for key in files[0]:
        torch.testing.assert_close(files[1][key], files[0][key], rtol=1e-5, atol=1e-6)
