"""What every method does with files that are not its model's: a named error, and the model as it was."""

import json
import re
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import pyfastpeft as pf
from tests.methods.contract import CONTRACTS, adapted, config, scatter
from tests.methods.models import build
from tests.methods.test_targets import assert_unchanged, snapshot

METHOD = pytest.mark.parametrize("method", CONTRACTS, ids=[m.value for m in CONTRACTS])
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "(?s).*(fan_in_fan_out|shares (its|a) weight|goes on with the virtual tokens)"
        )
        yield


def refused(folder, base, message):
    """Loading into a bare model, into one that has an adapter, and over an adapter of the name."""
    for name in ("default", "other"):
        before = snapshot(base)
        with pytest.raises(ValueError, match=message):
            if isinstance(base, pf.PeftModel):
                base.load_adapter(folder, name)
            else:
                pf.PeftModel.from_pretrained(base, folder, name)
        assert_unchanged(base, before)


@METHOD
def test_tensors_that_are_missing_or_extra_or_of_another_shape(method, tmp_path):
    scatter(adapted(method, "llama")).save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        if file.name != WEIGHTS:
            file.unlink()  # what training goes on with is another file, with tests of its own
    whole = load_file(tmp_path / WEIGHTS)
    key = sorted(whole)[0]
    rest = {k: t for k, t in whole.items() if k != key}
    changed = {
        "1 unexpected: extra": whole | {"extra": torch.zeros(2)},
        re.escape(key) + " has shape": rest | {key: whole[key][..., :-1].contiguous()},
        f"1 missing.*{re.escape(key)}": rest | {f"{key}x": whole[key]},
    }
    bare, present = build("llama"), scatter(adapted(method, "llama"))
    for message, tensors in changed.items():
        save_file(tensors, tmp_path / WEIGHTS)
        refused(tmp_path, bare, message)
        refused(tmp_path, present, message)


@METHOD
def test_an_adapter_of_a_base_of_another_shape(method, tmp_path):
    model = scatter(adapted(method, "llama"))
    model.save_pretrained(tmp_path)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    other = transformers.LlamaConfig(num_key_value_heads=4, num_hidden_layers=3, max_position_embeddings=64, **sizes)
    # the config's sizes, or the tensors'
    refused(tmp_path, transformers.LlamaForCausalLM(other), "nothing was loaded|token_dim|num_layers|attentions|heads")


@METHOD
def test_fields_of_a_newer_release(method, tmp_path):
    scatter(adapted(method, "llama")).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_version": "9.9.9", "use_something": 3}))
    with pytest.warns(UserWarning, match="'use_something'.*newer release"):
        pf.PeftModel.from_pretrained(build("llama"), tmp_path)
    with pytest.raises(TypeError, match="use_something"):
        config(method, "llama", use_something=3)
