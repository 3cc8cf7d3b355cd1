"""Prefix tuning in a model: what each attention is given, and where the text then stands.

    attention(q, [P_k ; K], [P_v ; V])          P [v, d] trained, one pair for each attention

Decision. PEFT hands the model a cache that holds the prefix. Whatever touches caches then breaks: checkpointed layers
drop them, static caches have no room, use_cache=False has none, and the model takes the prefix for earlier tokens when
it counts padded positions. Here a hook before each attention replaces the cache it was about to use by a view that
answers with the prefix before the keys (cache.py), and lengthens its mask. The cache itself never holds a prefix, so
its kind, its absence, beams that reorder it and layers that are computed again do not matter, and an encoder, which
has no cache, gets a prefix the same way. The price is one concatenation of the keys in each attention and step.

The prefix's keys are not rotated and stand at no position, but PEFT's models count positions from v on, since a cache
of v tokens precedes the text: for equal logits the positions of a decoder, or an encoder alone, are shifted by v here
(a hook before the model, which also makes them follow the mask: left padding changes nothing). ALiBi and T5's relative
positions place the prefix just before the text. An encoder whose attentions take no cache (DistilBERT, ViT) has its prefix
through transformers' registry of attention functions, at no position at all: interface.py. What has neither is refused:
DeBERTa computes its own attention out of three products with relative positions.

An encoder-decoder has three prefixes: the encoder's, the decoder's own, and one for attention to the encoder's output
(Li and Liang 2021, section 4.2). PEFT gives the decoder one, of which layers i and i + L/2 share a half while the other
half has no gradient; such a file cannot be read with its meaning and is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyfastpeft.methods.base import PeftType
from pyfastpeft.methods.prefix_tuning import interface
from pyfastpeft.methods.prefix_tuning.attention import (
    CACHE_NAMES,
    MASK_NAMES,
    check_implementation,
    extended_alibi,
    extended_mask,
    find_attentions,
    find_cacheless,
    layer_number,
)
from pyfastpeft.methods.prefix_tuning.cache import prefixed
from pyfastpeft.methods.prefix_tuning.config import PrefixTuningConfig
from pyfastpeft.methods.prefix_tuning.encoder import PrefixEncoder, PrefixEncoders
from pyfastpeft.methods.prompt_inputs import is_causal, mask_positions
from pyfastpeft.methods.prompt_learning import (
    PROMPT_KEY,
    WIDTH_NAMES,
    Embeddings,
    PromptHolder,
    PromptMethod,
    bind,
    cached_length,
    check_positions,
    config_value,
    fill_sizes,
    forward_names,
    is_encoder_decoder,
    is_flat,
    position_limit,
)
from pyfastpeft.saved_modules import copies_of


class Prefixes(PromptHolder):
    """The prefixes in one model."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.limit: int | None = None  # positions of the model
        self.sizes: dict[str, tuple[int, int, int]] = {}  # v, heads, width of keys
        self._whole: tuple[Any, torch.Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_whole": None}

    def remove_adapter(self, name: str) -> None:
        super().remove_adapter(name)
        self.sizes.pop(name, None)
        self._whole = None

    def leave(self, model: nn.Module, merged: bool = False) -> None:
        super().leave(model, merged)
        interface.unhook(model, self)

    def prefix_of(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [heads, v, head size] of attention `index`, counted over all groups."""
        name = self.active[0]
        _, heads, width = self.sizes[name]
        begin = 2 * index * width
        both = self._columns(self.encoders[name], begin, begin + 2 * width)
        keys, values = both.unflatten(1, (2, heads, width // heads)).permute(1, 2, 0, 3)
        return keys, values

    def _columns(self, encoder: nn.Module, begin: int, end: int) -> torch.Tensor:
        if is_flat(encoder):
            return encoder.embedding.weight[:, begin:end]
        if any(p.requires_grad for p in encoder.parameters()):
            # each attention computes its own part: nothing is shared between layers that are checkpointed. Nothing is kept
            # in evaluation either: torch's fused optimizers change parameters without counting their versions
            self._whole = None
            return encoder.columns(begin, end)
        if torch.compiler.is_compiling():
            return encoder.columns(begin, end)
        if any(p.is_inference() for p in encoder.parameters()):
            return encoder.columns(begin, end)  # they do not say when they change
        state = [(id(p), p._version, p.data_ptr(), p.dtype) for p in encoder.parameters()]
        if self._whole is None or self._whole[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._whole = state, encoder()
        return self._whole[1][:, begin:end]

    def before_attention(
        self, module: nn.Module, args: tuple, kwargs: dict, names: list[str], index: int, cross: bool
    ) -> tuple[tuple, dict] | None:
        """The pre-hook of an attention."""
        if self.current() is None:
            return None
        given = bind(names, args, kwargs)
        keys, values = self.prefix_of(index)
        cache_name = next(name for name in CACHE_NAMES if name in names)
        mask_name = next(name for name in MASK_NAMES if name in names)
        if cross and "encoder_attention_mask" in names:
            mask_name = "encoder_attention_mask"
        cache, states, rows = given.get(cache_name), given[names[0]], keys.shape[1]
        new = {cache_name: prefixed(cache, keys, values, cross)}
        if not (cross and given.get(mask_name) is None):
            new[mask_name] = extended_mask(given.get(mask_name), rows, module, states.shape[1], cache)
        if given.get("alibi") is not None:
            new["alibi"], new[mask_name] = extended_alibi(given["alibi"], new.get(mask_name), rows, module)
        return (), given | new

    def before_model(
        self, module: nn.Module, args: tuple, kwargs: dict, names: list[str], offset: int, causal: bool
    ) -> tuple[tuple, dict] | None:
        """The pre-hook of a model that counts positions: they begin at v."""
        if self.current() is None:
            return None
        given, rows = bind(names, args, kwargs), self.sizes[self.active[0]][0]
        positions, mask = given.get("position_ids"), given.get("attention_mask")
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            return None
        length = inputs.shape[1]
        if positions is None:
            if causal and mask is not None and mask.dim() == 2:
                positions = mask_positions(mask)[:, -length:]
            else:
                past = cached_length(given.get("past_key_values"))
                positions = (torch.arange(length, device=inputs.device) + past)[None].expand(len(inputs), -1)
            positions = positions + offset
        check_positions(self.limit, rows + length, positions + rows - offset, rows)
        return (), given | {"position_ids": positions + rows}


class PrefixTuningMethod(PromptMethod):
    peft_type = PeftType.PREFIX_TUNING
    config_class = PrefixTuningConfig
    place = "prefix_encoder"

    def fill_config(self, model: nn.Module, config: PrefixTuningConfig) -> None:
        groups = _groups(model)
        if not any(groups.values()):
            raise ValueError(
                f"PrefixTuningConfig: {type(model).__name__} has no attention that takes a cache, nor one by transformers' "
                "registry of attention functions, so there is no place for keys and values of its own; use prompt tuning, or "
                "a method that adapts layers"
            )
        check_implementation(model)
        fill_sizes(model, config)
        heads = config_value(model, ("num_key_value_heads",)) or config.num_attention_heads
        total, width = config.num_attention_heads, config_value(model, WIDTH_NAMES)
        size = config_value(model, ("head_dim", "d_kv")) or (width // total if width and total else None)
        config.num_attention_heads = heads
        if config.token_dim is None and heads and size:
            config.token_dim = heads * size
        for name in ("num_layers", "num_attention_heads", "token_dim"):
            if getattr(config, name) is None:
                raise ValueError(f"PrefixTuningConfig: the model's config does not tell {name}; give it")
        if config.token_dim % config.num_attention_heads:
            raise ValueError(
                f"PrefixTuningConfig: token_dim {config.token_dim} is no multiple of num_attention_heads "
                f"{config.num_attention_heads}"
            )
        alone = len(groups["decoder"]) if len(groups) == 1 else config.num_layers
        if config.num_layers != alone and _layer_indices(groups["decoder"], config.num_layers) is None:
            raise ValueError(
                f"PrefixTuningConfig: num_layers is {config.num_layers}, the model has {alone} attentions with a cache"
            )
        if config.encoder_hidden_size is None:
            config.encoder_hidden_size = config.token_dim

    def counts(self, model: nn.Module, config: PrefixTuningConfig) -> dict[str, int]:
        """How many attentions each group has columns for."""
        if not is_encoder_decoder(model):
            return {"decoder": config.num_layers}
        return {group: len(modules) for group, modules in find_attentions(model).items()}

    def shape(self, model: nn.Module, config: PrefixTuningConfig) -> tuple[int, int]:
        return config.num_virtual_tokens, 2 * config.token_dim * sum(self.counts(model, config).values())

    def make_encoder(self, model: nn.Module, config: PrefixTuningConfig) -> nn.Module:
        if not config.prefix_projection:
            values = torch.empty(self.shape(model, config), device="cpu").normal_()
            return Embeddings(values.zero_() if config.init_weights == "zero" else values)
        with torch.device("cpu"):
            return self._projection(model, config)

    def empty_encoder(self, model: nn.Module, config: PrefixTuningConfig) -> nn.Module | None:
        if not config.prefix_projection:
            return None
        with torch.device("meta"):
            return self._projection(model, config)

    def _projection(self, model: nn.Module, config: PrefixTuningConfig) -> nn.Module:
        rows, width, hidden = config.num_virtual_tokens, config.token_dim, config.encoder_hidden_size
        groups = {
            group: PrefixEncoder(rows, width, hidden, count, config.init_weights == "zero")
            for group, count in self.counts(model, config).items()
        }
        return PrefixEncoders(groups) if len(groups) > 1 else groups["decoder"]

    def from_file(self, found, live, config: PrefixTuningConfig):
        flat, expected = found.get(PROMPT_KEY), live[PROMPT_KEY].shape
        one = (config.num_virtual_tokens, 2 * (config.num_layers or 0) * (config.token_dim or 0))
        if config.num_transformer_submodules == 2 and flat is not None and tuple(flat.shape) == one != tuple(expected):
            raise ValueError(
                f"{PROMPT_KEY} has shape {one}: a prefix for an encoder-decoder as PEFT makes it, which two layers share "
                f"and neither the encoder nor cross-attention sees; expected {tuple(expected)}, one prefix for each "
                "attention. Train it again"
            )
        return found

    def make_holder(self, model: nn.Module) -> PromptHolder:
        return Prefixes(self.place)

    def enter(self, holder: Prefixes, config: PrefixTuningConfig, adapter_name: str) -> None:
        holder.sizes[adapter_name] = config.num_virtual_tokens, config.num_attention_heads, config.token_dim

    def add_hooks(self, holder: Prefixes, model: nn.Module) -> None:
        first = 0
        cacheless = [] if any(find_attentions(model).values()) else find_cacheless(model)
        for index, module in enumerate(cacheless):
            for each in (module, *copies_of(model, module)):
                interface.hook(each, holder, index)
        if cacheless:
            return
        for group, modules in find_attentions(model).items():
            indices = None if is_encoder_decoder(model) else _layer_indices(modules)
            for place, module in enumerate(modules):
                index = first + (place if indices is None else indices[place])
                for each in (module, *copies_of(model, module)):
                    holder.hook(each, "before_attention", forward_names(module), index, group == "cross")
            first += len(modules)
        names = forward_names(model)
        if not is_encoder_decoder(model) and "position_ids" in names:
            holder.limit = position_limit(model)
            holder.hook(model, "before_model", names, _first_position(model), is_causal(model))


def _groups(model: nn.Module) -> dict[str, list[nn.Module]]:
    """find_attentions(), or the attentions without a cache where that finds none."""
    groups = find_attentions(model)
    if not any(groups.values()) and not is_encoder_decoder(model):
        return {"decoder": find_cacheless(model)}
    return groups


def _layer_indices(modules: list[nn.Module], below: int | None = None) -> list[int] | None:
    """The layers that the attentions say they are of; None if these are no different numbers (below a limit)."""
    indices = [layer_number(module) for module in modules]
    good = all(isinstance(i, int) and (below is None or i < below) for i in indices) and len(set(indices)) == len(
        indices
    )
    return indices if good else None


def _first_position(model: nn.Module) -> int:
    """Where the model's positions begin: 0, but behind the padding index in RoBERTa and its kind."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids") and isinstance(
            getattr(module, "padding_idx", None), int
        ):
            return module.padding_idx + 1
    return 0
