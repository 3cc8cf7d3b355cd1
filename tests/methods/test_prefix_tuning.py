"""Prefix tuning: against models that have the prefix as real tokens, generating, padding, checkpointing, files, bad input."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import pyfastpeft as pf
from tests.methods.contract import scatter
from tests.methods.models import VOCAB, batch, build
from tests.methods.test_prompt_inputs import RESUME, WEIGHTS, loud, ragged, train
from tests.methods.test_targets import assert_unchanged, snapshot

V = 4


def prefixed(kind="llama", task="CAUSAL_LM", base=None, **config):
    torch.manual_seed(3)
    base = build(kind) if base is None else base
    return pf.get_peft_model(base, pf.PrefixTuningConfig(task_type=task, num_virtual_tokens=V, **config)).eval()


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits


def flat(pairs):
    """prompt_embeddings [v, columns] of (keys, values) [1, heads, v, size] in the order of the attentions."""
    return torch.cat([x[0].transpose(0, 1).flatten(1) for pair in pairs for x in pair], dim=1)


def layers(cache):
    return [(layer.keys[:, :, :V], layer.values[:, :, :V]) for layer in cache.layers]


def set_prefix(model, pairs):
    with torch.no_grad():
        model.prefix_encoder["default"].embedding.weight.copy_(flat(pairs))


def _mistral():
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, sliding_window=32, head_dim=16,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bloom", "mistral"])
def test_a_prefix_of_real_tokens_is_those_tokens(kind, attention):
    """Truth: the keys and values that v tokens leave in a cache, as a prefix, do what the tokens themselves do."""
    torch.manual_seed(0)
    base = _mistral() if kind == "mistral" else loud(kind)
    if kind != "bloom":
        base.set_attn_implementation(attention)
    ids = batch(kind)["input_ids"][:1]
    whole = base(input_ids=ids, use_cache=True)
    model = prefixed(base=base)
    set_prefix(model, layers(whole.past_key_values))
    text = ids[:, V:]
    for inputs in ({}, {"attention_mask": torch.ones_like(text)}, {"position_ids": torch.arange(5)[None]}):
        got = logits(model, input_ids=text, **inputs)
        torch.testing.assert_close(got, whole.logits[:, V:], rtol=1e-3, atol=1e-4 * whole.logits.abs().max().item())
    with model.disable_adapter():
        assert torch.equal(logits(model, input_ids=ids), whole.logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_three_prefixes_of_an_encoder_decoder(attention):
    """Each against real tokens: in the decoder, behind the encoder's output, and in an encoder of one layer."""
    config = build("t5").config
    config.num_layers = 1
    torch.manual_seed(0)
    base = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(2)
    base.set_attn_implementation(attention)
    text, target = batch("t5")["input_ids"][:1], batch("t5")["labels"][:1]
    encoder, first = base.encoder(input_ids=text).last_hidden_state, base.encoder.block[0].layer[0]
    hidden = first.layer_norm(base.get_input_embeddings()(text[:, :V]))
    heads = [
        part(hidden).unflatten(-1, (4, 8)).transpose(1, 2) for part in (first.SelfAttention.k, first.SelfAttention.v)
    ]
    states = torch.randn(1, V, 32)
    both = {"last_hidden_state": torch.cat([states, base.encoder(input_ids=text).last_hidden_state[:, V:]], dim=1)}
    output = transformers.modeling_outputs.BaseModelOutput(**both)
    whole = base(encoder_outputs=output, decoder_input_ids=target, use_cache=True)
    cache = whole.past_key_values

    model = prefixed(base=base, task="SEQ_2_SEQ_LM")
    pairs = [heads], layers(cache.self_attention_cache), layers(cache.cross_attention_cache)
    set_prefix(model, [pair for group in pairs for pair in group])
    part = model.get_base_model().encoder(input_ids=text[:, V:]).last_hidden_state
    torch.testing.assert_close(part, encoder[:, V:], rtol=1e-4, atol=1e-5)
    got = logits(model, input_ids=text[:, V:], decoder_input_ids=target[:, V:])
    # the whole's encoder saw its first tokens as text does, the prefix's sees the same keys
    torch.testing.assert_close(got, whole.logits[:, V:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_every_part_has_a_gradient(kind, projection):
    """In PEFT half of an encoder-decoder's prefix has none."""
    task = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}[kind]
    model = prefixed(kind, task, loud(kind), prefix_projection=projection)
    model(**batch(kind)).loss.backward()
    encoder = model.prefix_encoder["default"]
    parts = {f"{name}[{i}]": block for name, p in encoder.named_parameters() for i, block in enumerate(
        p.grad.split(32 if kind != "llama" else 16, dim=0 if projection else 1))}  # fmt: skip
    dead = [name for name, block in parts.items() if not block.any()]
    assert not dead and len(parts) >= (4 if kind != "t5" else 12)


WAYS = {
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "dynamic": {"cache_implementation": "dynamic"},
}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "t5"])
def test_generating(kind):
    """Left-padded rows: every way of caching gives the tokens that forward gives for each row alone."""
    model = prefixed(
        kind, "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM", loud(kind), prefix_projection=kind == "gpt2"
    )
    inputs = ragged("right" if kind == "t5" else "left")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.generate(**inputs, **options)
    for row in range(2):
        ids = inputs["input_ids"][row, inputs["attention_mask"][row].bool()][None]
        if kind == "t5":
            got = logits(model, input_ids=ids, decoder_input_ids=tokens[row : row + 1, :-1])
        else:
            got = logits(model, input_ids=torch.cat([ids, tokens[row : row + 1, 7:-1]], dim=1))[:, ids.shape[1] - 1 :]
        assert torch.equal(got.argmax(-1)[0], tokens[row, -4:])
    beams = model.generate(**inputs, **options, num_beams=3)
    for way in WAYS.values():
        if kind == "bloom" and way.get("cache_implementation") == "static":
            continue  # transformers itself has no static cache for BLOOM
        assert torch.equal(model.generate(**inputs, **options, **way), tokens), way
        assert torch.equal(model.generate(**inputs, **options, **way, num_beams=3), beams), way
    unpadded = {key: value[:1] for key, value in inputs.items()}  # its masks are None
    static = {} if kind == "bloom" else WAYS["static"]
    assert torch.equal(model.generate(**unpadded, **options, **static)[:, -4:], tokens[:1, -4:])
    with model.disable_adapter():
        assert not torch.equal(model.generate(**inputs, **options), tokens)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bloom", "bert_tokens"])
