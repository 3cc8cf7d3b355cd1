"""The Llama shape that the whole-step and memory benches train, with random weights, in every candidate's dress."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable

import torch

RANK = 16
# 84 M parameters; --quick and the memory bench's sweep use fewer layers
HIDDEN, LAYERS, FEED_FORWARD, VOCABULARY = 1024, 6, 2816, 4096
BATCH, TOKENS = 4, 256


def llama(layers: int = LAYERS) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FEED_FORWARD, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=VOCABULARY, max_position_embeddings=TOKENS, tie_word_embeddings=True,
        use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def _frozen(layers: int):
    model = llama(layers)
    model.requires_grad_(False)
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


def _full(layers: int):
    return llama(layers)


def _ours(layers: int, quantise: bool):
    import pyfastpeft as pf

    model = llama(layers)
    if quantise:
        model = pf.quantize_model(model, double_quant=True)
    config = pf.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return pf.get_peft_model(model, config)


def bitsandbytes_layers(model: torch.nn.Module) -> torch.nn.Module:
    """The model with bitsandbytes' NF4 layers, double quantisation, in place; the output head stays."""
    import bitsandbytes as bnb

    for name, child in list(model.named_modules()):
        if type(child) is not torch.nn.Linear or name == "lm_head":
            continue
        layer = bnb.nn.Linear4bit(
            child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(
            child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.to("cpu"))
    # PEFT asks a 4-bit model for this attribute
    model.is_loaded_in_4bit = True
    return model


def _peft(layers: int, quantise: bool):
    import peft

    model = llama(layers)
    if quantise:
        model = bitsandbytes_layers(model)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def _ia3(package: str):
    def build(layers: int):
        library = importlib.import_module(package)
        config = library.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        )
        return library.get_peft_model(llama(layers), config)

    return build


# name → (builder of the model for a number of layers, the packages it needs)
MODELS: dict[str, tuple[Callable[[int], torch.nn.Module], tuple[str, ...]]] = {
    "LoRA, ours": (lambda layers: _ours(layers, False), ()),
    "LoRA, peft": (lambda layers: _peft(layers, False), ("peft",)),
    "QLoRA, ours": (lambda layers: _ours(layers, True), ()),
    "QLoRA, peft + bitsandbytes": (lambda layers: _peft(layers, True), ("peft", "bitsandbytes")),
    "(IA)³, ours": (_ia3("pyfastpeft"), ()),
    "(IA)³, peft": (_ia3("peft"), ("peft",)),
    "frozen base": (_frozen, ()),
    "full fine-tuning": (_full, ()),
}


def training_step(
    model: torch.nn.Module, batch: int = BATCH, tokens: int = TOKENS, in_backward: bool | None = None
) -> Callable[[], float]:
    """Forward, loss, backward and the optimizer's step where anything trains; returns the loss.

    in_backward  our AdamW for any model, stepping after backward (False) or inside it
    """
    import pyfastpeft as pf

    model.train()
    ids = torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))
    trainable = [p for p in model.parameters() if p.requires_grad]
    ours = isinstance(model, pf.PeftModel) or in_backward is not None
    build = pf.optim.AdamW if ours else (lambda ps: torch.optim.AdamW(ps, fused=True))
    optimizer = build(trainable) if trainable else None
    if in_backward:
        optimizer.step_in_backward()

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def collect() -> None:
    gc.collect()
