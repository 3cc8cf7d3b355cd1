"""Virtual tokens among the inputs: where they go, generating in every way, padding, losses, files, read-out, bad input."""

import json
import shutil
import warnings

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

import pyfastpeft as pf
from tests.methods.contract import scatter
from tests.methods.models import VOCAB, _bert_config, batch, build
from tests.methods.test_targets import assert_unchanged, snapshot

RESUME, WEIGHTS = "prompt_encoder.safetensors", "adapter_model.safetensors"
V = 5


def loud(kind):
    """A model whose weights are large enough for its answers to hang on every input."""
    model = build(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
        if kind == "bloom":  # its head is its embedding: it would only repeat the last token
            generator = torch.Generator().manual_seed(0)
            model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 32, generator=generator))
    return model


def prompted(kind="llama", cls=pf.PromptTuningConfig, task="CAUSAL_LM", base=None, **config):
    torch.manual_seed(3)
    base = build(kind) if base is None else base
    return pf.get_peft_model(base, cls(task_type=task, num_virtual_tokens=V, **config)).eval()


def prompts(model):
    return model.get_base_model().prompt_encoder["default"]()


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits


def ragged(side, lengths=(7, 4), seed=1):
    """Rows of different lengths, padded on one side: input_ids and attention_mask."""
    ids = torch.randint(1, VOCAB, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        mask[row, (slice(None, n) if side == "right" else slice(max(lengths) - n, None))] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
def by_hand(model, ids, new_tokens, place):
    """Greedy decoding of one row by whole forwards of the plain model on embeddings put together here."""
    base = model.get_base_model()
    embed, start = base.get_input_embeddings(), ids.clone()
    for _ in range(new_tokens):
        text, more = embed(start)[None], embed(ids[len(start) :])[None]
        before, after = prompts(model)[None, : place[0]], prompts(model)[None, place[0] :]
        with model.disable_adapter():
            last = base(inputs_embeds=torch.cat([before, text, after, more], dim=1)).logits[0, -1]
        ids = torch.cat([ids, last.argmax()[None]])
    return ids[len(start) :]


GENERATE = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "one beam as two": {"num_beams": 2, "num_return_sequences": 1, "length_penalty": 0.0, "top_k": 1},
    "penalty": {"repetition_penalty": 1.0, "no_repeat_ngram_size": 50},
}


