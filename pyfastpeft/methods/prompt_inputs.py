"""Virtual tokens among the input embeddings: what prompt tuning and P-tuning share.

    inputs_embeds = [p_1 … p_v ; E x]          p [v, d] trained, E the frozen embedding, x the text's token ids

A hook before the whole model (of an encoder-decoder: before its encoder) puts the virtual tokens in and lengthens the
attention mask, the token types, the labels (by -100) and a question's start and end to match; logits then have v + T
rows, as in PEFT. Positions follow the attention mask, so left padding changes nothing. A call that goes on from a
filled cache finds them there, and has only its mask lengthened.

Where they go is a Layout: before the text (PEFT's only place), around it by a template, or wherever the text has a
placeholder token (P-tuning's own way, Liu et al. 2021, arXiv:2103.10385, section 3.2).
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from pyfastpeft.methods.base import TaskType
from pyfastpeft.methods.prompt_learning import (
    PromptHolder,
    PromptLearningConfig,
    PromptMethod,
    bind,
    cached_length,
    check_positions,
    embedding_weight,
    fill_sizes,
    forward_names,
    is_encoder_decoder,
    position_limit,
)

IGNORED = -100
TEXT = "text"


@dataclasses.dataclass
class PromptInputConfig(PromptLearningConfig):
    """Fields of the methods whose virtual tokens stand among the inputs; these two are not PEFT's.

    template              where the virtual tokens go: a list with "text" once and numbers that add up to
                          num_virtual_tokens, [3, "text", 2] for three before the text and two behind it (before its
                          right padding); None: all before
    placeholder_token_id  or: each text holds this token num_virtual_tokens times, and they take its places in order
    """

    template: list | None = None
    placeholder_token_id: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        if self.placeholder_token_id is not None:
            if not isinstance(self.placeholder_token_id, int) or isinstance(self.placeholder_token_id, bool):
                raise TypeError(f"{owner}: placeholder_token_id is {self.placeholder_token_id!r}, expected an integer")
            if self.template is not None:
                raise ValueError(f"{owner}: template and placeholder_token_id are two ways to say where; give one")
        if self.template is None:
            return
        good = isinstance(self.template, (list, tuple)) and list(self.template).count(TEXT) == 1
        counts = [part for part in self.template if part != TEXT] if good else []
        if not good or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts):
            raise ValueError(
                f'{owner}: template is {self.template!r}, expected a list of numbers with "text" once among them, such '
                'as [3, "text", 2]'
            )
        if self.num_virtual_tokens is not None and sum(counts) != self.num_virtual_tokens:
            raise ValueError(
                f"{owner}: template {self.template!r} has places for {sum(counts)} virtual tokens, num_virtual_tokens is "
                f"{self.num_virtual_tokens}"
            )
        self.template = list(self.template)

    def to_dict(self) -> dict:
        fields = super().to_dict()
        for name in ("template", "placeholder_token_id"):  # PEFT warns about fields it does not know
            if fields[name] is None:
                del fields[name]
        return fields


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where v virtual tokens stand: `before` and `after` the text, or in the places of `placeholder`."""

    before: int
    after: int = 0
    placeholder: int | None = None

    @classmethod
    def of(cls, config: PromptInputConfig) -> Layout:
        if config.template is None:
            return cls(config.num_virtual_tokens, 0, config.placeholder_token_id)
        at = config.template.index(TEXT)
        return cls(sum(config.template[:at]), sum(config.template[at + 1 :]))

    @property
    def added(self) -> int:
        """How much longer the sequence becomes."""
        return 0 if self.placeholder is not None else self.before + self.after

    def order(self, mask: torch.Tensor | None, padding_first: bool = False) -> torch.Tensor | None:
        """[B, v + T] columns of [before | text | after] in the order of the new sequence; None: as they are.

        mask           [B, T]; the right padding of a row goes behind the virtual tokens that follow the text
        padding_first  all padding goes to the left of everything
        """
        if mask is None or not (self.after or padding_first):
            return None
        kept = mask.ne(0).long()
        if padding_first:
            rank = kept - 1
        else:
            rank = torch.where((kept == 0) & (kept.cumsum(1) == kept.sum(1, keepdim=True)), 2, 0)
        before, after = (rank.new_full((len(rank), n), value) for n, value in ((self.before, 0), (self.after, 1)))
        return torch.cat([before, rank, after], dim=1).argsort(dim=1, stable=True)

    def insert(self, x: torch.Tensor, fill: torch.Tensor | float, order: torch.Tensor | None) -> torch.Tensor:
        """x [B, T, ...] with `fill` ([v, ...] or a number) in the new places: [B, v + T, ...]."""
        shape = (len(x), self.before + self.after, *x.shape[2:])
        new = fill.to(x.dtype).expand(shape) if isinstance(fill, torch.Tensor) else x.new_full(shape, fill)
        whole = torch.cat([new[:, : self.before], x, new[:, self.before :]], dim=1)
        if order is None:
            return whole
        index = order.view(*order.shape, *[1] * (x.dim() - 2)).expand(*order.shape, *x.shape[2:])
        return whole.gather(1, index)


