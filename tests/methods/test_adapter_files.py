"""Adapter files: atomic writing, and everything that can be wrong with what is read."""

import json
import os
import pickle
import resource
import shutil
import signal
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyfastpeft as pf
from pyfastpeft import checkpoint
from tests.methods.models import batch, build, randomise_adapters
from tests.methods.test_targets import assert_unchanged, snapshot

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapted(seed=2, **config):
    model = pf.get_peft_model(build("llama"), pf.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **config})).eval()
    randomise_adapters(model, seed)
    return model


def logits(model):
    with torch.no_grad():
        return model(**batch("llama")).logits


@pytest.fixture
def saved(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "a")
    return tmp_path / "a", model


def contents(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder)) if (folder / name).is_file()}


def test_several_adapters_have_folders_and_load_under_any_name(tmp_path):
    model = adapted()
    model.add_adapter("b", pf.LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"]))
    first = logits(model)
    model.set_adapter("b")
    randomise_adapters(model, seed=8)
    second = logits(model)
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG, WEIGHTS, "b"]
    model.save_pretrained(tmp_path / "only b", selected_adapters=["b"])
    assert os.listdir(tmp_path / "only b") == ["b"]
    loaded = pf.PeftModel.from_pretrained(build("llama"), tmp_path, adapter_name="x")
    assert isinstance(loaded, pf.PeftModelForCausalLM) and not loaded.training
    assert loaded.get_nb_trainable_parameters()[0] == 0
    loaded.load_adapter(tmp_path / "b", "y", is_trainable=True)
    assert loaded.active_adapters == ["x"] and torch.equal(logits(loaded), first)
    assert {n.split(".")[-2] for n, p in loaded.named_parameters() if p.requires_grad} == {"y"}
    loaded.set_adapter("y")
    assert torch.equal(logits(loaded), second)
    loaded.load_adapter(tmp_path / "b", "y")  # again: the file's values
    assert torch.equal(logits(loaded), second)
    with pytest.raises(ValueError, match="there is no adapter 'z'"):
        model.save_pretrained(tmp_path, selected_adapters=["z"])


def test_bin_files_and_changing_from_one_kind_to_the_other(saved):
    folder, model = saved
    randomise_adapters(model, seed=4)
    model.save_pretrained(folder, safe_serialization=False)
    assert not (folder / WEIGHTS).exists()
    assert torch.equal(logits(pf.PeftModel.from_pretrained(build("llama"), folder)), logits(model))
    randomise_adapters(model, seed=5)
    model.save_pretrained(folder)
    assert not (folder / "adapter_model.bin").exists()
    assert torch.equal(logits(pf.PeftModel.from_pretrained(build("llama"), folder)), logits(model))


def test_training_goes_on_after_loading(saved):
    folder, model = saved
    loaded = pf.PeftModel.from_pretrained(build("llama").train(), folder, is_trainable=True)
    assert loaded.training
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    assert not loaded.peft_config["default"].inference_mode
    assert json.loads((folder / CONFIG).read_text())["inference_mode"] is True


