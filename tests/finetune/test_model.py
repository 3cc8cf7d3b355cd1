"""Base models that cannot be used are refused in words; device and dtype are chosen with reasons."""

import json

import pytest
import torch

from pyfastpeft.finetune import ConfigError, ModelError, finetune, model


def refused(make_config, expected, kind=ModelError, **options):
    with pytest.raises(kind, match=expected):
        finetune(make_config(**options))


def test_missing_folder(make_config, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(make_config, "does not exist; check the path", model=str(tmp_path / "nowhere"))
    refused(
        make_config, "no folder here, and as a Hugging Face id it could not be loaded", model="nobody/nothing-at-all"
    )


def test_folder_without_config(make_config, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(make_config, "has no config.json \\(it holds: nothing\\)", model=str(tmp_path / "empty"))
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    refused(make_config, "this is an adapter: give its base model", model=str(tmp_path / "empty"))


def test_file_instead_of_folder(make_config, text_file):
    refused(make_config, "is a file, expected the folder", model=str(text_file))


def test_quantised_model_is_refused_before_its_weights_are_read(make_config, copied_model):
    config = json.loads((copied_model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True}
    (copied_model / "config.json").write_text(json.dumps(config))
    (copied_model / "model.safetensors").unlink()
    refused(make_config, "already quantised .*bitsandbytes.*give the original model", model=str(copied_model))


def test_broken_config(make_config, copied_model):
    (copied_model / "config.json").write_text("{")
    refused(make_config, "config.json cannot be used", model=str(copied_model))


@pytest.mark.parametrize("damage", ["missing", "truncated", "tampered"])
def test_damaged_weights(make_config, copied_model, damage):
    path = copied_model / "model.safetensors"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-100])
    else:
        path.write_bytes(b"\xff" * 8 + data[8:])
    refused(make_config, "its weights cannot be loaded", model=str(copied_model))


def test_incomplete_weights_are_not_trained_on(make_config, copied_model):
    """transformers would draw the missing ones at random and warn."""
    from safetensors.torch import load_file, save_file

    weights = load_file(copied_model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copied_model / "model.safetensors", metadata={"format": "pt"})
    refused(make_config, "1 weights are missing .*layers.1.mlp.up_proj", model=str(copied_model))


def test_missing_tokenizer(make_config, copied_model):
    (copied_model / "tokenizer_config.json").unlink()
    refused(make_config, "its tokenizer cannot be loaded", model=str(copied_model))


def test_tokenizer_of_another_model(make_config, copied_model):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(copied_model)
    config.vocab_size = 100
    LlamaForCausalLM(config).save_pretrained(copied_model)
    refused(make_config, "gives token 1[0-9][0-9], but the model's embedding has 100 rows", model=str(copied_model))


def test_sequence_length_beyond_the_model(make_config):
    refused(make_config, "--sequence-length: expected at most 64", ConfigError, sequence_length=65)


def test_sequence_length_default(tiny_model):
    config = model.read_model_config(str(tiny_model))
    assert model.sequence_length(None, config) == 64
    config.max_position_embeddings = 4096
    assert model.sequence_length(None, config) == 512


def test_targets_that_match_nothing(make_config):
    refused(make_config, "q_prj", ValueError, target_modules="q_prj")


def test_unknown_device(make_config):
    refused(make_config, "--device: expected auto, cpu, cuda", ConfigError, device="tpu")
    if not torch.cuda.is_available():
        refused(make_config, "--device cuda: torch sees 0 GPUs", ConfigError, device="cuda")


def test_auto_choices():
    assert model.choose_device("auto")[0].type in ("cpu", "cuda")
    assert model.choose_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)
    assert model.choose_dtype("float16", torch.device("cpu")) == torch.float16
