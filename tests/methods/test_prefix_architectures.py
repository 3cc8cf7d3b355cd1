"""Prefix tuning on further architectures of transformers: a prefix of real tokens is those tokens, padded or not."""

import pytest
import torch
import transformers as tf

from pyfastpeft.methods.prefix_tuning.attention import extended_alibi
from tests.methods.models import VOCAB, batch
from tests.methods.test_prefix_tuning import V, layers, logits, prefixed, set_prefix
from tests.methods.test_prompt_inputs import ragged
from tests.methods.test_targets import assert_unchanged, snapshot

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 16}
GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "multi_query": False,
}
NEO = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1]],
}  # fmt: skip
MODELS = {
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED, sliding_window=32)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GROUPED, sliding_window=32)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZES)),
    "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**GPT, rotary_dim=4)),
    "gpt_neo": lambda: tf.GPTNeoForCausalLM(tf.GPTNeoConfig(**NEO)),
    "gpt_bigcode": lambda: tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**GPT)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**FALCON)),
    "falcon alibi": lambda: tf.FalconForCausalLM(tf.FalconConfig(**FALCON, alibi=True)),
    "falcon alibi eager": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(**FALCON, alibi=True, attn_implementation="eager")
    ),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)),
}


def loud(build):
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_a_prefix_of_real_tokens_is_those_tokens(kind):
    base = loud(MODELS[kind])
    ids = batch("llama")["input_ids"][:1]
    whole = base(input_ids=ids, use_cache=True)
    model = prefixed(base=base)
    set_prefix(model, layers(whole.past_key_values))
    got = logits(model, input_ids=ids[:, V:])
    torch.testing.assert_close(got, whole.logits[:, V:], rtol=1e-3, atol=1e-4 * whole.logits.abs().max().item())
    inputs = ragged("left")
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), tokens)
    alone = model.generate(input_ids=inputs["input_ids"][1:, 3:], **options)
    assert torch.equal(alone[:, -3:], tokens[1:, -3:])


def test_what_is_not_known_is_refused():
    model = prefixed()
    attention = model.get_base_model().model.layers[0].self_attn
    given = {"position_embeddings": (torch.ones(1, 2, 8), torch.zeros(1, 2, 8)), "attention_mask": {}}
    with pytest.raises(NotImplementedError, match="cannot lengthen a dict; load the model with attn_implementation"):
        attention(torch.zeros(1, 2, 32), **given)
    with pytest.raises(NotImplementedError, match="does not know how LlamaAttention uses ALiBi"):
        extended_alibi(torch.zeros(4, 1, 2), None, V, attention)


REFUSED = {
    "deberta": (
        lambda: tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(**SIZES)),
        "DebertaV2ForSequenceClassification has no attention that takes a cache",
    ),
    "flex": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, attn_implementation="flex_attention")),
        "the model's attention is flex_attention, whose block masks cannot be lengthened",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_refused_when_the_adapter_is_made(kind):
    build, message = REFUSED[kind]
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        prefixed(base=model, task="CAUSAL_LM" if kind == "flex" else "SEQ_CLS")
    assert_unchanged(model, before)


def test_an_encoder_decoder_with_learned_positions():
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "dropout": 0.0}
    base = loud(lambda: tf.BartForConditionalGeneration(tf.BartConfig(vocab_size=VOCAB, **sizes, **heads)))
    model = prefixed(base=base, task="SEQ_2_SEQ_LM")
    inputs, target = ragged("right"), torch.tensor([[0, 5, 6], [0, 7, 8]])
    got = logits(model, **inputs, decoder_input_ids=target)
    alone = logits(model, input_ids=inputs["input_ids"][1:, :4], decoder_input_ids=target[1:])
    torch.testing.assert_close(got[1:], alone, rtol=1e-3, atol=1e-4)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    for way in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False, **way), tokens)
    model(**inputs, labels=target).loss.backward()
    assert model.prefix_encoder["default"].embedding.weight.grad.any(dim=0).all()
