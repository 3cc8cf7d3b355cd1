"""Which layers LoRA adapts when target_modules is not given, by transformers' model_type (the choices PEFT makes)."""

from __future__ import annotations

from torch import nn

_BY_MODULES = {
    ("q_proj", "v_proj"): """bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2
        qwen3""",
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("query_key_value",): "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
    ("q", "v"): "t5 mt5",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("Wqkv",): "mpt",
    ("c_proj", "c_attn"): "btlm",
    ("qkv_proj",): "codegen",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}
TARGET_MODULES = {model_type: modules for modules, types in _BY_MODULES.items() for model_type in types.split()}
TARGET_PATTERNS = {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}


def default_target_modules(model: nn.Module) -> set[str] | str:
    """The usual targets of the model's architecture; ValueError when it is not a known one."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in TARGET_PATTERNS:
        return TARGET_PATTERNS[model_type]
    if model_type in TARGET_MODULES:
        return set(TARGET_MODULES[model_type])
    what = f"model_type {model_type!r}" if model_type else f"{type(model).__name__}, which has no config.model_type"
    raise ValueError(
        f"LoraConfig: target_modules is None and there is no default for {what}; say which layers to adapt, for "
        "instance target_modules='all-linear'"
    )