def test_a_bf16_file_and_an_fp32_adapter(saved):
    folder, _ = saved
    save_file({k: v.bfloat16() for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    loaded = pf.PeftModel.from_pretrained(build("llama"), folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_embeddings_are_saved_when_asked_and_loaded(tmp_path):
    model = adapted()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.5)
    model.save_pretrained(tmp_path / "without"), model.save_pretrained(tmp_path / "with", save_embedding_layers=True)
    keys = set(load_file(tmp_path / "with" / WEIGHTS)) - set(load_file(tmp_path / "without" / WEIGHTS))
    assert keys == {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    assert torch.equal(logits(pf.PeftModel.from_pretrained(build("llama"), tmp_path / "with")), logits(model))


def test_a_resized_vocabulary_is_noticed(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    base = type(build("llama")).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70)
    model = pf.get_peft_model(base, pf.LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    assert load_file(tmp_path / "a" / WEIGHTS)["base_model.model.lm_head.weight"].shape == (70, 32)
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(70, 32\), the model expects \(64, 32\)"):
        pf.PeftModel.from_pretrained(build("llama"), tmp_path / "a")


def test_gathered_state_dict(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path, state_dict={k: v + 1 for k, v in model.state_dict().items()})
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert torch.equal(load_file(tmp_path / WEIGHTS)[key], weight.detach() + 1)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_full_disk_leaves_the_former_checkpoint(saved, safe):
    folder, model = saved
    before = contents(folder)
    bigger = adapted(r=16, target_modules="all-linear")
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, former[1]))
        with pytest.raises(OSError, match="what was there before is untouched"):
            bigger.save_pretrained(folder, safe_serialization=safe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(folder) == before
    assert torch.equal(logits(pf.PeftModel.from_pretrained(build("llama"), folder)), logits(model))


@pytest.mark.parametrize("fails_at", [1, 2, 3], ids=["weights", "config", "folder"])
def test_a_failed_sync_leaves_the_former_checkpoint_or_the_new_one(saved, monkeypatch, fails_at):
    folder, _ = saved
    before = contents(folder)
    other = adapted(seed=6)
    calls = []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left on device") as error:
        other.save_pretrained(folder)
    assert error.value.errno == 28
    after = contents(folder)
    assert set(after) == set(before)  # no temporary files
    if fails_at < 3:
        assert after == before


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="it is a file, expected a folder"):
        adapted().save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match="saving .* into .* failed"):
        adapted().save_pretrained(tmp_path / "file" / "below")
    with pytest.raises(OSError, match="saving adapter_config.json into .* failed"):
        pf.LoraConfig().save_pretrained("/proc/no such folder")


def refuse(folder, message, error=ValueError, model=None):
    """Loading raises with this message and leaves a model, and an adapted one, as they were."""
    model = build("llama").train()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        pf.PeftModel.from_pretrained(model, folder)
    assert_unchanged(model, before)
    other = adapted(target_modules=["k_proj"]).train()
    before = snapshot(other)
    with pytest.raises(error, match=message):
        other.load_adapter(folder, "second")
    assert_unchanged(other, before)
    assert list(other.peft_config) == other.active_adapters == ["default"]


@pytest.mark.parametrize("keep", [0, 4, 100, 2000, -1])
def test_truncated_weights(saved, keep):
    folder, _ = saved
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    refuse(folder, "adapter_model.safetensors cannot be read, it is truncated or damaged")


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b"\xff" * 8 + b[8:],
        lambda b: b[:8] + b"[" + b[9:],
        lambda b: b.replace(b'"F32"', b'"F99"'),
        lambda b: b + b"x",
    ],
    ids=["header size", "header", "dtype", "appended"],
)
def test_tampered_weights(saved, change):
    folder, _ = saved
    (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))
    refuse(folder, "truncated or damaged")


