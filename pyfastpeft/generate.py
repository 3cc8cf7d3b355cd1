"""Text from a base model with an adapter: what `pyfastpeft generate` runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyfastpeft.finetune.config import trained_quantized
from pyfastpeft.finetune.errors import ConfigError, ModelError
from pyfastpeft.finetune.files import read_json
from pyfastpeft.finetune.model import Base, load_base, maximum_length, quantize_base


@dataclass
class GenerateConfig:
    """How to generate.

    model, adapter    base model (folder or id); folder of an adapter in PEFT's format, None for the base alone
    max_new_tokens, temperature, top_p, top_k, greedy    sampling: probabilities ∝ softmax(logits / temperature), cut to
                      the top_k likeliest tokens and to the least set that holds top_p of the probability;
                      greedy takes the likeliest token always
    seed              of the draws
    quantize          None: as the adapter was trained (run.json beside it says), else False; True: NF4 on load
    dtype, device     as in FinetuneConfig
    chat              the prompt is a user's message to the tokenizer's chat template
    """

    model: str
    adapter: str | None = None
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    greedy: bool = False
    seed: int = 0
    quantize: bool | None = None
    blocksize: int = 64
    quant_type: str = "nf4"
    double_quant: bool = True
    dtype: str = "auto"
    device: str = "auto"
    chat: bool = False

    def __post_init__(self) -> None:
        checks = (
            ("max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            (
                "temperature",
                self.temperature,
                0 < self.temperature < math.inf,
                "a number above 0 (--greedy for no sampling)",
            ),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            ("top-k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("seed", self.seed, self.seed >= 0, "a whole number of at least 0"),
        )
        for name, value, good, expected in checks:
            if not good:
                raise ConfigError(f"--{name}: expected {expected}, got {value!r}")


class Generator:
    """A loaded model ready to generate: `Generator(config)("prompt")`."""

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        self.base, self.model = load_adapted(config)

    def __call__(self, prompt: str, on_text: Callable[[str], None] | None = None) -> str:
        """The continuation of `prompt` (without it). on_text receives the text piece by piece while it is generated."""
        return generate_text(self.model, self.base, prompt, self.config, on_text)


def load_adapted(config: GenerateConfig) -> tuple[Base, torch.nn.Module]:
    """(base, model in eval mode on its device): quantised where wanted, with the adapter on."""
    adapter = check_adapter(config.adapter) if config.adapter is not None else None
    base = load_base(config.model, device=config.device, dtype=config.dtype)
    settings = quantization_of(config, adapter)
    if settings is not None:
        quantize_base(base, **settings)
    model = base.model.to(base.device)
    if adapter is not None:
        from pyfastpeft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).to(base.device)
    return base, model.eval()


def check_adapter(adapter: str | Path) -> Path:
    """The adapter's folder; ModelError where it holds none."""
    path = Path(adapter).expanduser()
    if not path.is_dir():
        raise ModelError(f"adapter folder {path} does not exist (looked for from {Path.cwd()})")
    if not (path / "adapter_config.json").is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        hint = (
            "; the run there was not finished: its checkpoints/step-N folders are adapters too"
            if (path / "checkpoints").is_dir()
            else ""
        )
        raise ModelError(f"adapter folder {path} has no adapter_config.json (it holds: {found}){hint}")
    return path


def training_options(adapter: Path) -> dict[str, Any] | None:
    """The options of the pyfastpeft run that made an adapter (its run.json), or None where it is another's."""
    for folder in (adapter, adapter.parent.parent):  # the output folder, or checkpoints/step-N in it
        record = read_json(folder / "run.json")
        if record is not None and isinstance(record.get("options"), dict):
            return record["options"]
    return None


def quantization_of(config: GenerateConfig, adapter: Path | None) -> dict[str, Any] | None:
    """blocksize, quant_type and double_quant to load with; None for a dense base."""
    if config.quantize is None and adapter is not None:
        options = training_options(adapter)
        if options is not None and trained_quantized(options):
            return {name: options[name] for name in ("blocksize", "quant_type", "double_quant")}
    if not config.quantize:
        return None
    return {"blocksize": config.blocksize, "quant_type": config.quant_type, "double_quant": config.double_quant}


@torch.no_grad()
def generate_text(
    model: torch.nn.Module,
    base: Base,
    prompt: str,
    config: GenerateConfig,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The continuation of `prompt`; torch's random state is restored afterwards."""
    tokenizer = base.tokenizer
    ids = _prompt_ids(tokenizer, prompt, config.chat)
    longest = maximum_length(base.model.config)
    new_tokens = config.max_new_tokens
    if longest is not None:
        configs = getattr(model, "peft_config", {}).values()
        longest -= sum(getattr(config, "num_virtual_tokens", 0) for config in configs)
        if len(ids) >= longest:
            raise ConfigError(f"--prompt: {len(ids)} tokens do not fit the model's {longest} positions; shorten it")
        new_tokens = min(new_tokens, longest - len(ids))
    inputs = torch.tensor([ids], device=base.device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if not config.greedy:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            output = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=new_tokens,
                use_cache=True,
                suppress_tokens=_unknown_tokens(tokenizer, model),
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                streamer=_Stream(tokenizer, on_text) if on_text is not None else None,
                **sampling,
            )
    finally:
        model.train(was_training)
    return tokenizer.decode(output[0, len(ids) :].tolist(), skip_special_tokens=True, **_VERBATIM)


_VERBATIM = {"clean_up_tokenization_spaces": False}


def _unknown_tokens(tokenizer: Any, model: torch.nn.Module) -> list[int] | None:
    """Rows of the model's vocabulary that stand for nothing (padding up to a round number): never to be drawn."""
    rows = model.get_output_embeddings().weight.shape[0]
    return list(range(len(tokenizer), rows)) or None


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError("--chat: this model's tokenizer has no chat template; leave --chat out")
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt)["input_ids"]
    if ids and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # T5's tokenizers end every text
    elif ids == [tokenizer.eos_token_id]:
        ids = [] if prompt else ids
    if not ids:
        raise ConfigError("--prompt: expected some text, got none that the tokenizer knows")
    return ids


class _Stream:
    """transformers' streamer protocol: hands out text as soon as it is whole characters."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.shown = 0
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt:  # the first call brings the prompt
            self.prompt = False
            return
        self.ids += value.flatten().tolist()
        self._show(final=False)

    def end(self) -> None:
        self._show(final=True)

    def _show(self, final: bool) -> None:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True, **_VERBATIM)
        if not final and text.endswith("\ufffd"):  # half a character so far
            return
        if len(text) > self.shown:
            self.on_text(text[self.shown :])
            self.shown = len(text)
        if text.endswith("\n"):  # decode the next line alone: the cost stays linear
            self.ids, self.shown = [], 0
