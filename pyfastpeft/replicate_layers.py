"""layer_replication: a deeper model out of a model's own layers, whose weights the copies share.

[[0, 4], [2, 5]] stacks layers 0, 1, 2, 3, 2, 3, 4. Every place has modules of its own, so adapters of its own, around the same
Parameters and buffers (a 4-bit weight's statistics are copied). The config follows: the number of layers, and every list it
has with an entry for each of them (layer_types), which PEFT leaves as they were.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn

from pyfastpeft.methods.base import AdapterHolder, PeftConfig, bare_modules

_NAMES = ("layers", "layer", "h", "block", "blocks")
_RECORD = "_replicated_layers"


@dataclasses.dataclass
class _Replicated:
    """What replicate_layers() changed, and what was there."""

    ranges: list[list[int]]
    path: str  # of the ModuleList
    layers: nn.ModuleList
    settings: dict[str, Any]  # of the model's config


def check_ranges(config: PeftConfig) -> None:
    """The field layer_replication of a config: TypeError / ValueError for what no model can have."""
    ranges, owner = config.layer_replication, type(config).__name__
    if ranges is None:
        return
    right = isinstance(ranges, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(end) is int for end in pair) for pair in ranges
    )
    if not right:
        raise TypeError(f"{owner}: layer_replication is {ranges!r}, expected a list of pairs (start, end) of integers")
    if not ranges or not all(0 <= start < end for start, end in ranges):
        raise ValueError(f"{owner}: layer_replication is {ranges!r}, expected pairs with 0 <= start < end")


def replicate_layers(model: nn.Module, config: PeftConfig) -> bool:
    """Stacks the model's layers as layer_replication says; whether it did: a second adapter may ask for the same stack.

    Raises ValueError, with nothing changed, where the layers are not to be found, hold adapters already, or are too few.
    """
    if not getattr(config, "layer_replication", None):
        return False
    ranges = [list(pair) for pair in config.layer_replication]
    former = getattr(model, _RECORD, None)
    if former is not None:
        if former.ranges != ranges:
            raise ValueError(
                f"layer_replication is {ranges}, and an earlier adapter has stacked the model's layers as {former.ranges}; "
                "a model has one stack"
            )
        return False
    path, layers = _find_layers(model)
    if any(isinstance(module, AdapterHolder) for module in layers.modules()):
        raise ValueError(
            "layer_replication: the layers hold an earlier adapter already; replicate before the first one"
        )
    count = len(layers)
    if max(end for _, end in ranges) > count:
        raise ValueError(f"layer_replication is {ranges}, and {path} has {count} layers")
    order = [i for start, end in ranges for i in range(start, end)]
    stack = nn.ModuleList()
    for place, i in enumerate(order):
        shared = [*layers[i].parameters(), *layers[i].buffers()]
        layer = copy.deepcopy(layers[i], {id(tensor): tensor for tensor in shared})
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # under which a cache keeps what the layer has seen
                module.layer_idx = place
        stack.append(layer)
    stack.train(layers.training)
    settings = getattr(model, "config", None)
    kept = {}
    for name in [] if settings is None else list(vars(settings)):
        value = getattr(settings, name)
        if "layer" in name and isinstance(value, list) and len(value) == count:
            kept[name] = value
            setattr(settings, name, [value[i] for i in order])
    if getattr(settings, "num_hidden_layers", None) is not None:
        kept["num_hidden_layers"] = settings.num_hidden_layers
        settings.num_hidden_layers = len(order)
    model.set_submodule(path, stack)
    object.__setattr__(model, _RECORD, _Replicated(ranges, path, layers, kept))
    return True


def restore_layers(model: nn.Module) -> None:
    """Takes back replicate_layers(), once no adapter is left; nothing happens without one."""
    former = vars(model).pop(_RECORD, None)
    if former is None:
        return
    model.set_submodule(former.path, former.layers.train(model.get_submodule(former.path).training))
    for name, value in former.settings.items():
        setattr(model.config, name, value)


def keep_layers(model: nn.Module) -> None:
    """The stack stays, as a plain model's: what unload() and merge_and_unload() return has it, as in PEFT."""
    vars(model).pop(_RECORD, None)


def _find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The one list of layers of the model."""
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    found = {}
    for path, module in bare_modules(model):
        named = isinstance(module, nn.ModuleList) and path.rpartition(".")[2] in _NAMES
        inside = any(path.startswith(f"{other}.") for other in found)
        if named and not inside and len(module) and count in (None, len(module)):
            found[path] = module
    if len(found) != 1:
        what = (
            f"several lists of layers ({', '.join(found)})" if found else "no list of layers (layers, h, encoder.layer)"
        )
        raise ValueError(f"layer_replication: {type(model).__name__} has {what}; expected one")
    return next(iter(found.items()))