def test_pickles_are_never_executed(saved, tmp_path):
    folder, _ = saved
    (folder / WEIGHTS).unlink()
    target = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(target),)

    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": Evil()}))
    refuse(folder, "adapter_model.bin cannot be read")
    torch.save({"a": Evil()}, folder / "adapter_model.bin")
    refuse(folder, "adapter_model.bin cannot be read")
    assert not target.exists()
    torch.save([torch.zeros(1)], folder / "adapter_model.bin")
    refuse(folder, "something other than named tensors")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WRONG = {
    "missing": (lambda t: t.pop(KEY), f"1 missing: {KEY}"),
    "extra": (lambda t: t.update(extra=torch.zeros(2)), "1 unexpected: extra"),
    "another layer": (lambda t: t.update({KEY.replace("q_proj", "o_proj"): t.pop(KEY)}), "1 missing.*1 unexpected"),
    "shape": (lambda t: t.update({KEY: torch.zeros(4, 31)}), r"shape \(4, 31\), the model expects \(4, 32\)"),
    "dtype": (lambda t: t.update({KEY: torch.zeros(4, 32, dtype=torch.int32)}), "dtype torch.int32, the model expects"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_tensors_that_do_not_fit(saved, change, message):
    folder, _ = saved
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    refuse(folder, "does not fit the model, nothing was loaded: .*" + message)


def test_nan_in_a_file_is_said(saved):
    folder, _ = saved
    tensors = load_file(folder / WEIGHTS)
    tensors[KEY][1, 2] = torch.nan
    save_file(tensors, folder / WEIGHTS)
    with pytest.warns(UserWarning, match=f"{KEY} has NaN"):
        pf.PeftModel.from_pretrained(build("llama"), folder)


CONFIGS = {
    "cut": (lambda text: text[: len(text) // 2], "is not valid JSON", ValueError),
    "empty": (lambda text: "", "is not valid JSON", ValueError),
    "deep": (lambda text: "[" * 100_000, "is not valid JSON", ValueError),
    "a list": (lambda text: "[1]", "holds a list, expected a JSON object", ValueError),
    "no type": (lambda text: "{}", "has no peft_type", ValueError),
    "unknown type": (
        lambda text: text.replace('"LORA"', '"LOHA"'),
        "peft_type is 'LOHA', expected one of.*LORA",
        ValueError,
    ),
    "odd type": (lambda text: text.replace('"LORA"', "[1]"), "expected one of.*LORA", ValueError),
    "bad rank": (
        lambda text: text.replace('"r": 4', '"r": "4"'),
        r"adapter_config.json: LoraConfig: r is '4'",
        ValueError,
    ),
    "bad regex": (
        lambda text: json.dumps(json.loads(text) | {"target_modules": "(("}),
        "regular expression",
        ValueError,
    ),
    "not supported": (
        lambda t: t.replace('"use_qalora": false', '"use_qalora": true'),
        "use_qalora=True",
        NotImplementedError,
    ),
    "other targets": (
        lambda t: json.dumps(json.loads(t) | {"target_modules": ["o_proj"]}),
        "nothing was loaded",
        ValueError,
    ),
    "other rank": (lambda t: t.replace('"r": 4', '"r": 5'), r"the model expects \(5, 32\)", ValueError),
}


@pytest.mark.parametrize(("change", "message", "error"), CONFIGS.values(), ids=CONFIGS)
def test_configs_that_are_wrong(saved, change, message, error):
    folder, _ = saved
    (folder / CONFIG).write_text(change((folder / CONFIG).read_text()))
    refuse(folder, message, error)


def test_config_bytes_that_are_not_text(saved):
    folder, _ = saved
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00{")
    refuse(folder, "is not valid JSON")


def test_unknown_fields_are_said_and_dropped(saved):
    folder, model = saved
    fields = json.loads((folder / CONFIG).read_text()) | {"from_the_future": 1, "runtime_config": {"x": 1}}
    (folder / CONFIG).write_text(json.dumps(fields))
    with pytest.warns(UserWarning, match=r"\['from_the_future'\]"):
        loaded = pf.PeftModel.from_pretrained(build("llama"), folder)
    assert torch.equal(logits(loaded), logits(model))


def test_a_name_in_target_modules_that_this_model_lacks_is_only_said(saved):
    folder, model = saved
    fields = json.loads((folder / CONFIG).read_text())
    fields["target_modules"].append("query_key_value")
    (folder / CONFIG).write_text(json.dumps(fields))
    with pytest.warns(UserWarning, match="query_key_value"):
        loaded = pf.PeftModel.from_pretrained(build("llama"), folder)
    assert torch.equal(logits(loaded), logits(model))


def test_missing_files_and_arguments(saved, tmp_path):
    folder, _ = saved
    with pytest.raises(ValueError, match="has no adapter_config.json; expected a folder that save_pretrained wrote"):
        pf.PeftModel.from_pretrained(build("llama"), tmp_path / "nothing")
    with pytest.raises(TypeError, match=r"unknown arguments \['trainable'\]"):
        pf.PeftModel.from_pretrained(build("llama"), folder, trainable=True)
    with pytest.raises(ValueError, match="without dots, slashes"):
        pf.PeftModel.from_pretrained(build("llama"), folder, adapter_name="../../x")
    (folder / WEIGHTS).unlink()
    refuse(folder, "has no adapter_model.safetensors and no adapter_model.bin")


def test_config_files_alone(tmp_path):
    config = pf.LoraConfig(target_modules=["b", "a"], r=3, task_type="SEQ_CLS")
    config.save_pretrained(tmp_path)
    text = (tmp_path / CONFIG).read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)
    assert json.loads(text)["target_modules"] == ["a", "b"]
    for cls in (pf.PeftConfig, pf.LoraConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert isinstance(loaded, pf.LoraConfig) and loaded == config
    assert checkpoint.config_json(loaded) == text.encode()
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        pf.PeftConfig.from_pretrained(tmp_path)


def test_loading_is_quiet(saved):
    folder, _ = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pf.PeftModel.from_pretrained(build("llama"), folder)
