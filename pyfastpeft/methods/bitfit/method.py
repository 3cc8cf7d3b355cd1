"""How BitFit enters a model: which biases there are, and where to make them."""

from __future__ import annotations

import copy
import re
import warnings

import torch
from torch import nn

from pyfastpeft.inject import ALL_LINEAR, excluded, near_misses, output_heads, warn_unused_exclusion
from pyfastpeft.methods.base import AdapterHolder, Method, PeftConfig, PeftType, bare_modules, named_by, replace_module
from pyfastpeft.methods.bitfit.config import BitFitConfig
from pyfastpeft.methods.bitfit.layer import BitFitLayer
from pyfastpeft.nn import as_base_linear
from pyfastpeft.saved_modules import add_saved_modules, check_saved_modules


class BitFitMethod(Method):
    """BitFitConfig -> a BitFitLayer around every module whose biases train."""

    peft_type = PeftType.BITFIT
    config_class = BitFitConfig

    def inject(
        self, model: nn.Module, config: PeftConfig, adapter_name: str, *, fp32: bool, init: bool, strict: bool
    ) -> PeftConfig:
        config = config.copy()
        targets = find_biases(model, config, strict)
        saved = check_saved_modules(model, config, adapter_name, strict=strict)
        layers = []
        for module, parameters in targets.values():
            layer = module if isinstance(module, BitFitLayer) else BitFitLayer(module).train(module.training)
            layer.add_adapter(adapter_name, parameters, fp32=fp32)
            layers.append((module, layer))
        for module, layer in layers:
            if layer is not module:
                replace_module(model, module, layer)
        add_saved_modules(model, saved, adapter_name)
        return config

    def merged(self, model: nn.Module, config: PeftConfig) -> None:
        make_room_for_biases(model)


def make_room_for_biases(model: nn.Module) -> None:
    """Sees to it that biases which an adapter has brought survive saving and loading of a transformers model.

    Where the architecture has switches for biases (Llama's attention_bias and mlp_bias) they are turned on in the
    model's config, and layers that got none of their own get zeros. Otherwise a warning says that they will be lost.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        return
    have = {name for name, _ in model.named_parameters() if _is_bias(name.rpartition(".")[2])}
    room = _places_for_biases(model, {})
    if have <= room:
        return
    switches = [name for name in _SWITCHES if getattr(config, name, None) is False]
    needed = {}
    for name in switches:
        if have & (_places_for_biases(model, {name: True}) - room):
            needed[name] = True
    room = _places_for_biases(model, needed)
    lost = sorted(have - room)
    if lost:
        warnings.warn(
            f"the merged {type(model).__name__} has {len(lost)} biases that its architecture has no place for (first: "
            f"{lost[0]}): transformers would leave them out when it loads the saved model. Keep the adapter instead",
            stacklevel=6,
        )
        return
    for name, value in needed.items():
        setattr(config, name, value)
    for name in sorted(room - have):
        path, _, parameter = name.rpartition(".")
        module = model.get_submodule(path)
        base = as_base_linear(module)
        zeros = torch.zeros(base.out_features, dtype=base.weight_dtype, device=base.device)
        module.register_parameter(parameter, nn.Parameter(zeros, requires_grad=False))


_SWITCHES = ("attention_bias", "mlp_bias", "use_bias", "add_bias_linear", "qkv_bias", "bias")


def _places_for_biases(model: nn.Module, settings: dict[str, bool]) -> set[str]:
    """The names of the biases that a model of this class has with these settings in its config."""
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.device("meta"):
        skeleton = type(model)(config)
    return {name for name, _ in skeleton.named_parameters() if _is_bias(name.rpartition(".")[2])}


def find_biases(model: nn.Module, config: BitFitConfig, strict: bool) -> dict[str, tuple[nn.Module, list[str]]]:
    """{path: (module, names of its parameters to train)}, the module perhaps a BitFitLayer already.

    Raises ValueError when there is nothing to train, when an entry of a list of target_modules matches nothing
    (strict; otherwise a warning), or when another method has adapted a module.
    """
    modules = dict(bare_modules(model))
    found: dict[str, tuple[nn.Module, list[str]]] = {}
    for path, module in modules.items():
        if not path or excluded(path, config) or any(path.startswith(f"{outer}.") for outer in found):
            continue
        inside = module.base_layer if isinstance(module, BitFitLayer) else module
        parameters = _trained(inside, config, path, output_heads(model, modules))
        if parameters and _wanted(path, inside, config):
            found[path] = (module, parameters)
    wanted = config.target_modules
    if wanted is not None and not isinstance(wanted, str):
        unmatched = sorted(name for name in wanted if not any(named_by(path, [name]) for path in found))
        if unmatched:
            message = f"target_modules: {unmatched} match no module with a bias{near_misses(unmatched, set(modules))}"
            if strict:
                raise ValueError(message)
            warnings.warn(message, stacklevel=4)
    if not found:
        raise ValueError(_nothing(config))
    for path, (module, _) in found.items():
        if isinstance(module, AdapterHolder) and not isinstance(module, BitFitLayer):
            raise ValueError(
                f"{path} has an adapter of another method already ({type(module).__name__}); a layer holds adapters of "
                "one method: take it out with exclude_modules, or delete_adapter() the others first"
            )
    warn_unused_exclusion(config, modules)
    return found


def _wanted(path: str, module: nn.Module, config: BitFitConfig) -> bool:
    wanted = config.target_modules
    if wanted is None:
        return True
    if isinstance(wanted, str):
        if wanted.lower() == ALL_LINEAR:
            return as_base_linear(module) is not None
        return re.fullmatch(wanted, path) is not None
    return named_by(path, wanted)


def _trained(module: nn.Module, config: BitFitConfig, path: str, heads: set[str]) -> list[str]:
    """The parameters of a module that BitFit trains; empty when there are none."""
    if isinstance(module, AdapterHolder):
        return ["bias"]  # of another method; only an error if it is wanted
    base = as_base_linear(module)
    named_head = config.target_modules is not None and config.target_modules != ALL_LINEAR
    if base is not None:
        creates = config.create_biases and (path not in heads or named_head)
        return ["bias"] if base.bias is not None or creates else []
    if not any(_is_bias(name) for name in module._parameters) and not _is_norm(module):
        return []
    names = [name for name, _ in module.named_parameters() if _is_bias(name.rpartition(".")[2])]
    return names + (["weight"] if config.train_norms and _is_norm(module) else [])


def _is_bias(name: str) -> bool:
    return name == "bias" or name.endswith("_bias")


def _is_norm(module: nn.Module) -> bool:
    """Whether this is a LayerNorm, RMSNorm, BatchNorm, …: by its name, as every library has classes of its own."""
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1


def _nothing(config: BitFitConfig) -> str:
    what = "the model" if config.target_modules is None else f"target_modules={config.target_modules!r}"
    way = (
        "; with create_biases=True its linear layers get some"
        if not config.create_biases
        else "; name other modules, or exclude fewer"
    )
    return f"BitFitConfig: {what} has no biases to train{way}"
