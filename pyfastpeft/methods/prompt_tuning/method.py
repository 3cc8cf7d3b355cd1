"""How prompt tuning's virtual tokens begin."""

from __future__ import annotations

import torch
from torch import nn

from pyfastpeft.methods.base import PeftType
from pyfastpeft.methods.prompt_inputs import PromptInputMethod
from pyfastpeft.methods.prompt_learning import Embeddings
from pyfastpeft.methods.prompt_tuning.config import PromptTuningConfig, PromptTuningInit


class PromptTuningMethod(PromptInputMethod):
    peft_type = PeftType.PROMPT_TUNING
    config_class = PromptTuningConfig

    def make_encoder(self, model: nn.Module, config: PromptTuningConfig) -> nn.Module:
        rows, width = self.shape(model, config)
        values = torch.empty(rows, width, device="cpu").normal_()  # drawn even when not used, as PEFT does
        embedding = model.get_input_embeddings()
        if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(0, len(embedding.weight), (rows,), device="cpu")
            values = _look_up(embedding, ids)
        elif config.prompt_tuning_init == PromptTuningInit.TEXT:
            ids = _text_ids(config)
            highest = int(ids.max())
            if highest >= len(embedding.weight):
                raise ValueError(
                    f"PromptTuningConfig: the tokenizer {config.tokenizer_name_or_path} gives token {highest}, the "
                    f"model's embedding has {len(embedding.weight)} rows; they do not belong together"
                )
            values = _look_up(embedding, ids.repeat(-(-rows // len(ids)))[:rows])
        return Embeddings(values)

    def empty_encoder(self, model: nn.Module, config: PromptTuningConfig) -> None:
        return None


@torch.no_grad()
def _look_up(embedding: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return embedding(ids.to(embedding.weight.device)).to("cpu", torch.float32, copy=True)


def _text_ids(config: PromptTuningConfig) -> torch.Tensor:
    from transformers import AutoTokenizer

    options = {key: value for key, value in (config.tokenizer_kwargs or {}).items() if key != "trust_remote_code"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    except Exception as error:  # tokenizer loaders raise whatever their file format raises
        raise ValueError(
            f"PromptTuningConfig: the tokenizer {config.tokenizer_name_or_path} cannot be loaded: {error}"
        ) from error
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ValueError(
            f"PromptTuningConfig: prompt_tuning_init_text {config.prompt_tuning_init_text!r} has no tokens; give a text"
        )
    return torch.tensor(ids)
