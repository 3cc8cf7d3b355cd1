"""Merge and reinitialise: the adapter's update moves into the base's weights and a new update begins at zero."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pyfastpeft.adapted_model import AdaptedModel


@torch.no_grad()
def merge_and_reinit(model: nn.Module, adapter_names: Iterable[str] | None = None) -> dict[str, float]:
    """W ← W + s · B A in every layer, then A is drawn anew and B = 0: the model's function stays what it was.

    model           a PeftModel with LoRA adapters
    adapter_names   None: the active ones

    Returns {path: relative error ‖stored − (W + s·BA)‖ / ‖W + s·BA‖} of the adapted layers: 0.0 on fp32 bases, the
    rounding of a 16-bit base (which loses updates below its resolution), the re-quantisation of a 4-bit one.

    A is drawn from torch's CPU generator: processes that train one model together must have been seeded alike.
    Parameters stay the same objects, so the optimizer goes on with them; see reset_optimizer_state. The base is changed
    for good; save_pretrained() then saves the changed weights beside the adapter.

    Raises ValueError, with nothing changed, for adapters of other methods, NaN or infinities in an adapter or in a merged
    weight; RuntimeError while adapters are merged (merge_adapter).
    Source: Lialin et al., arXiv:2307.05695, algorithm 1.
    """
    adapted = model if isinstance(model, AdaptedModel) else getattr(model, "base_model", None)
    if not isinstance(adapted, AdaptedModel):
        raise TypeError(f"merge_and_reinit: the model is a {type(model).__name__}, expected a PeftModel")
    names = adapted.active_adapters if adapter_names is None else [adapted.check_known(n) for n in adapter_names]
    layers = [(path, layer) for path, layer in adapted.layers() if any(n in layer.held_adapters() for n in names)]
    for path, layer in layers:
        if getattr(layer, "reinitialise", None) is None:
            raise ValueError(f"merge_and_reinit: {path} is a {type(layer).__name__}, expected adapters of LoraConfig")
        if any(name in layer.lora_magnitude_vector for name in names):
            raise ValueError(f"merge_and_reinit: {path} has a DoRA adapter, whose m would have to start again with it")
        if layer.merged_adapters:
            raise RuntimeError(f"merge_and_reinit: {path} has merged adapters; unmerge_adapter() first")
        try:
            layer.check_merge(names, safe=True)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    adapted.untie(layers, names)
    errors = {}
    for path, layer in [(path, layer) for path, layer in layers if not layer.follows(names)]:
        here = layer.mergeable(names)
        weight, _ = layer.merged_weights(here)
        errors[path] = layer.base.set_weight(weight)
        layer.base_changed = True
        for name in here:
            layer.reinitialise(name)
    return errors
