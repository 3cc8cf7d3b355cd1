"""What the methods with virtual tokens share: the config's fields, the module that holds the adapters, their files.

The adapters of a model live in one child module, a PromptHolder, and act through forward pre-hooks on modules of the
model. The model's own structure stays as it is: LoRA finds its layers, and deepcopy, pickle and torch.compile see plain
modules and hooks. Hooks run wherever the model calls its parts itself, in generate() and in recomputed checkpoints.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from pyfastpeft.checkpoint import check_tensors
from pyfastpeft.methods.base import KEY_PREFIX, AdapterHolder, Method, PeftConfig, TaskType
from pyfastpeft.methods.checks import check_flags, check_strings
from pyfastpeft.saved_modules import add_saved_modules, check_saved_modules

PROMPT_KEY = "prompt_embeddings"  # the one tensor of PEFT's files
_RESUME_PREFIX = "prompt_encoder."


@dataclasses.dataclass
class PromptLearningConfig(PeftConfig):
    """Fields of all methods with virtual tokens. Those left at None are filled in from the model.

    num_virtual_tokens            v, required
    token_dim                     width of a virtual token
    num_transformer_submodules    as PEFT writes it: 2 for SEQ_2_SEQ_LM, else 1
    num_attention_heads, num_layers    of the base model
    modules_to_save               modules trained whole; SEQ_CLS and TOKEN_CLS add "classifier", "score"
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
        check_counts(self, *names)
        check_strings(self, "modules_to_save", self.modules_to_save)
        check_flags(self, "inference_mode")

    @property
    def is_prompt_learning(self) -> bool:
        return True


def check_counts(config: PeftConfig, *fields: str) -> None:
    """Fields that hold a positive integer or None."""
    for field in fields:
        value = getattr(config, field)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{type(config).__name__}: {field} is {value!r}, expected an integer")
        if value <= 0:
            raise ValueError(f"{type(config).__name__}: {field} is {value}, expected a positive integer")


class PromptHook:
    """A forward pre-hook that is a method of a holder: one object, so that copies and pickles find the copied holder."""

    def __init__(self, holder: PromptHolder, method: str, *more: Any) -> None:
        self.holder, self.method, self.more = holder, method, more

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return getattr(self.holder, self.method)(module, args, kwargs, *self.more)


