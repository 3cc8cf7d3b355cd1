"""modules_to_save: modules trained whole beside an adapter and saved with it."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from pyfastpeft.methods.base import (
    AdapterHolder,
    MethodLayer,
    PeftConfig,
    TaskType,
    bare_modules,
    named_by,
    replace_module,
)
from pyfastpeft.nn import as_base_linear

HEAD_NAMES = ("classifier", "score")


class ModulesToSaveWrapper(AdapterHolder):
    """A module trained whole: `original_module`, and a copy of it per adapter in `modules_to_save`.

    The copy of the active adapter answers in place of the original. At most one adapter can be active here.
    """

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.shared: dict[
            str, list[str]
        ] = {}  # {adapter: keys that alone train}, of one that only follows another module

    def add_adapter(self, name: str) -> None:
        module = copy.deepcopy(self.original_module, _hook_owners(self.original_module))
        module.requires_grad_(False)
        self.modules_to_save[name] = module

    def follow(self, name: str, copies: dict[int, nn.Parameter], only: bool) -> None:
        """Puts copies, by their originals' id, in place of this copy's Parameters; only: nothing else of it trains."""
        original, taken = dict(self.original_module.named_parameters(remove_duplicate=False)), []
        for key, parameter in original.items():
            owner, _, last = key.rpartition(".")
            module = self.modules_to_save[name].get_submodule(owner)
            if id(parameter) in copies:
                module._parameters[last] = copies[id(parameter)]
                taken.append(key)
            else:
                copies[id(parameter)] = module._parameters[last]
        if only:
            self.shared[name] = taken

    def held_adapters(self) -> list[str]:
        return list(self.modules_to_save)

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.modules_to_save:
            return {}
        tensors = self.modules_to_save[name].state_dict(keep_vars=True)
        return {key: tensors[key] for key in self.shared.get(name, tensors)}

    def remove_adapter(self, name: str) -> None:
        self.shared.pop(name, None)
        if name in self.modules_to_save:
            del self.modules_to_save[name]
            self.active = tuple(other for other in self.active if other != name)

    def activate(self, names: Iterable[str], trainable: bool) -> None:
        here = [name for name in names if name in self.modules_to_save]
        if len(here) > 1:
            raise ValueError(
                f"adapters {here} each have a copy of the same module in modules_to_save: only one of them can be active"
            )
        super().activate(here, trainable)

    def bare_module(self) -> nn.Module:
        return self.original_module

    def result_module(self) -> nn.Module:
        return self.modules_to_save[self.active[0]] if self.active else self.original_module

    def _current(self) -> nn.Module:
        return self.result_module() if self.enabled else self.original_module

    def check_mixed(self, name: str, path: str) -> None:
        """PEFT's kinds: those whose result has a row for each sample."""
        kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        if not isinstance(self.original_module, kinds):
            raise ValueError(
                f"adapter_names: adapter {name!r} has a copy of {path}, a {type(self.original_module).__name__}; only "
                f"{', '.join(kind.__name__ for kind in kinds)} in modules_to_save can share a batch; use the adapter alone "
                "(set_adapter)"
            )

    def forward(self, *args, **kwargs):
        return self._current()(*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self._current(), name)


def _hook_owners(module: nn.Module) -> dict[int, AdapterHolder]:
    """A memo for deepcopy: adapters that act on the module through hooks act on its copy, they are not copied with it."""
    parts = list(module.modules())
    hooks = [hook for part in parts for hook in part._forward_pre_hooks.values()]
    hooks += [vars(part).get("config") for part in parts]  # an attention's, where its prefix acts through it
    owners = (getattr(hook, "holder", None) for hook in hooks)
    return {id(owner): owner for owner in owners if isinstance(owner, AdapterHolder)}


