"""The methods with their usual settings, ours and the peer's: what quality.py trains and bench_methods.py measures.

A peer is Hugging Face PEFT (with bitsandbytes below a 4-bit base); PEFT has no BitFit, so that one stands beside a loop
of plain torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .models import bitsandbytes_layers

OURS = "ours"
LOW_RANK = {"lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "all-linear"}
VIRTUAL_TOKENS = 20
PROMPT_TEXT = "import os, sys\n\n\ndef read(self, "


@dataclasses.dataclass(frozen=True)
class Method:
    """name      in the tables
    config       the config's class, which PEFT has by the same name
    options      its arguments
    rate, of     the learning rate, and where it is from
    quantised    over an NF4 base
    peer         what ours stands beside; None: nothing else has it
    """

    name: str
    config: str
    options: dict
    rate: float
    of: str
    quantised: bool = False
    peer: str | None = "peft"

    @property
    def needs(self) -> tuple[str, ...]:
        """Packages of the peer."""
        names = {"peft": ("peft",), "peft + bitsandbytes": ("peft", "bitsandbytes")}
        return names.get(self.peer, ())


LORA = {"r": 8, **LOW_RANK}
ADALORA = {"init_r": 12, "target_r": 8, **LOW_RANK}
LORA_BEST_RATE, ADALORA_BEST_RATE = 4e-3, 3e-2
METHODS = (
    Method("LoRA", "LoraConfig", LORA, 1e-3, "PEFT's peft_lora_seq2seq example"),
    Method("QLoRA", "LoraConfig", LORA, 1e-3, "that of LoRA, to compare", True, "peft + bitsandbytes"),
    Method("DoRA", "LoraConfig", LORA | {"use_dora": True}, 1e-3, "that of LoRA"),
    Method("ReLoRA", "LoraConfig", LORA, 1e-3, "that of LoRA, to compare", peer=None),
    Method(
        "AdaLoRA",
        "AdaLoraConfig",
        ADALORA,
        1e-3,
        "PEFT's peft_adalora_seq2seq example",
    ),
    # a budget spent in two ways, each at the best rate for this model of those tried with one seed
    Method("LoRA, its best rate", "LoraConfig", LORA, LORA_BEST_RATE, "the best of 1e-3, 4e-3, 8e-3", peer=None),
    Method(
        "AdaLoRA, its best rate",
        "AdaLoraConfig",
        ADALORA,
        ADALORA_BEST_RATE,
        "the best of 1e-3, 1e-2, 3e-2, 6e-2",
        peer=None,
    ),
    Method(
        "(IA)³",
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        8e-3,
        "PEFT's peft_ia3_seq2seq example",
    ),
    Method(
        "BitFit",
        "BitFitConfig",
        {"target_modules": "all-linear"},
        1e-3,
        "the largest of its paper's search",
        peer="torch",
    ),
    Method(
        "prefix tuning, projection",
        "PrefixTuningConfig",
        {"num_virtual_tokens": VIRTUAL_TOKENS, "prefix_projection": True},
        1e-2,
        "PEFT's peft_prefix_tuning_seq2seq example",
    ),
    Method(
        "P-tuning v2 (prefix, no projection)",
        "PrefixTuningConfig",
        {"num_virtual_tokens": VIRTUAL_TOKENS},
        1e-2,
        "PEFT's peft_prefix_tuning_seq2seq example",
    ),
    Method(
        "prompt tuning",
        "PromptTuningConfig",
        {
            "num_virtual_tokens": VIRTUAL_TOKENS,
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": PROMPT_TEXT,
        },
        3e-2,
        "PEFT's peft_prompt_tuning_clm example",
    ),
    Method(
        "P-tuning, MLP",
        "PromptEncoderConfig",
        {"num_virtual_tokens": VIRTUAL_TOKENS, "encoder_reparameterization_type": "MLP", "encoder_hidden_size": 128},
        1e-3,
        "PEFT's P_Tuning example",
    ),
    Method(
        "P-tuning, LSTM",
        "PromptEncoderConfig",
        {
            "num_virtual_tokens": VIRTUAL_TOKENS,
            "encoder_reparameterization_type": "LSTM",
            "encoder_hidden_size": 128,
            "encoder_num_layers": 2,
            "encoder_dropout": 0.1,
        },
        1e-3,
        "PEFT's P_Tuning example",
    ),
)


def method_named(name: str) -> Method:
    return next(method for method in METHODS if method.name == name)


def config_of(method: Method, library, steps: int, tokenizer: Path | str | None = None):
    """The method's config of pyfastpeft, or of peft, for a training of so many steps."""
    options = dict(method.options)
    if method.config == "AdaLoraConfig":
        # a tenth of the run before the pruning, a fifth after it, as the command line does it
        options |= {"tinit": steps // 10, "tfinal": steps // 5, "deltaT": 1, "total_step": steps}
    if "prompt_tuning_init" in options:
        if tokenizer is None:
            options = {"num_virtual_tokens": VIRTUAL_TOKENS, "prompt_tuning_init": "SAMPLE_VOCAB"}
        else:
            options["tokenizer_name_or_path"] = str(tokenizer)
    return getattr(library, method.config)(task_type="CAUSAL_LM", **options)


def adapted(
    method: Method, implementation: str, model: nn.Module, steps: int, tokenizer: Path | str | None = None
) -> nn.Module:
    """The model with the method's adapter, in place; `implementation` is "ours" or the method's peer."""
    ours = implementation == OURS
    if not ours and method.peer == "torch":
        return with_biases(model)
    if method.quantised:
        import pyfastpeft as pf

        model = pf.quantize_model(model, double_quant=True) if ours else bitsandbytes_layers(model)
    library = importlib.import_module("pyfastpeft" if ours else "peft")
    return library.get_peft_model(model, config_of(method, library, steps, tokenizer))


class BiasedLinear(nn.Module):
    """A frozen linear layer and a trained bias behind it, in fp32 as adapters are."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.trained_bias = nn.Parameter(torch.zeros(linear.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y + self.trained_bias.to(y.dtype)


def with_biases(model: nn.Module) -> nn.Module:
    """BitFit by hand, in place: a trained bias behind every linear layer but the output head."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, BiasedLinear(module))
    return model


def after_step(
    method: Method, implementation: str, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int
) -> Callable[[int], None] | None:
    """What the method needs after optimizer step 1, 2, … beside the optimizer's own; None: nothing."""
    if method.name == "ReLoRA":
        from pyfastpeft.methods.relora import ReLora

        every = math.ceil(steps / 4)
        relora = ReLora(model, optimizer, every, total_steps=steps, restart_warmup_steps=max(1, every // 10))
        return lambda step: relora.step()
    if method.config == "AdaLoraConfig" and implementation != OURS:
        return model.base_model.update_and_allocate  # PEFT's does not allocate by itself
    return None
