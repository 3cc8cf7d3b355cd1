"""Generation and merging: the same text streamed and whole, seeds, limits, and merged weights that are W + ΔW."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pyfastpeft.finetune import ConfigError, ModelError, finetune
from pyfastpeft.generate import GenerateConfig, Generator, load_adapted, quantization_of
from pyfastpeft.merge import MergeConfig, merge

PROMPT = "the quick "


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    from pyfastpeft.finetune import FinetuneConfig

    folder = tmp_path_factory.mktemp("trained")
    (folder / "data.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    outputs = {}
    for method in ("lora", "qlora"):
        config = FinetuneConfig(
            model=str(tiny_model),
            data=str(folder / "data.txt"),
            output=str(folder / method),
            method=method,
            rank=4,
            learning_rate=3e-2,
            max_steps=8,
            sequence_length=32,
            dtype="float32",
            device="cpu",
            threads=1,
            batch_size=2,
            gradient_accumulation=1,
            eval_fraction=0.0,
            save_every=0,
            double_quant=False,
        )
        outputs[method] = finetune(config).output
    return outputs


def config(tiny_model, adapter=None, **options):
    return GenerateConfig(str(tiny_model), str(adapter) if adapter else None, max_new_tokens=20, **options)


def test_greedy_is_greedy(tiny_model, trained):
    generator = Generator(config(tiny_model, trained["lora"], greedy=True, dtype="float32"))
    text = generator(PROMPT)
    tokenizer, model = generator.base.tokenizer, generator.model
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"][:-1]])
    for _ in range(20):
        logits = model(input_ids=ids).logits[0, -1, : len(tokenizer)]
        ids = torch.cat([ids, logits.argmax().reshape(1, 1)], dim=1)
    new = ids[0, len(PROMPT) :].tolist()
    if 1 in new:
        new = new[: new.index(1)]
    assert text == tokenizer.decode(new, skip_special_tokens=True)


def test_streaming_gives_the_same_text_and_seeds_decide(tiny_model, trained):
    pieces = []
    generator = Generator(config(tiny_model, trained["lora"], seed=3, temperature=1.5))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    whole = generator(PROMPT)
    assert torch.equal(torch.get_rng_state(), state)
    assert generator(PROMPT, pieces.append) == whole == "".join(pieces)
    generator.config.seed = 4
    assert generator(PROMPT) != whole


def test_quantisation_follows_the_training_run(tiny_model, trained):
    assert quantization_of(config(tiny_model, trained["lora"]), trained["lora"]) is None
    settings = quantization_of(config(tiny_model, trained["qlora"]), trained["qlora"])
    assert settings == {"blocksize": 64, "quant_type": "nf4", "double_quant": False}
    assert quantization_of(config(tiny_model, trained["qlora"], quantize=False), trained["qlora"]) is None
    checkpoint = trained["qlora"] / "checkpoints" / "step-8"
    assert quantization_of(config(tiny_model, checkpoint), checkpoint) == settings


def test_generation_never_leaves_the_vocabulary(tiny_model):
    """The embedding has 320 rows, the tokenizer 259 ids: the rest stand for nothing."""
    generator = Generator(config(tiny_model, temperature=50.0))
    for seed in range(5):
        generator.config.seed = seed
        generator(PROMPT)  # ByT5's tokenizer refuses ids beyond its own


def test_context_is_not_overrun(tiny_model):
    generator = Generator(GenerateConfig(str(tiny_model), max_new_tokens=500, greedy=True))
    assert len(generator("a" * 60).encode("utf-8", "replace")) <= 3 * 4  # at most 4 tokens were left
    with pytest.raises(ConfigError, match="--prompt: 64 tokens do not fit the model's 64 positions"):
        generator("a" * 64)


def test_chat_prompt(tiny_model, copied_model):
    with pytest.raises(ModelError, match="--chat: this model's tokenizer has no chat template"):
        Generator(config(tiny_model, chat=True))(PROMPT)
    file = copied_model / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["chat_template"] = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    file.write_text(json.dumps(settings))
    chat = Generator(config(copied_model, chat=True, greedy=True))("hi")
    assert chat == Generator(config(tiny_model, greedy=True))("[hi]>")


@pytest.mark.parametrize(
    ("field", "value"), [("max_new_tokens", 0), ("temperature", 0.0), ("top_p", 1.5), ("top_k", -1), ("seed", -1)]
)
def test_bad_options(field, value):
    with pytest.raises(ConfigError, match="--" + field.replace("_", "-")):
        GenerateConfig("m", **{field: value})


def test_adapter_folders_that_are_none(tiny_model, tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        Generator(config(tiny_model, tmp_path / "nowhere"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ModelError, match="has no adapter_config.json .*not finished"):
        Generator(config(tiny_model, tmp_path / "run"))


def logits(model, tokenizer):
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokenizer(PROMPT * 3)["input_ids"]])).logits


def test_merged_model_computes_the_same(tiny_model, trained, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = merge(MergeConfig(str(tiny_model), str(trained["lora"]), str(tmp_path / "merged")))
    assert result.layers == 14 and result.quantization_error is None and result.notes == []
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    base, adapted = load_adapted(config(tiny_model, trained["lora"], dtype="float32"))
    expected = logits(adapted, base.tokenizer)
    torch.testing.assert_close(logits(merged, tokenizer), expected, rtol=1e-4, atol=1e-5)
    assert (expected - logits(load_adapted(config(tiny_model, dtype="float32"))[1], base.tokenizer)).abs().max() > 0.01


def test_merge_says_what_quantisation_cost(tiny_model, trained, tmp_path):
    import pyfastpeft as pf

    weights = load_file(tiny_model / "model.safetensors")
    result = merge(MergeConfig(str(tiny_model), str(trained["qlora"]), str(tmp_path / "original")))
    difference = norm = 0.0
    for name, weight in weights.items():
        if "_proj" in name:
            restored = pf.ops.dequantize_4bit(pf.ops.quantize_4bit(weight, blocksize=64))
            difference += (restored - weight).square().sum().item()
            norm += weight.square().sum().item()
    assert result.quantization_error == pytest.approx((difference / norm) ** 0.5, rel=1e-4)
    assert f"{result.quantization_error:.2%} away from the original" in result.notes[0]


def test_merge_into_the_weights_that_were_trained_on(tiny_model, trained, tmp_path):
    from transformers import AutoModelForCausalLM

    target = tmp_path / "dequantized"
    result = merge(MergeConfig(str(tiny_model), str(trained["qlora"]), str(target), into="dequantized"))
    assert 0.05 < result.quantization_error < 0.2
    base, adapted = load_adapted(config(tiny_model, trained["qlora"], dtype="float32"))
    merged = AutoModelForCausalLM.from_pretrained(target)
    torch.testing.assert_close(logits(merged, base.tokenizer), logits(adapted, base.tokenizer), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="no run.json of a run on a 4-bit base"):
        merge(MergeConfig(str(tiny_model), str(trained["lora"]), str(tmp_path / "x"), into="dequantized"))


def test_merge_dtype_and_existing_output(tiny_model, trained, tmp_path):
    result = merge(MergeConfig(str(tiny_model), str(trained["lora"]), str(tmp_path / "half"), dtype="bfloat16"))
    assert result.dtype == torch.bfloat16
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="expected a new or an empty folder"):
        merge(MergeConfig(str(tiny_model), str(trained["lora"]), str(tmp_path / "half")))
    with pytest.raises(ConfigError, match="--dtype"):
        MergeConfig("m", "a", "o", dtype="int8")
    with pytest.raises(ConfigError, match="--into"):
        MergeConfig("m", "a", "o", into="nf4")


def test_failed_merge_leaves_nothing(tiny_model, trained, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    from pyfastpeft.finetune import OutputError

    def full(self, folder, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(OutputError, match="the merged model could not be written .*disk is full"):
        merge(MergeConfig(str(tiny_model), str(trained["lora"]), str(tmp_path / "merged")))
    assert list(tmp_path.iterdir()) == []


def test_half_a_character_waits_for_the_rest():
    from pyfastpeft.generate import _Stream

    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode(errors="replace")

    pieces = []
    stream = _Stream(Bytes(), pieces.append)
    stream.put(torch.tensor([[1, 2]]))  # the prompt
    text = "é€\n𝄞x"
    for byte in text.encode():
        stream.put(torch.tensor([byte]))
    stream.end()
    assert pieces == list(text)