def named_originals(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules() without the copies that adapters have of modules."""
    copies = {
        part
        for wrapper in model.modules()
        if isinstance(wrapper, ModulesToSaveWrapper)
        for part in wrapper.modules_to_save.modules()
    }
    return ((path, module) for path, module in model.named_modules() if module not in copies)


def copies_of(model: nn.Module, module: nn.Module) -> list[nn.Module]:
    """What stands for a module of the model in the copies that adapters have of it, or of what it is part of."""
    found = []
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        path = next((path for path, part in wrapper.original_module.named_modules() if part is module), None)
        if path is not None:
            found += [whole.get_submodule(path) for whole in wrapper.modules_to_save.values()]
    return found


def saved_module_names(config: PeftConfig) -> list[str]:
    """modules_to_save, and the head's usual names for a classification task."""
    names = list(config.modules_to_save or [])
    if config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
        names += [name for name in HEAD_NAMES if name not in names]
    return names


def check_saved_modules(
    model: nn.Module, config: PeftConfig, adapter_name: str, strict: bool = True
) -> dict[str, nn.Module]:
    """{path: module} that modules_to_save names; fills config.modules_to_save with the head's names.

    Raises ValueError when an entry matches nothing (strict; a warning otherwise), or names a quantised module, which
    cannot be trained.
    """
    names = saved_module_names(config)
    asked = set(config.modules_to_save or [])
    if names:
        config.modules_to_save = names
    modules = dict(bare_modules(model))
    found = {path: module for path, module in modules.items() if path and named_by(path, names)}
    for name in sorted(asked):
        if any(path == name or path.endswith(f".{name}") for path in found) or name in HEAD_NAMES:
            continue
        near = difflib.get_close_matches(name, sorted({p.rpartition(".")[2] for p in modules if p}), n=3)
        message = f"modules_to_save: {name!r} matches no module of the model"
        message += f"; near misses: {', '.join(near)}" if near else ""
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)
    outermost = {p: m for p, m in found.items() if not any(p.startswith(other + ".") for other in found)}
    tying = getattr(config, "ensure_weight_tying", False)
    if tying:
        for group in tied_groups(model):
            outside = [p for p in group if not any(p == o or p.startswith(f"{o}.") for o in outermost)]
            if len(outside) < len(group):
                outermost |= {path: group[path] for path in outside}
    for path, module in outermost.items():
        if isinstance(module, MethodLayer):
            raise ValueError(
                f"modules_to_save: {path} is adapted by an earlier adapter and cannot be saved whole as well"
                + ("" if path in found else ", as ensure_weight_tying asks")
            )
        inside = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        for part, child in inside.named_modules():
            view = as_base_linear(child)
            if view is not None and view.is_quantized:
                raise ValueError(
                    f"modules_to_save: {'.'.join(filter(None, (path, part)))} is quantised and cannot be trained; keep "
                    "it dense with quantize_model(..., skip=...)"
                )
        shared = {id(p) for p in inside.parameters()}
        ties = [p for p, m in modules.items() if p != path and not p.startswith(path + ".") and _holds(m, shared)]
        if ties and not tying:
            warnings.warn(
                f"modules_to_save: {path} shares a weight with {ties[0]}; the trained copy does not", stacklevel=3
            )
    return outermost


def _holds(module: nn.Module, ids: set[int]) -> bool:
    return any(id(parameter) in ids for parameter in module._parameters.values())


def tied_groups(model: nn.Module) -> list[dict[str, nn.Module]]:
    """The modules, by their paths, that share one weight Parameter with an nn.Embedding: that one (the model's input
    embedding, if it is among them) first, the others in the model's order."""
    groups: dict[int, dict[str, nn.Module]] = {}
    try:
        first = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # not a transformers model, or one without embeddings
        first = None

    def rank(entry: tuple[str, nn.Module]) -> int:
        bare = entry[1].bare_module() if isinstance(entry[1], AdapterHolder) else entry[1]
        return 0 if first is not None and first in (bare, entry[1]) else 1 if isinstance(bare, nn.Embedding) else 2

    for path, module in bare_modules(model):
        bare = module.bare_module() if isinstance(module, AdapterHolder) else module
        weight = bare._parameters.get("weight")
        if weight is not None:
            groups.setdefault(id(weight), {})[path] = module
    ordered = (sorted(group.items(), key=rank) for group in groups.values() if len(group) > 1)
    return [dict(group) for group in ordered if rank(group[0]) < 2]


def add_saved_modules(
    model: nn.Module, saved: dict[str, nn.Module], adapter_name: str, config: PeftConfig | None = None
) -> None:
    """Gives every module of check_saved_modules() a copy for the adapter; with ensure_weight_tying in the config, what the
    modules share their copies share too."""
    copies: dict[int, nn.Parameter] | None = {} if getattr(config, "ensure_weight_tying", False) else None
    for path, module in saved.items():
        wrapper = module if isinstance(module, ModulesToSaveWrapper) else ModulesToSaveWrapper(module)
        wrapper.train(module.training).add_adapter(adapter_name)
        if copies is not None:
            wrapper.follow(adapter_name, copies, only=not named_by(path, saved_module_names(config)))
        if wrapper is not module:
            replace_module(model, module, wrapper)
