"""Finding the modules a config names, and putting others in their place. Every check comes before the first change."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterable

from torch import nn

from pyfastpeft.methods.base import (
    KEY_PREFIX,
    AdapterHolder,
    MethodLayer,
    PeftConfig,
    adapter_holders,
    bare_modules,
    named_by,
)
from pyfastpeft.nn import as_base_linear
from pyfastpeft.saved_modules import HEAD_NAMES, saved_module_names

ALL_LINEAR = "all-linear"


def find_targets(
    model: nn.Module,
    config: PeftConfig,
    strict: bool = True,
    adaptable: Callable[[nn.Module], bool] = lambda bare: False,
) -> dict[str, nn.Module]:
    """{path: module} of the layers, adapted already or not, that target_modules names, in the model's order.

    adaptable   what the method can adapt besides linear layers, as modules without adapters

    A name matches a whole path or its end after a dot; a string is a regular expression for the whole path, or
    "all-linear". exclude_modules, modules_to_save and layers_to_transform narrow it down.

    Raises ValueError, listing near misses, when nothing matches, when an entry of a list matches no module (strict;
    otherwise a warning: a file may come from a model with more layers), or when a matching module is neither linear nor adaptable. "all-linear" means
    the linear ones.
    """
    modules = dict(bare_modules(model))
    linears = {path for path, module in modules.items() if path and _base_of(module) is not None}
    known = linears | {path for path, module in modules.items() if path and adaptable(bare_layer(module))}
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        matched = linears - output_heads(model, modules)
    elif isinstance(wanted, str):
        matched = {path for path in modules if path and re.fullmatch(wanted, path)}
    else:
        matched = {path for path in modules if path and named_by(path, wanted)}
        _check_every_entry(wanted, matched, known, strict)
    targets = {path for path in matched if not excluded(path, config) and _in_layers(path, config)}
    if not targets:
        raise ValueError(_nothing_matched(config, matched, known))
    wrong = [path for path in modules if path in targets and path not in known]
    if wrong:
        kinds = ", ".join(f"{path} ({_kind(modules[path])})" for path in wrong[:5])
        raise ValueError(
            f"target_modules matches {len(wrong)} modules that are not layers this method can adapt: {kinds}; "
            "expected nn.Linear, Conv1D or NF4Linear (LoRA: nn.Embedding, Conv1d to 3d, ConvTranspose1d to 3d, MultiheadAttention too; (IA)³: the "
            "convolutions). Name such layers, or take the others out with "
            "exclude_modules"
        )
    warn_unused_exclusion(config, modules)
    return {path: module for path, module in modules.items() if path in targets}


def warn_unused_exclusion(config: PeftConfig, modules: Iterable[str]) -> None:
    """Says that exclude_modules matches none of the paths."""
    if config.exclude_modules and not any(_excluded_by_name(path, config) for path in modules if path):
        warnings.warn(f"exclude_modules={_shown(config.exclude_modules)} matches no module", stacklevel=3)


def bare_layer(module: nn.Module) -> nn.Module:
    """The module without the adapters around it."""
    return module.base_layer if isinstance(module, MethodLayer) else module


def _base_of(module: nn.Module):
    return as_base_linear(bare_layer(module))


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _shown(names: str | Iterable[str]) -> str:
    return repr(names) if isinstance(names, str) else repr(sorted(names))


def _excluded_by_name(path: str, config: PeftConfig) -> bool:
    names = config.exclude_modules
    if not names:
        return False
    return re.fullmatch(names, path) is not None if isinstance(names, str) else named_by(path, names)


def excluded(path: str, config: PeftConfig) -> bool:
    """Whether exclude_modules or modules_to_save takes the path out of the targets."""
    if _excluded_by_name(path, config):
        return True
    return any(f".{path}.".find(f".{name}.") >= 0 for name in saved_module_names(config))


def _in_layers(path: str, config: PeftConfig) -> bool:
    """Whether the path lies in one of layers_to_transform; an entry that is the whole path is taken in any case."""
    indices = getattr(config, "layers_to_transform", None)
    if indices is None or indices == [] or isinstance(config.target_modules, str) or path in config.target_modules:
        return True
    # the first number in the path is the layer's: "layers.1.experts.0.up" lies in layer 1
    patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in config.pattern_list()] or [r".*?\.[^.]*\.(\d+)\."]
    match = next((m for m in (re.match(p, path) for p in patterns) if m), None)
    return match is not None and int(match[1]) in ([indices] if isinstance(indices, int) else indices)


def output_heads(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """The output embedding, or else the classification head: "all-linear" leaves it alone."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is not None:
        return {path for path, module in modules.items() if module is head or _inside(module, head)}
    names = [name for name in HEAD_NAMES if isinstance(getattr(model, name, None), nn.Module)]
    return (
        {p for p in modules for n in names[:1] if p == n or p.startswith(n + ".")}
        if hasattr(model, "config")
        else set()
    )


