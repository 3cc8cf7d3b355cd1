"""What PeftModel offers for virtual tokens: generating with them, and reading them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyfastpeft.methods.prompt_inputs import PromptInputs, mask_positions
from pyfastpeft.methods.prompt_learning import check_positions, embedding_weight, is_encoder_decoder

_UNSUPPORTED = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")


def acting_prompts(model: nn.Module) -> PromptInputs | None:
    """The holder whose virtual tokens stand among the model's inputs now; None if there are none."""
    holder = getattr(model, "prompt_encoder", None)
    return holder if isinstance(holder, PromptInputs) and holder.current() is not None else None


@torch.no_grad()
def generate(model: nn.Module, *args, **kwargs) -> Any:
    """model.generate(...) with the active adapter's virtual tokens among its inputs; the result is the text's as ever.

    A decoder starts from embeddings that hold them already, and a mask as long; everything that follows (caches of any
    kind, beams, sampling) is the model's own. (From embeddings transformers generates with a cache always, whatever
    use_cache says; the tokens are the same.) Raises ValueError for what starts from token ids alone: assisted
    generation and chunked prefill.
    """
    holder = acting_prompts(model)
    if holder is None or is_encoder_decoder(model) or not holder.layout.added:
        return model.generate(*args, **kwargs)
    if args:
        kwargs["inputs"], *rest = args
        if rest:
            kwargs["generation_config"], *rest = rest
        if rest:
            raise TypeError("generate: with virtual tokens, give arguments after generation_config by name")
    settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None or getattr(settings, name, None) is not None:
            raise ValueError(f"generate: {name} starts from token ids and does not know virtual tokens; leave it out")
    given = kwargs.pop("inputs", None)
    ids = kwargs.pop("input_ids", None) if given is None else given
    embeds = kwargs.pop("inputs_embeds", None)
    if ids is None and embeds is None:
        start = getattr(settings, "bos_token_id", None)
        if start is None:
            raise ValueError("generate: there are no input_ids, and the model has no bos_token_id to start from")
        ids = torch.tensor([[start]], device=model.device)
    if embeds is None:
        embeds, _ = holder.embed(model.get_input_embeddings(), ids)
    mask = kwargs.pop("attention_mask", None)
    if mask is None:
        mask = _inferred_mask(ids, embeds, settings, kwargs)
    order = holder.layout.order(mask)
    kwargs["inputs_embeds"] = holder.insert_prompts(embeds, order)
    kwargs["attention_mask"] = holder.layout.insert(mask, 1, order)
    length = kwargs["attention_mask"].shape[1]
    check_positions(holder.limit, length, mask_positions(kwargs["attention_mask"]), holder.layout.added)
    if ids is not None:
        kwargs["input_ids"] = ids
        _lengths_of_the_text(kwargs, settings, ids.shape[1])
    with holder.generating():
        return model.generate(**kwargs)


def _inferred_mask(ids: torch.Tensor | None, embeds: torch.Tensor, settings: Any, kwargs: dict) -> torch.Tensor:
    """As generate() infers it: padding is the pad token, unless that ends texts as well."""
    pad = kwargs.get("pad_token_id", getattr(settings, "pad_token_id", None))
    ends = kwargs.get("eos_token_id", getattr(settings, "eos_token_id", None))
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    if ids is None or pad is None or pad in ends:
        return torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    return ids.ne(pad).long()


def _lengths_of_the_text(kwargs: dict, settings: Any, text: int) -> None:
    """max_length and min_length count the text; told in new tokens, generate() need not know how long the inputs are."""
    for kind in ("max", "min"):
        length, new = f"{kind}_length", f"{kind}_new_tokens"
        if kwargs.get(new) is not None or (kwargs.get(length) is None and getattr(settings, new, None) is not None):
            continue
        value = kwargs.pop(length, None)
        value = getattr(settings, length, None) if value is None else value
        if value is None or (kind == "min" and not value):
            continue
        if kind == "max" and value <= text:
            raise ValueError(f"generate: max_length is {value}, but the prompt has {text} tokens; use max_new_tokens")
        kwargs[new] = max(value - text, 0)


@torch.no_grad()
def nearest_tokens(
    model: nn.Module, adapter_name: str, k: int = 5, metric: str = "cosine", tokenizer: Any = None
) -> list[list[tuple[Any, float]]]:
    """For each virtual token the k tokens of the vocabulary nearest to it, nearest first: (id or text, score).

    adapter_name  of prompt tuning or P-tuning
    metric        "cosine", "euclidean" (score: minus the distance) or "dot"
    tokenizer     gives the text of a token in place of its id
    Soft prompts need not lie near any token, nor mean what the nearest ones say (Khashabi et al. 2022,
    arXiv:2112.08348). Raises ValueError for another kind of adapter, or an unknown metric.
    """
    holder = getattr(model, "prompt_encoder", None)
    if not isinstance(holder, PromptInputs) or adapter_name not in holder.encoders:
        raise ValueError(
            f"adapter {adapter_name!r} has no virtual tokens among the inputs; there is nothing to look up"
        )
    if metric not in ("cosine", "euclidean", "dot"):
        raise ValueError(f"metric is {metric!r}, expected 'cosine', 'euclidean' or 'dot'")
    table = embedding_weight(model)
    if not isinstance(k, int) or not 1 <= k <= len(table):
        raise ValueError(f"k is {k!r}, expected 1 to {len(table)}, the size of the vocabulary")
    encoder = holder.encoders[adapter_name]
    was_training = encoder.training
    try:
        prompts = encoder.eval()().float()[: holder.layouts[adapter_name].added or holder.layouts[adapter_name].before]
    finally:
        encoder.train(was_training)
    scores = torch.cat([_score(prompts, part.float(), metric) for part in table.split(8192)], dim=1)
    best = scores.topk(k, dim=1)
    names = (lambda i: tokenizer.decode([i])) if tokenizer is not None else (lambda i: i)
    return [
        [(names(i), s) for i, s in zip(ids, row, strict=True)]
        for ids, row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _score(prompts: torch.Tensor, table: torch.Tensor, metric: str) -> torch.Tensor:
    if metric == "euclidean":
        return -torch.cdist(prompts, table)
    if metric == "cosine":
        prompts, table = (nn.functional.normalize(x, dim=1) for x in (prompts, table))
    return prompts @ table.T