class Embeddings(nn.Module):
    """The virtual tokens themselves as `embedding.weight` [rows, columns]: no encoder, or only its output was saved."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        with torch.device("meta"):
            self.embedding = nn.Embedding(*weight.shape)
        self.embedding.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self) -> torch.Tensor:
        return self.embedding.weight


class PromptHolder(AdapterHolder):
    """Adapters with virtual tokens: `encoders[name]` computes what PEFT's files call prompt_embeddings."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place  # its name in the model
        self.encoders = nn.ModuleDict()

    def __getitem__(self, name: str) -> nn.Module:
        return self.encoders[name]

    def hook(self, module: nn.Module, method: str, *more: Any) -> None:
        module.register_forward_pre_hook(PromptHook(self, method, *more), with_kwargs=True)

    def bare_module(self) -> nn.Module:
        """Itself: nothing was in its place before."""
        return self

    def leave(self, model: nn.Module, merged: bool = False) -> None:
        delattr(model, self.place)
        for module in model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, PromptHook) and hook.holder is self:
                    del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]

    def current(self) -> str | None:
        """The adapter that acts now."""
        return self.active[0] if self.active and self.enabled else None

    def held_adapters(self) -> list[str]:
        return list(self.encoders)

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.encoders:
            return {}
        return {PROMPT_KEY if is_flat(self.encoders[name]) else f"{_RESUME_PREFIX}{key}": parameter
                for key, parameter in self.encoders[name].named_parameters()}  # fmt: skip

    def remove_adapter(self, name: str) -> None:
        if name in self.encoders:
            del self.encoders[name]
            self.active = tuple(other for other in self.active if other != name)

    def install(self, name: str, encoder: nn.Module) -> None:
        """Puts an encoder in place of an adapter's former one, trainable if that was."""
        former = next(self.encoders[name].parameters(), None) if name in self.encoders else None
        encoder.requires_grad_(former is not None and former.requires_grad)
        self.encoders[name] = encoder.train(self.training)

    def check_mergeable(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self.encoders:
                raise ValueError(
                    f"adapter {name!r} cannot be merged: virtual tokens are no part of any weight. Keep the adapter, or "
                    "take it out with unload()"
                )

    def extra_repr(self) -> str:
        return f"active={self.active}"


def is_flat(encoder: nn.Module) -> bool:
    return isinstance(encoder, Embeddings)


class PromptMethod(Method):
    """A method whose adapters are encoders in a PromptHolder."""

    place: str
    resume_name = "prompt_encoder.safetensors"

    def fill_config(self, model: nn.Module, config: PromptLearningConfig) -> None:
        """Fills in what the model decides; ValueError for a model that cannot be served. Changes the config alone."""
        raise NotImplementedError

    def make_holder(self, model: nn.Module) -> PromptHolder:
        """The holder, before any of its hooks."""
        raise NotImplementedError

    def add_hooks(self, holder: PromptHolder, model: nn.Module) -> None:
        raise NotImplementedError

    def make_encoder(self, model: nn.Module, config: PromptLearningConfig) -> nn.Module:
        """A new encoder in fp32 on the CPU, with its initial values, drawn as PEFT draws them."""
        raise NotImplementedError

    def empty_encoder(self, model: nn.Module, config: PromptLearningConfig) -> nn.Module | None:
        """make_encoder() on the meta device; None where it is Embeddings."""
        raise NotImplementedError

    def shape(self, model: nn.Module, config: PromptLearningConfig) -> tuple[int, int]:
        """Of prompt_embeddings."""
        raise NotImplementedError

    def enter(self, holder: PromptHolder, config: PromptLearningConfig, adapter_name: str) -> None:
        """Tells the holder what it must know of the adapter beside its encoder."""

    def inject(
        self, model: nn.Module, config: PeftConfig, adapter_name: str, *, fp32: bool, init: bool, strict: bool
    ) -> PeftConfig:
        config = config.copy()
        if config.num_virtual_tokens is None:
            raise ValueError(f"{type(config).__name__}: num_virtual_tokens is not given; expected a positive integer")
        self.fill_config(model, config)
        saved = check_saved_modules(model, config, adapter_name, strict=strict)
        present = getattr(model, self.place, None)
        if present is not None and not isinstance(present, PromptHolder):
            raise ValueError(
                f"{type(model).__name__} has a {self.place!r} of its own; {config.peft_type} needs the name"
            )
        encoder = self.make_encoder(model, config) if init else Embeddings(torch.empty(self.shape(model, config)))
        device, dtype = compute_device_and_dtype(model)
        encoder.to(device, torch.promote_types(dtype, torch.float32) if fp32 else dtype)
        holder = present if present is not None else self.make_holder(model).train(model.training)
        holder.install(adapter_name, encoder)
        self.enter(holder, config, adapter_name)
        if present is None:
            setattr(model, self.place, holder)
            self.add_hooks(holder, model)
        add_saved_modules(model, saved, adapter_name)
        return config

    def holder(self, model: nn.Module) -> PromptHolder:
        return getattr(model, self.place)

    def tensors(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> dict[str, torch.Tensor]:
        """Saved modules have "base_model." before their path, as in PEFT's files of these methods; the rest nothing."""
        tensors = super().tensors(model, config, adapter_name)
        plain = {key.removeprefix(f"{KEY_PREFIX}{self.place}."): tensor for key, tensor in tensors.items()}
        return {
            f"base_model.{key.removeprefix(KEY_PREFIX)}" if key.startswith(KEY_PREFIX) else key: tensor
            for key, tensor in plain.items()
        }

    @torch.no_grad()
    def file_tensors(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> dict[str, torch.Tensor]:
        encoder = self.holder(model).encoders[adapter_name]
        others = self._others(model, config, adapter_name)
        if is_flat(encoder):
            return {PROMPT_KEY: encoder.embedding.weight} | others
        was_training = encoder.training
        try:
            return {PROMPT_KEY: encoder.eval()()} | others  # without dropout
        finally:
            encoder.train(was_training)

    def _others(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> dict[str, torch.Tensor]:
        tensors = self.tensors(model, config, adapter_name)
        return {k: t for k, t in tensors.items() if k != PROMPT_KEY and not k.startswith(_RESUME_PREFIX)}

    def resume_tensors(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> dict[str, torch.Tensor]:
        encoder = self.holder(model).encoders[adapter_name]
        return {} if is_flat(encoder) else dict(encoder.named_parameters())

    def loading_tensors(self, model, config, adapter_name, resume):
        encoder = self.empty_encoder(model, config) if resume else None
        if encoder is not None:
            check_tensors(self.resume_name, resume, dict(encoder.named_parameters()))
        like = next(self.holder(model).encoders[adapter_name].parameters())
        flat = torch.empty(self.shape(model, config), dtype=like.dtype, device=like.device)
        return {PROMPT_KEY: flat} | self._others(model, config, adapter_name)

    @torch.no_grad()
    def finish_loading(self, model, config, adapter_name, live, resume) -> None:
        flat = live[PROMPT_KEY]
        encoder = self.empty_encoder(model, config) if resume else None
        if encoder is not None:
            encoder.load_state_dict(
                {key: tensor.to(flat.device, flat.dtype) for key, tensor in resume.items()}, assign=True
            )
            given = encoder.eval()()
            if not torch.allclose(given, flat, rtol=1e-2, atol=1e-2 * float(flat.abs().max())):
                warnings.warn(
                    f"{self.resume_name} does not give the {PROMPT_KEY} beside it: it is from another time, and is not used",
                    stacklevel=5,
                )
                encoder = None
        elif self.empty_encoder(model, config) is not None and not config.inference_mode:
            warnings.warn(
                f"there is no {self.resume_name}: training goes on with the virtual tokens themselves, without the encoder",
                stacklevel=5,
            )
        self.holder(model).install(adapter_name, Embeddings(flat) if encoder is None else encoder)


def compute_device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Of the input embedding, or else of the first floating-point parameter."""
    weights = [weight for weight in (embedding_weight(model),) if weight is not None]
    weights += [p for p in model.parameters() if p.is_floating_point() and p.dim() > 1]
    return (weights[0].device, weights[0].dtype) if weights else (torch.device("cpu"), torch.float32)


def embedding_weight(model: nn.Module) -> torch.Tensor | None:
    """The matrix of the input embedding; None where there is none."""
    try:
        layer = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.is_floating_point() else None


def text_config(model: nn.Module) -> Any:
    """The part of the model's config that describes its text model; None without a config."""
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def config_value(model: nn.Module, names: Iterable[str]) -> int | None:
    """The first of the names that the model's config has an integer for."""
    config = text_config(model)
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


LAYER_NAMES = ("num_hidden_layers", "num_layers", "n_layer")
HEAD_NAMES = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
WIDTH_NAMES = ("hidden_size", "n_embd", "d_model")


def fill_sizes(model: nn.Module, config: PromptLearningConfig) -> None:
    """num_layers, num_attention_heads and num_transformer_submodules as PEFT fills them in."""
    if config.num_layers is None:
        config.num_layers = config_value(model, LAYER_NAMES)
    if config.num_attention_heads is None:
        config.num_attention_heads = config_value(model, HEAD_NAMES)
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def position_limit(model: nn.Module) -> int | None:
    """How many positions a model with learned ones has; None for rotary, relative and other computed positions."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in (
            "wpe",
            "position_embeddings",
            "embed_positions",
        ):
            skipped = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            return module.num_embeddings - skipped
    return None


def check_positions(limit: int | None, total: int, positions: torch.Tensor | None, virtual: int) -> None:
    """Raises ValueError where virtual tokens push the text beyond the model's positions (on a GPU: an assertion that
    ends the process). Positions are looked at only if `total`, padding and all, is too long."""
    if limit is None or total <= limit:
        return
    needed = total if positions is None else int(positions.max()) + 1
    if needed > limit:
        raise ValueError(
            f"the text needs {needed} positions with its {virtual} virtual tokens, the model has {limit}; shorten the text"
        )


def forward_names(module: nn.Module) -> list[str]:
    """The names of forward's parameters, without those of *args and **kwargs."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind not in kinds]


def bind(names: list[str], args: tuple, kwargs: dict) -> dict:
    """Positional and keyword arguments as one dict."""
    return dict(zip(names, args, strict=False)) | kwargs


def innermost(modules: Iterator[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Those that hold none of the others."""
    found = list(modules)
    return [(p, m) for p, m in found if not any(other.startswith(f"{p}.") for other, _ in found)]


def cached_length(past: Any) -> Any:
    """How many tokens a cache holds: 0 for None and for an empty one (a tensor for some kinds of cache)."""
    if past is None:
        return 0
    if hasattr(past, "get_seq_length"):
        return past.get_seq_length()
    return past[0][0].shape[-2] if len(past) else 0  # the tuples of older transformers
