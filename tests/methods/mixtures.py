"""Tiny mixtures of experts, whose expert weights are stacked Parameters, and the names of these."""

import torch
import transformers

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
KINDS = ("mixtral", "qwen3_moe", "gpt_oss")


def mixture(kind, implementation="eager", dtype=torch.float32):
    """A model with the same weights every time. gpt_oss has its expert weights the other way round, and biases."""
    torch.manual_seed(0)
    if kind == "mixtral":
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=3, **SIZES))
    elif kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, **SIZES
        )
        model = transformers.Qwen3MoeForCausalLM(config)
    else:
        config = transformers.GptOssConfig(
            num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8, **SIZES
        )
        config.layer_types = ["sliding_attention", "full_attention"]
        model = transformers.GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():  # some are zero, or whatever memory holds
        if "experts" in name or "router" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.set_experts_implementation(implementation)
    return model.eval().to(dtype)


def tokens(rows=2, length=9):
    ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}
