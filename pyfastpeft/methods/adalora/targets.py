"""Which layers AdaLoRA adapts when target_modules is not given, by transformers' model_type (the choices PEFT makes)."""

from __future__ import annotations

from torch import nn

_BY_MODULES = {
    "q k v o wi wo": "t5",
    "q k v o wi_0 wi_1 wo": "mt5",
    "q_proj k_proj v_proj out_proj fc1 fc2": "bart opt",
    "c_attn": "gpt2 gpt_bigcode",
    "query_key_value": "bloom gpt_neox",
    "q_proj v_proj": "gptj gpt_neo llama llama4 gemma gemma2 gemma3_text qwen2 qwen3",
    "query value": "bert",
    "query key value dense": "roberta",
    "query_proj key_proj value_proj dense": "deberta-v2",
    "in_proj": "deberta",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
}
TARGET_MODULES = {kind: set(names.split()) for names, kinds in _BY_MODULES.items() for kind in kinds.split()}
TARGET_PATTERNS = {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}


def default_target_modules(model: nn.Module) -> set[str] | str:
    """The usual targets of the model's architecture; ValueError when it is not a known one."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in TARGET_PATTERNS:
        return TARGET_PATTERNS[model_type]
    if model_type in TARGET_MODULES:
        return set(TARGET_MODULES[model_type])
    raise ValueError(
        f"AdaLoraConfig: target_modules is None and there is no default for {type(model).__name__}; say which layers to "
        "adapt, for instance target_modules='all-linear'"
    )