def test_padding_on_either_side_changes_nothing(kind, side):
    if kind == "bert_tokens" and side == "left":
        pytest.skip("BERT counts positions from the left, padding or not")
    model = prefixed(kind, "TOKEN_CLS" if kind == "bert_tokens" else "CAUSAL_LM", loud(kind))
    inputs = ragged(side)
    got = logits(model, **inputs)
    for row in range(2):
        kept = inputs["attention_mask"][row].bool()
        alone = logits(model, input_ids=inputs["input_ids"][row, kept][None])[0]
        torch.testing.assert_close(got[row, kept], alone, rtol=1e-3, atol=1e-4 * alone.abs().max().item())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_gradient_checkpointing(kind, projection, reentrant):
    def gradients(checkpointing):
        model = prefixed(kind, "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM", prefix_projection=projection).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch(kind)).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert (checkpointed[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_a_projection_is_computed_once_while_it_is_frozen():
    model = prefixed(prefix_projection=True)
    encoder, calls = model.prefix_encoder["default"], []
    encoder.transform.register_forward_hook(lambda *_: calls.append(1))
    trained = logits(model, **ragged("left"))
    assert not calls  # each attention computes its own columns
    model.set_adapter("default", inference_mode=True)
    first = logits(model, **ragged("left"))
    torch.testing.assert_close(first, trained, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(model, **ragged("left")), first) and len(calls) == 1
    assert not model(**ragged("left")).logits.requires_grad and len(calls) == 1
    with torch.no_grad():
        encoder.transform[2].weight.mul_(2)
    assert not torch.allclose(logits(model, **ragged("left")), first) and len(calls) == 2


@pytest.mark.parametrize("fused", [False, True])
def test_evaluation_between_steps_sees_them(fused):
    """torch's fused AdamW, the Trainer's default, does not count its changes in the parameters' versions."""
    model = prefixed(prefix_projection=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=fused)
    seen = [logits(model, **ragged("left"))]
    for _ in range(2):
        model(**batch("llama")).loss.backward()
        optimizer.step()
        seen.append(logits(model, **ragged("left")))
    model.set_adapter("default", inference_mode=True)
    torch.testing.assert_close(logits(model, **ragged("left")), seen[2], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2])


def test_inference_mode():
    model = prefixed(prefix_projection=True)
    expected = logits(model, **ragged("left"))
    with torch.inference_mode():
        assert torch.equal(model(**ragged("left")).logits, expected)
        made_there = prefixed(prefix_projection=True)
        assert torch.equal(made_there(**ragged("left")).logits, expected)
    model.base_model.set_requires_grad("default", False)
    model(inputs_embeds=torch.randn(2, 3, 32, requires_grad=True)).logits.sum().backward()


@pytest.mark.parametrize("cls", [pf.PrefixTuningConfig, pf.PromptTuningConfig])
@pytest.mark.parametrize("kind", ["gpt2", "opt", "bert"])
def test_learned_positions_end(kind, cls):
    """64 of them: 60 tokens of text fit beside 4 virtual ones, 61 do not; padding needs no position."""
    task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    model = pf.get_peft_model(build(kind), cls(task_type=task, num_virtual_tokens=V)).eval()
    ids = torch.full((1, 61), 5)
    model(input_ids=ids[:, :60])
    with pytest.raises(ValueError, match="needs 65 positions with its 4 virtual tokens, the model has 64"):
        model(input_ids=ids)
    if kind != "bert":
        mask = torch.cat([torch.zeros_like(ids), torch.ones(1, 3, dtype=torch.long)], dim=1)
        assert torch.isfinite(model(input_ids=torch.ones_like(mask), attention_mask=mask).logits[:, -1]).all()
        with pytest.raises(ValueError, match="needs 65 positions"):
            model.generate(input_ids=ids, max_new_tokens=1)


def test_a_prefix_of_zeros():
    model = prefixed(init_weights="zero", prefix_projection=True)
    assert not model.base_model.tensors("default")["prompt_encoder.transform.2.weight"].any()
    assert not prefixed(init_weights="zero").base_model.tensors("default")["prompt_embeddings"].any()
    assert torch.isfinite(model(**batch("llama")).logits).all()


@pytest.mark.parametrize("projection", [False, True])
def test_training_goes_on_after_loading(projection, tmp_path):
    model = prefixed(prefix_projection=projection, encoder_hidden_size=12)
    train(model, 2)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)["prompt_embeddings"].shape == (V, 2 * 2 * 16)
    assert (tmp_path / RESUME).exists() == projection
    again = pf.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    train(model, 2), train(again, 2)
    assert torch.equal(logits(model.eval(), **ragged("left")), logits(again.eval(), **ragged("left")))


