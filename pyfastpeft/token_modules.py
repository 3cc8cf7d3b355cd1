"""Which modules of a model have trainable tokens, and which follow them because they share their weight."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

from pyfastpeft.methods.base import AdapterHolder, MethodLayer, PeftConfig, bare_modules, named_by
from pyfastpeft.nn import as_base_linear
from pyfastpeft.trainable_tokens import TrainableTokens


def find_token_modules(
    model: nn.Module, config: PeftConfig, targets: Iterable[str], saved: Iterable[str]
) -> list[tuple[nn.Module, list[int], nn.Module | None]]:
    """(module, its tokens, the module it follows or None) for what trainable_token_indices names, the followed ones first.

    targets, saved   paths that the same config adapts, or trains whole
    Raises ValueError for what cannot have trainable tokens, before anything is changed.
    """
    wanted = getattr(config, "trainable_token_indices", None)
    if wanted is None:
        return []
    modules = {path: module for path, module in bare_modules(model) if path}
    if not isinstance(wanted, dict):
        wanted = {input_embedding(model): wanted}
    tokens: dict[str, list[int]] = {}
    for name, indices in wanted.items():
        paths = [path for path in modules if named_by(path, [name])]
        if not paths:
            near = difflib.get_close_matches(name, sorted({path.rpartition(".")[2] for path in modules}), n=3)
            hint = f"; near misses: {', '.join(near)}" if near else ""
            raise ValueError(f"trainable_token_indices: {name!r} matches no module of the model{hint}")
        for path in paths:
            if tokens.setdefault(path, list(indices)) != list(indices):
                raise ValueError(f"trainable_token_indices: two of its names mean {path}, with different tokens")
    return with_followers(modules, tokens, set(targets), set(saved), "trainable_token_indices", TrainableTokens)


def with_followers(
    modules: dict[str, nn.Module],
    tokens: dict[str, list[int]],
    targets: set[str],
    saved: set[str],
    field: str,
    kind: type[TrainableTokens],
) -> list[tuple[nn.Module, list[int], nn.Module | None]]:
    """find_token_modules() for tokens by path; with the modules that share a weight with these.

    field   of the config, for messages
    kind    the layer that is to go around them
    """
    for path, indices in tokens.items():
        _check_module(path, modules[path], indices, targets, saved, field, kind)
    found: dict[str, tuple] = {}
    for path in sorted(tokens, key=list(modules).index):
        if path in found:
            continue
        found[path] = modules[path], tokens[path], None
        if isinstance(_bare(modules[path]), nn.Embedding):
            for other in _sharing(path, modules, tokens, targets, saved, field, kind):
                found[other] = modules[other], tokens[path], modules[path]
    for path, (module, _, followed) in found.items():
        former = module.source if isinstance(module, TrainableTokens) else None
        if isinstance(module, TrainableTokens) and former is not followed:
            raise ValueError(
                f"{field}: {path} {'shares' if former else 'does not share'} its tokens with an embedding "
                "for an earlier adapter; name the same modules for both"
            )
    return list(found.values())


def _bare(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, MethodLayer) else module


def input_embedding(model: nn.Module) -> str:
    """The path of the model's input embedding; "embed_tokens" where it cannot say."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return "embed_tokens"
    return next((path for path, module in bare_modules(model) if path and module is embedding), "embed_tokens")


def _check_module(
    path: str,
    module: nn.Module,
    indices: list[int],
    targets: set[str],
    saved: set[str],
    field: str,
    kind: type[TrainableTokens],
) -> None:
    if any(path == other or path.startswith(f"{other}.") for other in saved):
        raise ValueError(f"{field}: {path} is in modules_to_save too, which trains all of it; choose one")
    if path in targets or (isinstance(module, AdapterHolder) and type(module) is not kind):
        raise ValueError(
            f"{field}: {path} is adapted or saved whole by another part of this or an earlier adapter; a "
            "module has one of them"
        )
    base = _bare(module)
    view = as_base_linear(base)
    usable = isinstance(base, nn.Embedding) or (isinstance(base, nn.Linear) and not (view and view.is_quantized))
    if not usable or not base.weight.is_floating_point():
        raise ValueError(
            f"{field}: {path} is a {type(base).__name__}, expected an nn.Embedding or an nn.Linear that is "
            "not quantised"
        )
    if isinstance(base, nn.Embedding):
        scaled = type(base).forward is nn.Embedding.forward or hasattr(base, "embed_scale")
        if base.max_norm is not None or base.scale_grad_by_freq or base.sparse or not scaled:
            raise ValueError(
                f"{field}: {path} ({type(base).__name__}) does more than look up and scale rows (max_norm, "
                "scale_grad_by_freq, sparse, or a forward of its own), which rows of its own would not take part in"
            )
    if max(indices) >= base.weight.shape[0]:
        raise ValueError(
            f"{field}: token {max(indices)} of {path}, which has {base.weight.shape[0]} rows; resize the "
            "embedding first (resize_token_embeddings)"
        )


def _sharing(
    path: str,
    modules: dict,
    tokens: dict[str, list[int]],
    targets: set[str],
    saved: set[str],
    field: str,
    kind: type[TrainableTokens],
) -> list[str]:
    """The modules with the same weight Parameter, which follow; one that is trained whole has a copy of its own."""
    weight, found = _bare(modules[path]).weight, []
    for other, module in modules.items():
        bare = module.bare_module() if isinstance(module, AdapterHolder) else module
        if other == path or bare._parameters.get("weight") is not weight or other in saved:
            continue
        if other in tokens and tokens[other] != tokens[path]:
            raise ValueError(
                f"{field}: {path} and {other} share one weight and have different tokens; name {path} alone, "
                f"{other} follows it"
            )
        _check_module(other, module, tokens[path], targets, saved, field, kind)
        found.append(other)
    return found
