"""ensure_weight_tying: one adapter for an embedding and for what shares its weight (a head, other embeddings).

The weight W [V, D] of the group changes to W + s (B A)ᵀ for all of its users, with the embedding's A [R, V] and B [D, R]:

    ids  ->  row of W + s Aᵀ Bᵀ                              the embedding
    h    ->  h Wᵀ + s · h B A                                a head: Bᵀ [R, D] is its A, Aᵀ [V, R] its B

The users hold no parameters of their own: theirs are views of the embedding's, so a step of any optimizer changes all of them
at once, and a merge writes into the shared weight once. PEFT 0.21.2 gives the head Parameters of its own in the same memory,
which an optimizer steps twice, and its merge adds the update twice. The files are PEFT's: the head's factors stand in them too.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from pyfastpeft.methods.base import KEY_PREFIX, AdapterHolder, bare_modules, named_by, replace_module
from pyfastpeft.methods.lora.config import LoraConfig
from pyfastpeft.methods.lora.layer import LoraLinear
from pyfastpeft.methods.lora.tables import LoraEmbedding
from pyfastpeft.nn import as_base_linear
from pyfastpeft.saved_modules import tied_groups


def find_tied_targets(
    model: nn.Module, config: LoraConfig, targets: dict[str, nn.Module], saved: Iterable[str]
) -> dict[str, str]:
    """{path of a follower: path of the embedding it follows} for the groups that target_modules touches.

    The embedding joins the targets, its followers leave them; config.target_modules is filled in accordingly. Raises ValueError,
    before anything is changed, where a member of such a group cannot have the group's adapter.
    """
    followers: dict[str, str] = {}
    order = [path for path, _ in bare_modules(model)]
    groups = tied_groups(model)
    for group in groups:
        touched = [path for path in group if path in targets]
        if not touched:
            continue
        source = next(iter(group))
        for path, module in group.items():
            _check_member(path, source, module, config, path in saved)
        targets[source] = group[source]
        for path in group:
            if path != source:
                followers[path] = source
                targets.pop(path, None)
        config.target_modules = _naming(config.target_modules, source)
    ordered = {path: targets[path] for path in order if path in targets}
    targets.clear(), targets.update(ordered)
    if not followers and not any(path in group for group in groups for path in saved):
        tokens = config.trainable_token_indices is not None and groups
        if not tokens:
            warnings.warn(
                "LoraConfig: ensure_weight_tying is set, and "
                + (
                    "no embedding of the model shares its weight"
                    if not groups
                    else "no tied module is adapted or saved"
                ),
                stacklevel=4,
            )
    return followers


def add_followers(model: nn.Module, followers: dict[str, str], config: LoraConfig, adapter_name: str) -> None:
    """Gives every follower of find_tied_targets() its embedding's adapter."""
    for path, source in followers.items():
        modules = dict(bare_modules(model))
        module, leader = modules[path], modules[source]
        layer = module
        if not isinstance(module, LoraLinear):
            kind = LoraEmbedding if isinstance(module, nn.Embedding) else LoraLinear
            layer = kind(module).train(module.training)
        layer.follow(adapter_name, leader, config)
        if layer is not module:
            replace_module(model, module, layer)


def _naming(wanted: list[str] | set[str] | str, source: str) -> set[str] | str:
    """target_modules that name the embedding too, as PEFT's have it; the followers need no names."""
    if isinstance(wanted, str):
        return wanted if re.fullmatch(wanted, source) else rf"(?:{wanted}|{re.escape(source)})"
    return set(wanted) if named_by(source, wanted) else {*wanted, source}


def _check_member(path: str, source: str, module: nn.Module, config: LoraConfig, saved: bool) -> None:
    bare = module.bare_module() if isinstance(module, AdapterHolder) else module
    title = f"ensure_weight_tying: {path} shares its weight with {source}, whose adapter it would have"
    if path == source:
        title = f"ensure_weight_tying: {path} shares its weight with others, which would have its adapter"
    if saved:
        raise ValueError(f"{title}, but modules_to_save trains it whole; choose one for all of them")
    if isinstance(module, AdapterHolder) and not isinstance(module, LoraLinear):
        raise ValueError(
            f"{title}, but it is a {type(module).__name__} already; delete_adapter() the other adapter first"
        )
    if config.use_dora:
        raise ValueError(
            f"{title}, and DoRA scales an embedding's features but a head's tokens: one weight cannot have both; leave out "
            "use_dora or the tied modules"
        )
    linear = isinstance(bare, nn.Linear) and as_base_linear(bare) is not None and not as_base_linear(bare).is_quantized
    if not isinstance(bare, nn.Embedding) and not linear:
        raise ValueError(f"{title}, but it is a {type(bare).__name__}, expected an nn.Linear or an nn.Embedding")


def followers_tensors(
    model: nn.Module, adapter_name: str, values: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The followers' factors by their keys in a file: views of their embeddings', or of what `values` has under those' keys."""
    tensors, paths = {}, {id(module): path for path, module in bare_modules(model)}
    for path, layer in bare_modules(model):
        if not isinstance(layer, LoraLinear) or adapter_name not in layer.followed:
            continue
        leader = layer.followed[adapter_name]
        factors = {f.key: f.tensor for f in leader.ranked(adapter_name)}
        if values is not None:
            factors = {key: values[f"{KEY_PREFIX}{paths[id(leader)]}.{key}"] for key in factors}
        if not isinstance(layer, LoraEmbedding):
            a, b = factors["lora_embedding_A"], factors["lora_embedding_B"]
            factors = {"lora_A.weight": b.t(), "lora_B.weight": a.t()}
        tensors |= {f"{KEY_PREFIX}{path}.{key}": tensor.detach() for key, tensor in factors.items()}
    return tensors


def check_agreement(found: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError where a file has two values for what is one tensor of the model."""
    first: dict[int, str] = {}
    for key, tensor in live.items():
        other = first.setdefault(tensor.data_ptr(), key) if tensor.numel() and not tensor.is_meta else key
        if other == key or other not in found:
            continue
        if key not in found:
            path = key.removeprefix(KEY_PREFIX).rpartition(".lora_")[0] or key
            raise ValueError(
                f"the file has nothing for {path}, whose adapter is that of {other.removeprefix(KEY_PREFIX)} "
                "(ensure_weight_tying): it was trained without the tie. Load it so, with a config of ensure_weight_tying=False"
            )
        mine, theirs = found[key], found[other]
        if theirs.dim() == 2 and (live[key].shape, live[key].stride()) != (live[other].shape, live[other].stride()):
            theirs = theirs.t()
        if mine.shape == theirs.shape and not torch.equal(mine, theirs):
            raise ValueError(
                f"{key} and {other} differ in the file and are one tensor here (ensure_weight_tying): the adapter's tie was lost "
                "when it was trained. Load it without: config=PeftConfig with ensure_weight_tying=False and target_modules that "
                "name both"
            )
