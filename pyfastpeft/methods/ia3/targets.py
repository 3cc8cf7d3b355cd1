"""Which layers (IA)³ scales when the config leaves it open, by transformers' model_type (the choices PEFT makes)."""

from __future__ import annotations

from torch import nn

# (output scaled, input scaled): model types
_BY_MODULES = {
    ("k v", "wo"): "t5",
    ("k v wi_1", ""): "mt5",
    ("c_attn", "mlp.c_proj"): "gpt2 gpt_bigcode",
    ("query_key_value", "mlp.dense_4h_to_h"): "bloom",
    ("query_key_value", "dense_4h_to_h"): "gpt_neox RefinedWebModel RefinedWeb falcon",
    ("key value", "output.dense"): "bert roberta",
    ("key_proj value_proj", "output.dense"): "deberta-v2",
    ("in_proj", "output.dense"): "deberta",
    ("q_proj k_proj", "fc2"): "opt",
    ("q_proj v_proj", "fc2"): "bart phi",
    ("q_proj v_proj", "fc_out"): "gptj",
    ("q_proj v_proj", "c_proj"): "gpt_neo",
    ("k_proj v_proj", "down_proj"): "llama mistral",
    ("k_proj v_proj", "w2"): "mixtral",
    ("q_proj v_proj", "down_proj"): "llama4 gemma gemma2 gemma3_text qwen2 qwen3",
}
TARGETS = {
    model_type: (set(outputs.split()), set(inputs.split()))
    for (outputs, inputs), types in _BY_MODULES.items()
    for model_type in types.split()
}


def default_targets(model: nn.Module) -> tuple[set[str], set[str]] | None:
    """(names whose output is scaled, feed-forward names) of the model's architecture; None when it is not a known one."""
    return TARGETS.get(getattr(getattr(model, "config", None), "model_type", None))
