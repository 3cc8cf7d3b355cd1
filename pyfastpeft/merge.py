"""An adapter merged into its base: a plain transformers model. What `pyfastpeft merge` runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyfastpeft.finetune.config import trained_quantized
from pyfastpeft.finetune.errors import ConfigError
from pyfastpeft.finetune.files import new_folder, prepare_output
from pyfastpeft.finetune.model import DTYPES, Base, load_base, quantize_base, quiet_transformers, read_model_config
from pyfastpeft.generate import check_adapter, training_options

INTO = ("original", "dequantized")


@dataclass
class MergeConfig:
    """What to merge.

    model, adapter    base model (folder or id); folder of the adapter in PEFT's format
    output            folder of the merged model: it must not exist yet, or be empty
    dtype             of the merged weights: None = as the base's files, or float32, bfloat16, float16
    into              "original": W + ΔW with the base's own weights. "dequantized": Q(W) + ΔW, where Q(W) is the
                      4-bit weight a QLoRA adapter was trained on, written as dense weights: the function that was
                      trained
    """

    model: str
    adapter: str
    output: str
    dtype: str | None = None
    into: str = "original"

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"--dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.into not in INTO:
            raise ConfigError(f"--into: expected one of {', '.join(INTO)}, got {self.into!r}")


@dataclass
class MergeResult:
    """What was merged. quantization_error: ‖Q(W) − W‖ / ‖W‖ over all adapted weights (None for a dense base)."""

    output: Path
    dtype: torch.dtype
    layers: int
    parameters: int
    quantization_error: float | None
    notes: list[str]


def merge(config: MergeConfig) -> MergeResult:
    """Merges an adapter into its base's dense weights and saves the model with its tokenizer, in one rename.

    Per adapted layer W' = W + s·B·A, summed in fp32 and rounded once to the dtype of the result. An adapter of a 4-bit base was
    trained on Q(W), so merging it into W makes a model that differs from the trained one by W − Q(W), usually for the
    better; the result says how much that is, and `into="dequantized"` merges into Q(W) instead.

    Raises ConfigError, ModelError, OutputError. Source: Hu et al. 2021, §4.1 (no inference latency).
    """
    from pyfastpeft import PeftModel

    adapter = check_adapter(config.adapter)
    output = Path(config.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output}: expected a new or an empty folder; it exists and holds something")
    prepare_output(output.parent)
    options = training_options(adapter) or {}
    quantised = trained_quantized(options)
    if config.into == "dequantized" and not quantised:
        raise ConfigError(
            f"--into dequantized: {adapter} has no run.json of a run on a 4-bit base beside it, so its quantisation is not "
            "known; use --into original"
        )
    model_config = read_model_config(config.model)
    stored = getattr(model_config, "dtype", None) or torch.float32
    target = DTYPES[config.dtype] if config.dtype is not None else stored
    base = load_base(config.model, device="cpu", dtype=torch.promote_types(stored, target))
    notes: list[str] = []
    error = None
    if config.into == "dequantized":
        error = _dequantize_base(base, options)
    model = PeftModel.from_pretrained(base.model, str(adapter))
    layers = [layer for _, layer in model.base_model.layers()]
    if quantised and error is None:
        weights = (layer.base_layer.weight.detach() for layer in layers)
        error = _relative_error((weight, _quantized(weight, options)) for weight in weights)
    if error is not None:
        notes.append(_explain(config.into, error, options))
    merged = model.merge_and_unload().to(target)
    with quiet_transformers(), new_folder(output, "the merged model") as folder:
        merged.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    count = sum(p.numel() for p in merged.parameters())
    return MergeResult(output, target, len(layers), count, error, notes)


def _explain(into: str, error: float, options: dict[str, Any]) -> str:
    kind = f"{options['quant_type']}, blocks of {options['blocksize']}"
    what = (
        f"the adapter was trained on a 4-bit base ({kind}), whose weights are {error:.2%} away from the original ones"
    )
    if into == "original":
        return f"{what}; it is merged into the original ones (--into dequantized: into those it was trained on)"
    return f"{what}; it is merged into the 4-bit ones, written as dense weights"


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("blocksize", "quant_type", "double_quant")}


def _dequantize_base(base: Base, options: dict[str, Any]) -> float:
    """Replaces every weight W that training had quantised by Q(W), dense; returns the relative error of all."""
    from pyfastpeft import dequantize_model

    before = {name: parameter.detach() for name, parameter in base.model.named_parameters()}
    quantize_base(base, **_settings(options))
    quantized = [f"{entry.name}.weight" for entry in base.model.quantization_report.quantized]
    dequantize_model(base.model)
    after = dict(base.model.named_parameters())
    return _relative_error((before[name], after[name].detach()) for name in quantized)


def _quantized(weight: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Q(W), in W's dtype."""
    from pyfastpeft import ops

    return ops.dequantize_4bit(ops.quantize_4bit(weight.contiguous(), **_settings(options)), dtype=weight.dtype)


def _relative_error(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """‖W' − W‖ / ‖W‖ over all pairs (W, W'), in fp64."""
    difference = norm = 0.0
    for weight, other in pairs:
        difference += float((other.double() - weight.double()).square().sum())
        norm += float(weight.double().square().sum())
    return math.sqrt(difference / norm) if norm else 0.0