class PromptInputs(PromptHolder):
    """The adapters of prompt tuning and P-tuning in one model."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.layouts: dict[str, Layout] = {}
        self.tasks: dict[str, TaskType | None] = {}
        self.limit: int | None = None  # positions of the model
        self.started = False  # generate() has put the virtual tokens into the embeddings it starts from

    def remove_adapter(self, name: str) -> None:
        super().remove_adapter(name)
        self.layouts.pop(name, None)
        self.tasks.pop(name, None)

    @property
    def layout(self) -> Layout:
        return self.layouts[self.active[0]]

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Inside, embeddings and masks that the model is given have the virtual tokens already."""
        self.started = True
        try:
            yield
        finally:
            self.started = False

    def embed(self, embedding: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(embeddings [B, T, d] with the placeholders replaced, which [B, T] those were); without insertion otherwise."""
        place = self.layout.placeholder
        if place is None:
            return embedding(ids), None
        prompts = self.encoders[self.active[0]]()
        here = ids == place
        counts = here.sum(1)
        wrong = (counts != len(prompts[: self.layout.before])).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"row {row} of input_ids has {int(counts[row])} tokens {place} (placeholder_token_id), expected "
                f"num_virtual_tokens = {self.layout.before}"
            )
        embeds = embedding(ids.masked_fill(here, 0))
        index = (here.long().cumsum(1) - 1).clamp(min=0)
        return torch.where(here[..., None], prompts.to(embeds.dtype)[index], embeds), here

    def insert_prompts(self, embeds: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        prompts = self.encoders[self.active[0]]()[: self.layout.added]
        return self.layout.insert(embeds, prompts, order)

    def before_model(
        self, module: nn.Module, args: tuple, kwargs: dict, names: list[str], causal: bool
    ) -> tuple[tuple, dict] | None:
        """The pre-hook of a decoder (causal), or an encoder, alone."""
        if self.current() is None:
            return None
        given = bind(names, args, kwargs)
        ids, embeds, mask = (given.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        past, layout = given.get("past_key_values"), self.layout
        if layout.placeholder is not None:
            return None if _filled(past) else self._replace(module, given)
        if self.started:
            return None
        if _filled(past):
            return (), self._continue(given, past, causal and "position_ids" in names)
        if embeds is None:
            embeds, _ = self.embed(module.get_input_embeddings(), ids)
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {mask.dim()} dimensions; with virtual tokens it must be [batch, tokens]"
            )
        text = embeds.shape[1]
        # a decoder that classifies looks at the last column where it sees no token ids to find the padding by
        padding_first = causal and self.tasks[self.active[0]] == TaskType.SEQ_CLS
        order = layout.order(mask, padding_first)
        new = {"inputs_embeds": self.insert_prompts(embeds, order), "input_ids": None}
        if mask is not None:
            new["attention_mask"] = layout.insert(mask, 1, order)
        if given.get("token_type_ids") is not None:
            new["token_type_ids"] = layout.insert(given["token_type_ids"], 0, order)
        if self._labels_are_per_token(given.get("labels"), text):
            new["labels"] = layout.insert(given["labels"], IGNORED, order)
        for name in ("start_positions", "end_positions"):
            if given.get(name) is not None:
                new[name] = _moved(given[name], layout, text)
        if "position_ids" in names:
            if given.get("position_ids") is not None:
                warnings.warn("position_ids are ignored: virtual tokens shift them; they follow the mask", stacklevel=2)
            new["position_ids"] = mask_positions(new["attention_mask"]) if mask is not None and causal else None
        check_positions(self.limit, new["inputs_embeds"].shape[1], new.get("position_ids"), layout.added)
        return (), given | new

    def _labels_are_per_token(self, labels: torch.Tensor | None, text: int) -> bool:
        if labels is None or labels.dim() != 2 or labels.shape[1] != text:
            return False
        return self.tasks[self.active[0]] not in (TaskType.SEQ_CLS, TaskType.QUESTION_ANS, TaskType.SEQ_2_SEQ_LM)

    def _replace(self, module: nn.Module, given: dict) -> tuple[tuple, dict]:
        ids = given.get("input_ids")
        if ids is None:
            raise ValueError(
                "placeholder_token_id needs input_ids to find the placeholders in; inputs_embeds have none"
            )
        embeds, here = self.embed(module.get_input_embeddings(), ids)
        new = {"inputs_embeds": embeds, "input_ids": None}
        if self._labels_are_per_token(given.get("labels"), ids.shape[1]):
            new["labels"] = given["labels"].masked_fill(here, IGNORED)
        return (), given | new

    def _continue(self, given: dict, past, positions: bool) -> dict:
        """A call that goes on from a cache which holds the virtual tokens: they are only missing in the mask."""
        mask, added = given.get("attention_mask"), self.layout.added
        step = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {mask.dim()} dimensions; with virtual tokens it must be [batch, tokens]. Call the "
                "PeftModel's generate(), not the base model's, for a static cache"
            )
        if mask is None or mask.shape[1] >= cached_length(past) + step.shape[1]:
            return given
        mask = torch.cat([mask.new_ones(len(mask), added), mask], dim=1)
        new = {"attention_mask": mask}
        if positions:
            new["position_ids"] = mask_positions(mask)[:, -step.shape[1] :]
        return given | new

    def before_encoder(
        self, module: nn.Module, args: tuple, kwargs: dict, names: list[str]
    ) -> tuple[tuple, dict] | None:
        """The pre-hook of the encoder of an encoder-decoder."""
        if self.current() is None:
            return None
        given = bind(names, args, kwargs)
        embeds, mask = given.get("inputs_embeds"), given.get("attention_mask")
        if embeds is None:
            embeds, _ = self.embed(module.get_input_embeddings(), given["input_ids"])
        elif self.layout.placeholder is not None:
            raise ValueError(
                "placeholder_token_id needs input_ids to find the placeholders in; inputs_embeds have none"
            )
        new = {"input_ids": None, "inputs_embeds": embeds}
        if self.layout.added:
            order = self.layout.order(mask)
            new["inputs_embeds"] = self.insert_prompts(embeds, order)
            if mask is not None:
                new["attention_mask"] = self.layout.insert(mask, 1, order)
        return (), given | new

    def before_decoder(
        self, module: nn.Module, args: tuple, kwargs: dict, names: list[str]
    ) -> tuple[tuple, dict] | None:
        """The pre-hook of the decoder of an encoder-decoder: its mask of the encoder's output becomes as long as that."""
        if self.current() is None:
            return None
        given = bind(names, args, kwargs)
        mask, states = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
        if mask is None or states is None or mask.shape[-1] == states.shape[1]:
            return None
        return (), given | {"encoder_attention_mask": self.layout.insert(mask, 1, self.layout.order(mask))}


def mask_positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of each token among those that the mask keeps; 0 in padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _filled(past) -> bool:
    return past is not None and bool(cached_length(past) > 0)


def is_causal(model: nn.Module) -> bool:
    """Whether tokens see those before them only. Models with attention both ways (BERT) count positions by themselves."""
    flags = [part.is_causal for part in model.modules() if isinstance(getattr(part, "is_causal", None), bool)]
    return any(flags) or not flags


def _moved(positions: torch.Tensor, layout: Layout, text: int) -> torch.Tensor:
    """Where the token at each position of the text is now; positions outside of the text stay outside."""
    shift = torch.where(positions < text, layout.before, layout.added)
    return torch.where(positions < 0, positions, positions + shift)


class PromptInputMethod(PromptMethod):
    """What prompt tuning and P-tuning have in common as methods."""

    place = "prompt_encoder"

    def fill_config(self, model: nn.Module, config: PromptLearningConfig) -> None:
        owner = type(config).__name__
        weight = embedding_weight(model)
        if weight is None or "inputs_embeds" not in forward_names(model):
            what = "no input embedding" if weight is None else "no inputs_embeds in its forward"
            raise ValueError(
                f"{owner}: {type(model).__name__} has {what}, so virtual tokens cannot stand among its inputs; use a "
                "method that adapts layers, such as LoraConfig or BitFitConfig"
            )
        fill_sizes(model, config)
        if config.token_dim is None:
            config.token_dim = weight.shape[1]
        if config.token_dim != weight.shape[1]:
            raise ValueError(f"{owner}: token_dim is {config.token_dim}, the model's embedding has {weight.shape[1]}")
        if getattr(config, "encoder_hidden_size", config.token_dim) is None:
            config.encoder_hidden_size = config.token_dim

    def shape(self, model: nn.Module, config: PromptLearningConfig) -> tuple[int, int]:
        return config.num_virtual_tokens * config.num_transformer_submodules, config.token_dim

    def make_holder(self, model: nn.Module) -> PromptHolder:
        return PromptInputs(self.place)

    def enter(self, holder: PromptInputs, config: PromptInputConfig, adapter_name: str) -> None:
        holder.layouts[adapter_name], holder.tasks[adapter_name] = Layout.of(config), config.task_type

    def add_hooks(self, holder: PromptHolder, model: nn.Module) -> None:
        if not is_encoder_decoder(model):
            holder.limit = position_limit(model)
            holder.hook(model, "before_model", forward_names(model), is_causal(model))
            return
        encoder, decoder = model.get_encoder(), model.get_decoder()
        holder.hook(encoder, "before_encoder", forward_names(encoder))
        holder.hook(decoder, "before_decoder", forward_names(decoder))