def test_pefts_prefix_of_an_encoder_decoder_is_refused(tmp_path):
    prefixed("t5", "SEQ_2_SEQ_LM").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors["prompt_embeddings"].shape == (V, 3 * 2 * 2 * 32)
    model = build("t5")
    before = snapshot(model)
    for columns, message in (
        (2 * 2 * 32, "a prefix for an encoder-decoder as PEFT makes it"),
        (32, r"shape \(4, 32\), "),
    ):
        save_file({"prompt_embeddings": torch.zeros(V, columns)}, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            pf.PeftModel.from_pretrained(model, tmp_path)
        assert_unchanged(model, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


WRONG = {
    "none": ({}, "num_virtual_tokens is not given"),
    "zero init": ({"init_weights": "zeros"}, "init_weights is 'zeros', expected None or 'zero'"),
    "heads": ({"num_virtual_tokens": 2, "token_dim": 15}, "token_dim 15 is no multiple of num_attention_heads 2"),
    "layers": ({"num_virtual_tokens": 2, "num_layers": 1}, "num_layers is 1, the model has 2 attentions with a cache"),
    "hidden": ({"num_virtual_tokens": 2, "encoder_hidden_size": 0}, "encoder_hidden_size is 0"),
}


@pytest.mark.parametrize(("config", "message"), WRONG.values(), ids=WRONG)
def test_wrong_configs(config, message):
    model = build("llama").train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pf.get_peft_model(model, pf.PrefixTuningConfig(**config))
    assert_unchanged(model, before)


def test_models_it_cannot_serve():
    for model in (nn.Linear(3, 3), nn.TransformerEncoderLayer(16, 2)):
        before = snapshot(model)
        with pytest.raises(ValueError, match="has no attention that takes a cache"):
            pf.get_peft_model(model, pf.PrefixTuningConfig(num_virtual_tokens=V))
        assert_unchanged(model, before)
    with pytest.raises(ValueError, match=r"has 2 heads of 8 keys or values, the prefix 2 of 4; .* token_dim=16"):
        prefixed(token_dim=8)(**ragged("left"))


def test_beside_lora_and_other_adapters():
    model = prefixed()
    plain = {n for n, _ in build("llama").named_modules()}
    assert plain <= {n for n, _ in model.get_base_model().named_modules()}
    only = logits(model, **ragged("left"))
    model.add_adapter("lora", pf.LoraConfig(init_lora_weights=False))
    model.add_adapter("soft", pf.PromptTuningConfig(num_virtual_tokens=2))
    model.base_model.set_adapter(["default", "lora", "soft"])
    assert logits(model, **ragged("left")).shape[1] == 7 + 2
    model.set_adapter("default")
    assert torch.equal(logits(model, **ragged("left")), only)
    for name in ("default", "lora", "soft"):
        model.delete_adapter(name)
    assert {n for n, _ in model.get_base_model().named_modules()} == plain
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("saved", ["self_attn", "layers.1"])
@pytest.mark.parametrize("prefix_first", [True, False])
def test_attentions_that_are_trained_whole(saved, prefix_first):
    """A copy of an attention has the one prefix, not a copy of it: whichever adapter came first, with both active."""
    truth = prefixed()
    set_prefix_of = truth.base_model.tensors("default")["prompt_embeddings"].detach().clone()
    whole = pf.LoraConfig(target_modules=["lm_head"], modules_to_save=[saved])
    if prefix_first:
        model = prefixed()
        model.add_adapter("whole", whole)
    else:
        model = pf.get_peft_model(build("llama"), whole, adapter_name="whole").eval()
        model.add_adapter("default", pf.PrefixTuningConfig(num_virtual_tokens=V))
    prefix = model.base_model.tensors("default")["prompt_embeddings"]
    with torch.no_grad():
        prefix.copy_(set_prefix_of)
    assert [name for name, _ in model.named_parameters() if "prompt" in name or "prefix" in name] == [
        "base_model.model.prefix_encoder.encoders.default.embedding.weight"
    ]
    model.base_model.set_adapter(["whole", "default"])
    assert torch.equal(logits(model, **ragged("left")), logits(truth, **ragged("left")))
    model(**batch("llama")).loss.backward()
    assert prefix.grad.any(dim=0).all()
    scatter(model)
    changed = logits(model, **ragged("left"))
    model.delete_adapter("default")
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.set_adapter("whole")
    assert not torch.equal(logits(model, **ragged("left")), changed)


def test_attentions_saved_with_the_prefix(tmp_path):
    model = scatter(prefixed(modules_to_save=["self_attn"]))
    model(**batch("llama")).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    got = logits(model, **ragged("left"))
    model.save_pretrained(tmp_path)
    again = pf.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(logits(again, **ragged("left")), got)