def _inside(holder: nn.Module, module: nn.Module) -> bool:
    return isinstance(holder, AdapterHolder) and holder.bare_module() is module


def _check_every_entry(wanted: Iterable[str], matched: set[str], linears: set[str], strict: bool) -> None:
    unmatched = sorted(name for name in wanted if not any(p == name or p.endswith(f".{name}") for p in matched))
    if not unmatched:
        return
    message = f"target_modules: {unmatched} match no module of the model{near_misses(unmatched, linears)}"
    if strict or not matched:
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


def near_misses(names: Iterable[str], linears: set[str]) -> str:
    ends = sorted({path.rpartition(".")[2] for path in linears if not path.rpartition(".")[2].isdigit()})
    found = []
    for name in names:
        parts = name.count(".") + 1
        pool = sorted({".".join(path.split(".")[-parts:]) for path in linears})
        found += difflib.get_close_matches(name, pool, n=3, cutoff=0.5)
    near = f"; near misses: {', '.join(dict.fromkeys(found))}" if found else ""
    return f"{near}; the layers it can adapt end in: {', '.join(ends[:40]) or 'none'}"


def _nothing_matched(config: PeftConfig, matched: set[str], linears: set[str]) -> str:
    wanted = config.target_modules
    if matched:
        names = ("exclude_modules", "layers_to_transform", "layers_pattern")
        fields = {name: getattr(config, name, None) for name in names}
        given = ", ".join(f"{name}={value!r}" for name, value in fields.items() if value is not None)
        saved = saved_module_names(config)
        given += f"{', ' if given else ''}modules_to_save={saved!r}" if saved else ""
        return f"target_modules={_shown(wanted)} matches {len(matched)} modules, but {given} leaves none of them"
    names = [wanted.replace("\\.", ".").strip(".*()^$")] if isinstance(wanted, str) else wanted
    hint = (
        "; a string is a regular expression for the whole path: a list names layers" if isinstance(wanted, str) else ""
    )
    return f"target_modules={_shown(wanted)} matches no module of the model{near_misses(names, linears)}{hint}"


def resolved_target_modules(model: nn.Module, config: PeftConfig, targets: dict[str, nn.Module]) -> set[str] | str:
    """target_modules for the file: "all-linear" becomes the shortest list of names that means the same layers."""
    wanted = config.target_modules
    if not (isinstance(wanted, str) and wanted.lower() == ALL_LINEAR):
        return wanted
    ends = {path.rpartition(".")[2] for path in targets}
    others = [path for path, _ in bare_modules(model) if path and path not in targets]
    clean = {end for end in ends if not any(p == end or p.endswith(f".{end}") for p in others)}
    return clean | {path for path in targets if path.rpartition(".")[2] not in clean}


def warn_tied(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Says which targets share their weight with another module: the adapter changes only the target's use of it."""
    for path, other in tied_targets(model, targets):
        warnings.warn(
            f"{path} is adapted and shares its weight with {other}, which stays as it is; merging will give {path} a "
            "weight of its own",
            stacklevel=3,
        )


def tied_targets(model: nn.Module, targets: dict[str, nn.Module]) -> list[tuple[str, str]]:
    """(path, path of a module that is no target and holds the same weight Parameter)."""
    owners = {
        id(parameter): path
        for path, module in bare_modules(model)
        if path not in targets and not isinstance(module, MethodLayer)
        for parameter in module._parameters.values()
        if parameter is not None
    }
    bases = ((path, m.base_layer if isinstance(m, MethodLayer) else m) for path, m in targets.items())
    weights = ((path, id(getattr(base, "weight", base))) for path, base in bases)  # MultiheadAttention has none
    return [(path, owners[weight]) for path, weight in weights if weight in owners]


def sharing_weights(layers: dict[str, MethodLayer]) -> list[str]:
    """The paths of layers whose weight is that of one before them (replicated layers)."""
    seen: set[int] = set()
    found = []
    for path, layer in layers.items():
        key = id(getattr(layer.base_layer, "weight", layer))  # MultiheadAttention has none
        found += [path] if key in seen else []
        seen.add(key)
    return found


def bias_tensors(model: nn.Module, mode: str, layer_class: type[MethodLayer]) -> dict[str, nn.Parameter]:
    """{key in the file: bias Parameter of the base} that `bias=` trains: "none", "all", "lora_only"."""
    if mode == "none":
        return {}
    found = {}
    for path, module in bare_modules(model):
        if isinstance(module, layer_class):
            path, module = f"{path}.base_layer", module.base_layer
        elif mode != "all" or isinstance(module, AdapterHolder):
            continue
        bias = module._parameters.get("bias")
        if bias is not None:
            found[f"{KEY_PREFIX}{path}.bias" if path else f"{KEY_PREFIX}bias"] = bias
    return found


def remove_hollow_holders(model: nn.Module) -> None:
    """Puts the bare module back wherever a holder has no adapter left."""
    for _, holder in list(adapter_holders(model)):
        if not holder.held_adapters():
            holder.leave(model)
