"""What each method promises. test_contract.py checks it for every method of the registry; a new method adds a row."""

import dataclasses
from collections.abc import Callable

import torch

import pyfastpeft as pf
from pyfastpeft.methods.base import PeftType
from pyfastpeft.methods.registry import METHODS
from tests.methods.models import TASK, build

KINDS = ("llama", "gpt2", "bert", "t5", "bloom")


@dataclasses.dataclass(frozen=True)
class Contract:
    """options    model kind -> the config's keyword arguments, for ours and for PEFT's class alike
    identity      a new adapter changes nothing
    mergeable     merge_adapter() and merge_and_unload() are offered
    exact_merge   merging quantises nothing again
    peft          PEFT's config class of the same files; None where PEFT has no such method or is wrong
    kinds, bases  models it serves
    quantized     it has something to do with quantised layers (False: the base only happens to be quantised)
    """

    options: Callable[[str], dict] = lambda kind: {}
    identity: bool = True
    mergeable: bool = True
    exact_merge: bool = False
    peft: str | None = None
    kinds: tuple[str, ...] = KINDS
    peft_kinds: tuple[str, ...] = KINDS


CONTRACTS = {
    PeftType.ADALORA: Contract(
        lambda kind: {"init_r": 4, "target_r": 2, "total_step": 20, "tinit": 2}, peft="AdaLoraConfig"
    ),
    PeftType.BITFIT: Contract(lambda kind: {"train_norms": True}, exact_merge=True),
    PeftType.IA3: Contract(peft="IA3Config"),
    PeftType.LORA: Contract(lambda kind: {"target_modules": "all-linear", "r": 4}, peft="LoraConfig"),
    PeftType.PREFIX_TUNING: Contract(
        # PEFT's prefix of an encoder-decoder is wrong
        lambda kind: {"num_virtual_tokens": 5, "prefix_projection": kind in ("gpt2", "t5")},
        identity=False,
        mergeable=False,
        peft="PrefixTuningConfig",
        peft_kinds=("llama", "gpt2", "bert", "bloom"),
    ),  # fmt: skip
    PeftType.PROMPT_TUNING: Contract(
        lambda kind: {"num_virtual_tokens": 5}, identity=False, mergeable=False, peft="PromptTuningConfig"
    ),
    PeftType.TRAINABLE_TOKENS: Contract(
        lambda kind: {"token_indices": [9, *range(8), *range(10, 50)]}, exact_merge=True, peft="TrainableTokensConfig"
    ),
    PeftType.P_TUNING: Contract(
        lambda kind: {"num_virtual_tokens": 5, "encoder_reparameterization_type": "MLP" if kind == "bert" else "LSTM"},
        identity=False,
        mergeable=False,
        peft="PromptEncoderConfig",
    ),  # fmt: skip
}


def config(method: PeftType, kind: str, library=pf, **more):
    name = METHODS[method].config_class.__name__ if library is pf else CONTRACTS[method].peft
    return getattr(library, name)(task_type=TASK[kind], **(CONTRACTS[method].options(kind) | more))


def base_model(kind: str, base: str = "dense", dtype=torch.float32):
    """base: "dense", "nf4", or "decoded" for the dense model an nf4 one stands for."""
    model = build(kind, dtype=torch.float32 if dtype == torch.float64 else dtype)
    if base != "dense":
        model = pf.quantize_model(model)
    if base == "decoded":
        model = pf.dequantize_model(model, torch.float32)
    return model.to(dtype) if dtype == torch.float64 else model


def adapted(method: PeftType, kind: str, base: str = "dense", dtype=torch.float32, **more):
    """A model with one adapter "default" as it is initialised, in eval mode."""
    return pf.get_peft_model(base_model(kind, base, dtype), config(method, kind, **more)).eval()


def scatter(model, seed=2, scale=0.1):
    """Moves every trainable parameter by a random step; the same for the same names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator) * scale
                parameter.add_(step.to(parameter.dtype))
    return model
