"""Tiny random models of the architectures that adapters must fit, and inputs for them."""

import torch
import transformers

VOCAB, HIDDEN, LAYERS, HEADS = 64, 32, 2, 4


def _llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip


def _llama_wide():
    """Every K a multiple of 64: bitsandbytes' AVX-512 dequantise is wrong elsewhere."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip


def _gpt2():
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=64)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return transformers.GPT2LMHeadModel(config)


def _bert_config(**more):
    return transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **more,
    )  # fmt: skip


def _bert():
    return transformers.BertForSequenceClassification(_bert_config(num_labels=3))


def _bert_tokens():
    return transformers.BertForTokenClassification(_bert_config(num_labels=3))


def _t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=HEADS, dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


def _opt():
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, ffn_dim=48, num_attention_heads=HEADS,
            max_position_embeddings=64, word_embed_proj_dim=HIDDEN, dropout=0.0,
        )
    )  # fmt: skip


def _bloom():
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS)
    )


BUILDERS = {
    "llama": _llama, "llama_wide": _llama_wide, "gpt2": _gpt2, "bert": _bert, "bert_tokens": _bert_tokens, "t5": _t5, "opt": _opt, "bloom": _bloom,
}  # fmt: skip
TASK = {
    "llama": "CAUSAL_LM", "llama_wide": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "bert_tokens": "TOKEN_CLS", "t5": "SEQ_2_SEQ_LM",
    "opt": "CAUSAL_LM", "bloom": "CAUSAL_LM",
}  # fmt: skip


def build(kind, seed=0, dtype=torch.float32):
    """A model with the same weights for the same seed, in eval mode."""
    torch.manual_seed(seed)
    return BUILDERS[kind]().eval().to(dtype)


def batch(kind, seed=1, rows=2, length=9):
    """Keyword arguments with labels for a model of this kind."""
    generator = torch.Generator().manual_seed(seed)

    def ids(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    inputs = {"input_ids": ids(VOCAB, rows, length), "attention_mask": torch.ones(rows, length, dtype=torch.long)}
    if kind == "bert":
        inputs["labels"] = ids(3, rows)
    elif kind == "bert_tokens":
        inputs["labels"] = ids(3, rows, length)
    elif kind == "t5":
        inputs["labels"] = ids(VOCAB, rows, 7)
    else:
        inputs["labels"] = inputs["input_ids"].clone()
    return inputs


def randomise_adapters(model, seed=2, scale=0.1):
    """Gives every trainable parameter random values, so that B is not zero; the same for the same order of names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
