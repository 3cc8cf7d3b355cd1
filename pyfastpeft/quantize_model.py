"""quantize_model: the linear layers of a model to 4 bits, in place, one layer at a time; and the way back."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from pyfastpeft import ops
from pyfastpeft.nn.dense import first_non_finite
from pyfastpeft.nn.nf4_linear import NF4Linear
from pyfastpeft.nn.quantization_plan import make_plan
from pyfastpeft.nn.quantization_report import (
    QuantizationReport,
    QuantizedEntry,
    model_bytes,
    quantized_entry,
    readable_bytes,
    record_in_config,
)

# from this many weights on the work takes long enough to be watched (about 10 s on two cores)
_PROGRESS_FROM = 1 << 30
# above this the mean of the block maxima may overflow fp32 and double quantisation refuse the weight
_LARGE = 1e28


def quantize_model(
    model: nn.Module,
    blocksize: int = 64,
    quant_type: str = "nf4",
    double_quant: bool = True,
    skip: Iterable[str] | None = ("lm_head",),
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Replaces the linear layers of `model` by NF4Linear, in place, and returns the model (QLoRA, arXiv:2305.14314).

    model          any module holding torch.nn.Linear or transformers' Conv1D (stored transposed afterwards: NF4Linear
                   always has [N, K]); its weights float32, float16 or bfloat16
    blocksize, quant_type ("nf4" | "fp4"), double_quant    as in ops.quantize_4bit
    skip           what to leave dense: paths of modules ("model.layers.0.mlp"), ends of paths ("down_proj"), both with
                   everything below them, or regular expressions that match a whole path. "lm_head" also stands for the
                   output head under any other name: the layers of a transformers model outside its base_model
                   (score, classifier, embed_out, …) and its output embedding.
    compute_dtype  as in NF4Linear: None computes in the input's dtype

    Left dense, each with its reason in `model.quantization_report`: what skip names; weights tied to another module's
    (an output layer sharing the embedding); layers that the model's own code keeps in fp32 or whose weight it reads
    (T5's wo, MultiheadAttention, TransformerEncoderLayer's fast path); subclasses of nn.Linear; layers with hooks; and
    every other parameter of two or more dimensions: embeddings, convolutions, 3-D expert weights (a warning says so).

    Each dense weight is freed before the next is touched: the peak is the model as it was plus one quantised layer (and
    the transposed copy of one Conv1D).
    All checks come before the first change, so a refused model is left as it was. A transformers config gets the
    quantization_config that bitsandbytes' checkpoints have: save_pretrained's folder loads there too.

    Raises ValueError for a model that is already quantised, has adapters or no layer to quantise, weights on the meta
    device, NaN or infinities (module and position named), a skip entry that matches nothing (near misses listed), a
    wrong blocksize or quant_type; TypeError for a weight of another dtype. RuntimeError, if a layer fails after the
    checks (memory): the model is then partly quantised.
    """
    plan = make_plan(model, skip)
    # the arguments, tried on one weight; a dtype or a block size that is refused is refused here
    NF4Linear(1, 1, False, blocksize, double_quant, compute_dtype, quant_type, device="cpu")
    _check_weights(model, plan.layers, blocksize, quant_type, double_quant)
    report = QuantizationReport(quant_type, blocksize, double_quant, skipped=plan.skipped)
    report.model_bytes_before = model_bytes(model)
    with _progress(len(plan.layers), plan.values) as advance:
        for name in plan.layers:
            try:
                report.quantized.append(
                    _quantize_layer(model, name, plan.places[name], blocksize, double_quant, compute_dtype, quant_type)
                )
            except Exception as error:
                raise RuntimeError(
                    f"quantize_model: stopped at {name}: {error}; {len(report.quantized)} of {len(plan.layers)} layers "
                    "are quantised already and their dense weights freed: load the model again"
                ) from error
            advance()
    report.model_bytes_after = model_bytes(model)
    model.quantization_report = report
    record_in_config(model, report, compute_dtype)
    _warn_of_experts(report)
    return model


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces every NF4Linear of `model` by the dense nn.Linear it stands for, in place; returns the model.

    dtype   of the weights; None: what each had before it was quantised

    What quantising lost stays lost. The report and the quantization_config that quantize_model left are removed. A
    Conv1D that was quantised comes back as an nn.Linear.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NF4Linear):
                setattr(parent, name, child.dequantize(dtype))
    model.__dict__.pop("quantization_report", None)
    config = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return model


def _check_weights(model: nn.Module, layers: list[str], blocksize: int, quant_type: str, double_quant: bool) -> None:
    for name in layers:
        weight = model.get_submodule(name).weight.detach()
        position = first_non_finite(weight)
        if position is not None:
            raise ValueError(
                f"quantize_model: {name}.weight[{', '.join(map(str, position))}] is {weight[position].item()}, expected "
                f"finite values (shape {tuple(weight.shape)}); repair the checkpoint, or leave the layer dense with "
                f"skip=(..., {name!r}). The model was left as it was."
            )
        if double_quant and weight.dtype != torch.float16 and max(-weight.amin(), weight.amax()) > _LARGE:
            try:
                ops.quantize_4bit(weight, blocksize, quant_type, double_quant)
            except ValueError as error:
                raise ValueError(f"quantize_model: {name}: {error}. The model was left as it was.") from None


def _quantize_layer(model, name, places, blocksize, double_quant, compute_dtype, quant_type) -> QuantizedEntry:
    linear = model.get_submodule(name)
    new = NF4Linear.from_linear(linear, blocksize, double_quant, compute_dtype, quant_type)
    entry = quantized_entry(name, new, type(linear).__name__)
    for parent, attribute in places:
        setattr(model.get_submodule(parent), attribute, new)
    return entry


def _warn_of_experts(report: QuantizationReport) -> None:
    """Most of a mixture's memory may lie there, so the report alone would be too quiet."""
    experts = [entry for entry in report.skipped if len(entry.shape) == 3 and entry.reason.startswith("a 3-D weight")]
    if experts:
        size, whole = (readable_bytes(n) for n in (sum(e.nbytes for e in experts), report.model_bytes_after))
        warnings.warn(
            f"quantize_model: {len(experts)} 3-D expert weights stay dense, {size} of the model's {whole}: "
            f"{experts[0].name} {list(experts[0].shape)}, …; model.quantization_report lists all",
            stacklevel=3,
        )


@contextlib.contextmanager
def _progress(layers: int, values: int) -> Iterator:
    """A bar on the terminal for a large model; nothing otherwise."""
    if values < _PROGRESS_FROM:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("quantising to 4 bits", total=layers)
        yield lambda: bar.advance(task)