@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
@pytest.mark.parametrize("template", [None, [2, "text", 3]], ids=["before", "around"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generating_from_left_padded_rows(kind, template, options):
    model = prompted(kind, template=template, base=loud(kind))
    inputs = ragged("left")
    common = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got = model.generate(**inputs, **common | options)
    assert torch.equal(got[:, :7], inputs["input_ids"])
    if "num_beams" in options:  # against the other ways of keeping the cache, and no worse than greedy
        for more in ({"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(**inputs, **common | options | more), got)
        return
    place = (V, 0) if template is None else (2, 3)
    for row, n in enumerate((7, 4)):
        assert torch.equal(got[row, 7:], by_hand(model, inputs["input_ids"][row, -n:], 4, place))
    longer = dict(inputs, max_length=11, pad_token_id=0, eos_token_id=None, do_sample=False)
    assert torch.equal(model.generate(**longer), model.generate(**inputs, **common))


def test_generating_by_the_base_model_itself():
    """The hooks follow it, in all but a static cache, whose masks are made before they are asked."""
    model = prompted(base=loud("llama"))
    inputs = ragged("left") | {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    base, expected = model.get_base_model(), model.generate(**inputs)
    assert torch.equal(base.generate(**inputs), expected)
    assert torch.equal(base.generate(**inputs, use_cache=False), expected)
    with pytest.raises(ValueError, match=r"must be \[batch, tokens\]"):
        base.generate(**inputs, cache_implementation="static")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_padding_on_either_side_changes_nothing(kind):
    model = scatter(prompted(kind))
    whole = logits(model, **ragged("left", (7, 7)))
    assert whole.shape == (2, V + 7, VOCAB)
    for side in ("left", "right"):
        inputs = ragged(side)
        got = logits(model, **inputs)
        for row in range(2):
            kept = inputs["attention_mask"][row].bool()
            alone = logits(model, input_ids=inputs["input_ids"][row, kept][None])[0]
            torch.testing.assert_close(got[row, V:][kept], alone[V:], rtol=1e-4, atol=1e-5)


def test_going_on_from_a_cache_by_hand():
    model = scatter(prompted())
    inputs = ragged("left")
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
        step = torch.tensor([[3], [9]])
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        second = model(input_ids=step, attention_mask=mask, past_key_values=first.past_key_values).logits
    whole = logits(model, input_ids=torch.cat([inputs["input_ids"], step], 1), attention_mask=mask)
    torch.testing.assert_close(second[:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_template_with_padding(side):
    model = scatter(prompted(template=[1, "text", 4]))
    inputs = ragged(side)
    got, base = logits(model, **inputs), build("llama")
    p = prompts(model)[None]
    for row, n in enumerate((7, 4)):
        kept = inputs["attention_mask"][row].bool()
        text = base.get_input_embeddings()(inputs["input_ids"][row, kept])[None]
        truth = logits(base, inputs_embeds=torch.cat([p[:, :1], text, p[:, 1:]], dim=1))[0]
        at = slice(7 - n, None) if side == "left" else slice(0, V + n)
        rows = got[row, at]
        if side == "left":  # [1 virtual | padding | text | 4 virtual]
            rows, truth = rows[1:], truth[1:]
        torch.testing.assert_close(rows, truth, rtol=1e-4, atol=1e-5)


def test_placeholders_in_the_text():
    model = scatter(prompted(cls=pf.PromptEncoderConfig, placeholder_token_id=VOCAB - 1), scale=0.3)
    ids = torch.randint(1, VOCAB - 1, (2, 10), generator=torch.Generator().manual_seed(1))
    ids[0, [0, 1, 4, 8, 9]] = ids[1, [2, 3, 5, 6, 7]] = VOCAB - 1
    base = build("llama")
    embeds = base.get_input_embeddings()(ids).detach().clone()
    for row in (0, 1):
        embeds[row, ids[row] == VOCAB - 1] = prompts(model).detach()
    truth = logits(base, inputs_embeds=embeds)
    torch.testing.assert_close(logits(model, input_ids=ids), truth, rtol=1e-5, atol=1e-6)
    labels = ids.masked_fill(ids == VOCAB - 1, -100)
    expected = base(inputs_embeds=embeds, labels=labels).loss
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected, rtol=1e-5, atol=1e-6)
    common = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got = model.generate(input_ids=ids, suppress_tokens=[VOCAB - 1], **common)
    again = model.generate(input_ids=ids, suppress_tokens=[VOCAB - 1], use_cache=False, **common)
    assert torch.equal(got, again) and torch.equal(got[:, 10], truth[:, -1, : VOCAB - 1].argmax(-1))
    ids[1, 0] = VOCAB - 1
    with pytest.raises(ValueError, match=r"row 1 of input_ids has 6 tokens 63 \(placeholder_token_id\), expected"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="needs input_ids to find the placeholders in"):
        model(inputs_embeds=embeds)


@pytest.mark.parametrize("template", [None, [2, "text", 3]], ids=["before", "around"])
def test_encoder_decoder(template):
    """The virtual tokens are in the encoder; padding changes nothing; generate is forward."""
    model = scatter(prompted("t5", task="SEQ_2_SEQ_LM", template=template), scale=0.3)
    inputs, target = ragged("right"), torch.tensor([[0, 5, 6], [0, 7, 8]])
    got = logits(model, **inputs, decoder_input_ids=target)
    for row, n in enumerate((7, 4)):
        alone = logits(model, input_ids=inputs["input_ids"][row : row + 1, :n], decoder_input_ids=target[row : row + 1])
        torch.testing.assert_close(got[row], alone[0], rtol=1e-4, atol=1e-5)
    base, p = build("t5"), prompts(model)[None, :V]
    text = base.get_input_embeddings()(inputs["input_ids"][:1])
    at = V if template is None else 2
    states = base.encoder(inputs_embeds=torch.cat([p[:, :at], text, p[:, at:]], dim=1))
    truth = logits(base, encoder_outputs=states, decoder_input_ids=target[:1])
    torch.testing.assert_close(got[:1], truth, rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(**inputs, **options)
    step = logits(model, **inputs, decoder_input_ids=tokens[:, :-1])
    assert torch.equal(step.argmax(-1), tokens[:, 1:])
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), tokens)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), tokens)
    assert model.generate(**inputs, **options, num_beams=3).shape == (2, 5)


def test_classifying_with_a_decoder_does_not_look_at_padding():
    config = build("llama").config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    base = transformers.LlamaForSequenceClassification(config).eval()
    model = scatter(prompted(base=base, task="SEQ_CLS"))
    inputs = ragged("right")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = logits(model, **inputs)
        alone = logits(model, input_ids=inputs["input_ids"][1:, :4])
    torch.testing.assert_close(got[1:], alone, rtol=1e-4, atol=1e-5)


def test_questions_and_token_types():
    """Start and end move with the text; token types of virtual tokens are 0."""
    torch.manual_seed(0)
    base = transformers.BertForQuestionAnswering(_bert_config()).eval()
    model = scatter(prompted(base=base, task="QUESTION_ANS", template=[2, "text", 3]))
    inputs = ragged("right") | {"token_type_ids": torch.ones(2, 7, dtype=torch.long)}
    start, end = torch.tensor([3, 0]), torch.tensor([6, 2])
    output = model(**inputs, start_positions=start, end_positions=end)
    loss = torch.nn.functional.cross_entropy
    expected = (loss(output.start_logits, start + 2) + loss(output.end_logits, end + 2)) / 2
    torch.testing.assert_close(output.loss, expected)
    plain = model(**inputs).start_logits
    other = model(**inputs | {"token_type_ids": torch.zeros(2, 7, dtype=torch.long)}).start_logits
    assert not torch.allclose(plain, other)
    with model.disable_adapter():
        assert model(**inputs).start_logits.shape == (2, 7)


def test_classifying_tokens():
    model = scatter(prompted("bert_tokens", task="TOKEN_CLS"))
    inputs = batch("bert_tokens")
    output = model(**inputs)
    assert output.logits.shape == (2, V + 9, 3)
    expected = torch.nn.functional.cross_entropy(output.logits[:, V:].flatten(0, 1), inputs["labels"].flatten())
    torch.testing.assert_close(output.loss, expected)


def tokenizer_at(folder):
    words = {"[UNK]": 0} | {f"w{i}": i for i in range(1, VOCAB)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_starting_from_text_and_reading_the_nearest_tokens(tmp_path):
    from pyfastpeft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

    tokenizer = tokenizer_at(tmp_path)
    base = build("llama")
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        prompt_tuning_init=PromptTuningInit.TEXT,
        prompt_tuning_init_text="w3 w14 w15",
        num_virtual_tokens=V,
        tokenizer_name_or_path=str(tmp_path),
    )
    model = get_peft_model(base, config)
    table, expected = base.get_input_embeddings().weight, [3, 14, 15, 3, 14]
    assert torch.equal(prompts(model), table[expected])
    for metric in ("cosine", "euclidean"):
        assert [near[0][0] for near in model.nearest_tokens(metric=metric)] == expected
    words = model.nearest_tokens(k=2, tokenizer=tokenizer)
    assert [near[0][0] for near in words] == ["w3", "w14", "w15", "w3", "w14"]
    assert all(near[0][1] == pytest.approx(1.0) and near[0][1] >= near[1][1] for near in words)
    scores = prompts(model) @ table.T
    assert [near[0][0] for near in model.nearest_tokens(metric="dot")] == scores.argmax(1).tolist()
    sampled = prompted(prompt_tuning_init="SAMPLE_VOCAB")
    ids = [near[0][0] for near in sampled.nearest_tokens(1)]
    assert torch.equal(prompts(sampled), table[ids])
    for options, message in (({"k": 0}, "k is 0"), ({"k": 65}, "k is 65"), ({"metric": "L1"}, "metric is 'L1'")):
        with pytest.raises(ValueError, match=message):
            model.nearest_tokens(**options)
    lora = pf.get_peft_model(build("llama"), pf.LoraConfig())
    with pytest.raises(ValueError, match="has no virtual tokens among the inputs"):
        lora.nearest_tokens()


ENCODERS = {
    "MLP": {},
    "LSTM": {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1, "encoder_hidden_size": 12},
}


def train(model, steps):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        model.train()(**batch("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
def test_training_goes_on_after_loading(encoder, tmp_path):
    model = prompted(cls=pf.PromptEncoderConfig, **encoder)
    train(model, 2)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / WEIGHTS)) == {"prompt_embeddings"}
    again = pf.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    train(model, 2), train(again, 2)
    assert torch.equal(prompts(again), prompts(model))
    gathered = {k: v + 1 for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    weight = load_file(tmp_path / "gathered" / RESUME)["embedding.weight"]
    assert torch.equal(weight, prompts(model).new_ones(()) + model.prompt_encoder["default"].embedding.weight)


def test_files_without_an_encoder_and_from_another_time(tmp_path):
    model = prompted(cls=pf.PromptEncoderConfig)
    model.save_pretrained(tmp_path / "a")
    scatter(model).save_pretrained(tmp_path / "b")
    expected = logits(model, **ragged("left"))
    shutil.copy(tmp_path / "a" / RESUME, tmp_path / "b" / RESUME)
    with pytest.warns(UserWarning, match="it is from another time, and is not used"):
        loaded = pf.PeftModel.from_pretrained(build("llama"), tmp_path / "b")
    torch.testing.assert_close(logits(loaded, **ragged("left")), expected)
    (tmp_path / "b" / RESUME).unlink()
    with pytest.warns(UserWarning, match="training goes on with the virtual tokens themselves"):
        loaded = pf.PeftModel.from_pretrained(build("llama"), tmp_path / "b", is_trainable=True)
    train(loaded, 1)
    assert loaded.get_nb_trainable_parameters()[0] == V * 32
    loaded.save_pretrained(tmp_path / "a")  # the encoder there is of no more use
    assert not (tmp_path / "a" / RESUME).exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.load_adapter(tmp_path / "a", "default")


def refuse(folder, message):
    model = build("llama").train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pf.PeftModel.from_pretrained(model, folder)
    assert_unchanged(model, before)
    assert not model._forward_pre_hooks
    other = prompted(cls=pf.PromptEncoderConfig)
    before = snapshot(other)
    for name in ("default", "second"):
        with pytest.raises(ValueError, match=message):
            other.load_adapter(folder, name)
        assert_unchanged(other, before)


def test_damaged_files(tmp_path):
    prompted(cls=pf.PromptEncoderConfig).save_pretrained(tmp_path)
    good = {name: load_file(tmp_path / name) for name in (WEIGHTS, RESUME)}
    for name, change, message in (
        (WEIGHTS, lambda t: t.clear(), "1 missing: prompt_embeddings"),
        (WEIGHTS, lambda t: t.update(x=torch.zeros(1)), "1 unexpected: x"),
        (WEIGHTS, lambda t: t.update(prompt_embeddings=torch.zeros(4, 32)), r"shape \(4, 32\), the model expects \(5, 32\)"),
        (RESUME, lambda t: t.pop("mlp_head.0.bias"), f"{RESUME} does not fit .* 1 missing: mlp_head.0.bias"),
        (RESUME, lambda t: t.update({"mlp_head.0.bias": torch.zeros(3)}), r"shape \(3,\), the model expects \(32,\)"),
    ):  # fmt: skip
        tensors = dict(good[name])
        change(tensors)
        save_file(tensors, tmp_path / name)
        refuse(tmp_path, message)
        save_file(good[name], tmp_path / name)
    with pytest.raises(ValueError, match="is an adapter of P_TUNING, and 'default' is one of PROMPT_TUNING already"):
        prompted().load_adapter(tmp_path, "default")
    (tmp_path / RESUME).write_bytes(b"x" * 20)
    refuse(tmp_path, f"{RESUME} cannot be read, it is truncated or damaged")


def test_fields_beside_pefts(tmp_path):
    """They are in the file only where they say something: PEFT warns about fields it does not know."""
    prompted().save_pretrained(tmp_path / "a"), prompted(template=[5, "text"]).save_pretrained(tmp_path / "b")
    fields = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in "ab"]
    assert set(fields[1]) - set(fields[0]) == {"template"} and fields[1]["template"] == [5, "text"]
    assert pf.PromptTuningConfig.from_pretrained(tmp_path / "b").template == [5, "text"]


WRONG = {
    "none": ({}, "num_virtual_tokens is not given"),
    "zero": ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0, expected a positive integer"),
    "template": ({"num_virtual_tokens": 5, "template": [5]}, r'template is \[5\], expected a list of numbers with "text"'),
    "sum": ({"num_virtual_tokens": 5, "template": [1, "text"]}, "has places for 1 virtual tokens, num_virtual_tokens is 5"),
    "both": ({"num_virtual_tokens": 5, "template": [5, "text"], "placeholder_token_id": 1}, "give one"),
    "width": ({"num_virtual_tokens": 5, "token_dim": 31}, "token_dim is 31, the model's embedding has 32"),
    "head": ({"num_virtual_tokens": 5, "modules_to_save": ["lm_hed"]}, "'lm_hed' matches no module"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("cls", [pf.PromptTuningConfig, pf.PromptEncoderConfig])
def test_wrong_configs(cls, config, message):
    model = build("llama").train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pf.get_peft_model(model, cls(**config))
    assert_unchanged(model, before)


def test_more_wrong_configs(tmp_path):
    for config, message in (
        ({"prompt_tuning_init": "WORDS"}, "prompt_tuning_init is 'WORDS', expected one of TEXT"),
        ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"}, "expected the tokenizer's folder or name"),
        (
            {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "a"},
            "prompt_tuning_init_text None, expected a text",
        ),
        ({"tokenizer_kwargs": {"a": 1}}, "tokenizer_kwargs go with prompt_tuning_init='TEXT' only"),
    ):
        with pytest.raises(ValueError, match=message):
            pf.PromptTuningConfig(num_virtual_tokens=V, **config)
    for config, message in (
        ({"encoder_reparameterization_type": "GRU"}, "'GRU', expected one of MLP, LSTM"),
        ({"encoder_dropout": 1.0}, "encoder_dropout is 1.0"),
        ({"encoder_hidden_size": -1}, "encoder_hidden_size is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            pf.PromptEncoderConfig(num_virtual_tokens=V, **config)
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a b", "tokenizer_name_or_path": str(tmp_path)}
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="the tokenizer .* cannot be loaded"):
        prompted(base=model, **text)
    tokenizer_at(tmp_path)
    with pytest.raises(ValueError, match="has no tokens; give a text"):
        prompted(base=model, **text | {"prompt_tuning_init_text": " "})
    model.resize_token_embeddings(8)
    with pytest.raises(ValueError, match="gives token 9, the model's embedding has 8 rows"):
        prompted(base=model, **text | {"prompt_tuning_init_text": "w9"})
    assert set(before["modules"]) == {n for n, _ in model.named_modules()}


def test_models_it_cannot_serve():
    for model, what in ((torch.nn.Linear(3, 3), "no input embedding"), (transformers.ViTModel(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )), "no in")):  # fmt: skip
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"{what}.*cannot stand among its inputs; use a method that adapts layers"):
            pf.get_peft_model(model, pf.PromptTuningConfig(num_virtual_tokens=V))
        assert_unchanged(model, before)


def test_generating_what_starts_from_token_ids_alone_is_refused():
    model = prompted()
    ids = torch.ones(1, 3, dtype=torch.long)
    for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
        with pytest.raises(ValueError, match=f"{name} starts from token ids"):
            model.generate(input_ids=ids, **{name: 2})
    with pytest.raises(ValueError, match="max_length is 3, but the prompt has 3 tokens"):
        model.generate(ids, max_length=3)
    with pytest.warns(UserWarning, match="position_ids are ignored"):
        model(input_ids=ids, position_ids=torch.arange(3)[None])


def test_beside_lora():
    """Virtual tokens change no layer: LoRA fits beside them, and both can be active."""
    model = prompted()
    model.add_adapter("lora", pf.LoraConfig(init_lora_weights=False))
    only = logits(model, **ragged("left"))
    model.base_model.set_adapter(["default", "lora"])
    both = logits(model, **ragged("left"))
    assert both.shape == only.shape and not torch.allclose(both, only)
    model.add_adapter("second", pf.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="only one of them can be active"):
        model.base_model.set_adapter(["default", "second"])
    model.set_adapter("second")
    assert logits(model, **ragged("left")).shape[1] == 2 + 7
