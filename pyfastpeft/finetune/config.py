"""Every option of a fine-tuning job in one dataclass, and what the job gives back. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyfastpeft.finetune.errors import ConfigError

METHODS = ("qlora", "lora", "adalora", "ia3", "relora", "bitfit", "prompt", "p_tuning", "prefix", "trainable_tokens")
VIRTUAL_TOKEN_METHODS = ("prompt", "p_tuning", "prefix")
SCHEDULES = ("cosine", "linear", "constant")
INITS = ("default", "gaussian", "orthogonal", "eva")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit")
DTYPES = ("auto", "float32", "bfloat16", "float16")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_SEQUENCE_LENGTH = 512

# Options that may differ between a run and its resumption: none of them changes what is trained on which data (of the
# data files it is the content that must be the same).
FREE_ON_RESUME = frozenset(
    {
        "data", "eval_data", "output", "resume", "resume_from", "overwrite",
        "save_every", "eval_every", "keep_last", "log_seconds", "threads", "optimizer_memory", "spill_dir",
    }
)  # fmt: skip


@dataclass
class FinetuneConfig:
    """One fine-tuning job. Field names are the command line's options (`learning_rate` is `--learning-rate`).

    model                   folder or Hugging Face id of a causal language model (transformers' AutoModelForCausalLM)
    data                    `.txt` (one document, UTF-8) or `.jsonl` (one example a line: {"text"}, {"prompt",
                            "completion"} with the loss on the completion, or {"messages"} with the loss on the
                            assistant's turns)
    output                  folder of the result: the adapter in PEFT's format, checkpoints/, metrics.csv, loss.png,
                            run.json
    method                  "lora"; "qlora": the same on a 4-bit base; "adalora": ranks allocated between the layers,
                            `rank` on average in the end; "relora": LoRA that is merged and started again every
                            restart_every steps, on the jagged cosine schedule; "ia3": scales of activations (usual
                            learning rate: 3e-3); "bitfit": biases, created where there are none; "prompt", "p_tuning",
                            "prefix": virtual tokens among the inputs, computed by a small network, or as keys and
                            values in every layer (usual learning rates: 0.3, 1e-3, 1e-2); "trainable_tokens": the
                            embeddings of some tokens, which token_indices names
    quantize                quantise the base to 4 bits on load; None: for qlora alone
    rank, alpha, dropout, rslora, target_modules, modules_to_save    as LoraConfig's fields (target_modules: "auto":
                            all-linear, the architecture's usual ones for ia3, every bias for bitfit, the input embedding for
                            trainable_tokens; "all-linear"; module names with commas
                            between them; or a regular expression)
    init                    lora, qlora: how A starts: "default" (Kaiming), "gaussian", "orthogonal", or "eva": the directions
                            in which each layer's inputs vary most on the training data, with the ranks given to the
                            layers where they explain most
    virtual_tokens          prompt, p_tuning, prefix: how many
    prompt_text             prompt: start from the embeddings of this text; None: of tokens drawn at random
    prompt_encoder          p_tuning: "mlp" or "lstm"
    prefix_projection       prefix: train embeddings and an MLP instead of the keys and values themselves
    token_indices           trainable_tokens: numbers and ranges with commas between them, such as "7,32000-32009"
    restart_every           relora: optimizer steps between two restarts; None: a fifth of the run
    blocksize, quant_type, double_quant                              of the 4-bit base
    learning_rate, schedule, warmup_steps | warmup_ratio, min_lr_ratio    peak; shape after warm-up; linear warm-up;
                            final value as a fraction of the peak
    epochs | max_steps      length of the run; max_steps wins where both are given
    batch_size, gradient_accumulation     sequences per forward, forwards per optimizer step
    sequence_length         tokens; default 512 or the model's maximum, whichever is less
    packing                 True: documents are joined by the end-of-text token and cut into full sequences;
                            False: one example a row, padded, the padding masked; None: True for text, else False
    gradient_checkpointing  recompute activations in the backward
    dtype                   of the base's dense weights and of the computation; "auto": bfloat16 where the device
                            computes in it, else float32. Adapter weights are float32 always
    seed                    of initialisation, data order and dropout
    eval_data | eval_fraction    a file of held-out data; or the share of `data` that is held out
    eval_every, save_every  in optimizer steps; None: ten times a run; 0: only at its ends
    keep_last               checkpoints kept
    resume, resume_from     go on from the newest checkpoint of `output` (from the start where there is none);
                            or from that checkpoint folder
    overwrite               an earlier run in `output` is replaced
    optimizer, weight_decay, max_grad_norm    pyfastpeft.optim.AdamW ("adamw", "adamw8bit") or PagedAdamW
                            ("paged_adamw", "paged_adamw8bit"), with 32- or 8-bit state; 0 = no clipping
    optimizer_memory, spill_dir     of a paged optimizer: memory for its state ("2GB"; None: half of what is free), and
                            the folder for the rest of it
    device, threads         "auto", "cpu", "cuda", "cuda:1"; torch's CPU threads
    log_seconds             seconds between plain progress lines where there is no terminal
    """

    model: str
    data: str
    output: str
    method: str = "qlora"
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.05
    rslora: bool = False
    init: str = "default"
    quantize: bool | None = None
    target_modules: str = "auto"
    modules_to_save: str | None = None
    blocksize: int = 64
    quant_type: str = "nf4"
    double_quant: bool = True
    virtual_tokens: int = 20
    prompt_text: str | None = None
    prompt_encoder: str = "mlp"
    prefix_projection: bool = False
    token_indices: str | None = None
    restart_every: int | None = None
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup_steps: int | None = None
    warmup_ratio: float = 0.03
    min_lr_ratio: float = 0.0
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 4
    gradient_accumulation: int = 4
    sequence_length: int | None = None
    packing: bool | None = None
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    seed: int = 0
    eval_data: str | None = None
    eval_fraction: float = 0.05
    eval_every: int | None = None
    save_every: int | None = None
    keep_last: int = 2
    resume: bool = False
    resume_from: str | None = None
    overwrite: bool = False
    optimizer: str = "adamw"
    optimizer_memory: str | None = None
    spill_dir: str | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    device: str = "auto"
    threads: int | None = None
    log_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("model", "data", "output"):
            setattr(self, name, str(getattr(self, name)))
        self.validate()

    def validate(self) -> None:
        """Raises ConfigError for the first option whose value cannot be used."""
        for name in ("model", "data", "output"):
            _require(bool(getattr(self, name).strip()), name, "a path or an id", getattr(self, name))
        _one_of(self, "method", METHODS)
        _one_of(self, "schedule", SCHEDULES)
        _one_of(self, "init", INITS)
        _one_of(self, "optimizer", OPTIMIZERS)
        _one_of(self, "dtype", DTYPES)
        _one_of(self, "blocksize", BLOCKSIZES)
        _one_of(self, "quant_type", ("nf4", "fp4"))
        _one_of(self, "prompt_encoder", ("mlp", "lstm"))
        for name in ("rank", "virtual_tokens", "batch_size", "gradient_accumulation", "keep_last"):
            _integer(self, name, 1)
        for name in ("max_steps", "threads", "sequence_length", "restart_every"):
            if getattr(self, name) is not None:
                _integer(self, name, 1)
        for name in ("warmup_steps", "eval_every", "save_every"):
            if getattr(self, name) is not None:
                _integer(self, name, 0)
        _integer(self, "seed", 0)
        for name in ("learning_rate", "alpha", "epochs", "log_seconds"):
            _number(self, name, low=0, above=True)
        for name in ("weight_decay", "max_grad_norm"):
            _number(self, name, low=0)
        for name in ("dropout", "eval_fraction", "warmup_ratio"):
            _number(self, name, low=0, high=1, below=True)
        _number(self, "min_lr_ratio", low=0, high=1)
        _require(
            bool(self.target_modules.strip()), "target_modules", "module names or 'all-linear'", self.target_modules
        )
        self._validate_paging()
        if self.method == "qlora" and self.quantize is False:
            raise ConfigError("--method qlora is LoRA on a 4-bit base: --no-quantize contradicts it; use --method lora")
        owners = (("prompt_text", "prompt"), ("prefix_projection", "prefix"), ("token_indices", "trainable_tokens"))
        for name, method in owners:
            value = getattr(self, name)
            _require(not value or self.method == method, name, f"nothing without --method {method}", value)
        if self.method == "trainable_tokens":
            self.tokens()
        if self.init != "default" and self.method not in ("lora", "qlora"):
            raise ConfigError(f"--init {self.init} is an option of --method lora and qlora, this is {self.method}")
        if self.restart_every is not None and self.method != "relora":
            raise ConfigError(f"--restart-every is an option of --method relora, this is {self.method}")
        if self.resume_from is not None and self.overwrite:
            raise ConfigError("resume_from and overwrite exclude each other: one goes on, the other starts again")
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite exclude each other: one goes on, the other starts again")

    def _validate_paging(self) -> None:
        from pyfastpeft.paged_memory import parse_bytes

        for name in ("optimizer_memory", "spill_dir"):
            if getattr(self, name) is not None and not self.optimizer.startswith("paged_"):
                _require(False, name, "none without --optimizer paged_adamw or paged_adamw8bit", getattr(self, name))
        if self.optimizer_memory is not None:
            try:
                parse_bytes(self.optimizer_memory)
            except ValueError:
                _require(False, "optimizer_memory", "a number of bytes, such as 2GB or 512MiB", self.optimizer_memory)
        if self.spill_dir is not None:
            _require(Path(self.spill_dir).is_dir(), "spill_dir", "a folder", self.spill_dir)

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values, in the order they are documented."""
        return dataclasses.asdict(self)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """`name: theirs -> ours` for each option that decides the weights and differs from an earlier run's."""
        mine = self.to_dict()
        return [
            f"{name}: {other.get(name)!r} -> {mine[name]!r}"
            for name in mine
            if name not in FREE_ON_RESUME and other.get(name) != mine[name]
        ]

    @property
    def quantized(self) -> bool:
        """Whether the base is quantised on load."""
        return trained_quantized(self.to_dict())

    @property
    def added_tokens(self) -> int:
        """Positions of the model that virtual tokens take."""
        return self.virtual_tokens if self.method in VIRTUAL_TOKEN_METHODS else 0

    def size_in_words(self) -> str:
        """The method's size for titles: its rank or its number of virtual tokens."""
        if self.method in VIRTUAL_TOKEN_METHODS:
            return f"{self.virtual_tokens} virtual tokens"
        if self.method == "trainable_tokens":
            return f"{len(self.tokens())} tokens"
        return self.method if self.method in ("ia3", "bitfit") else f"rank {self.rank}"

    def tokens(self) -> list[int]:
        """The tokens that token_indices names; ConfigError where it is none, or not numbers and ranges."""
        found: list[int] = []
        for part in (self.token_indices or "").split(","):
            first, dash, last = (piece.strip() for piece in part.partition("-"))
            last = last if dash else first
            good = first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 1 << 31
            _require(good, "token_indices", 'numbers and ranges, such as "7,32000-32009"', self.token_indices)
            found += range(int(first), int(last) + 1)
        _require(len(set(found)) == len(found), "token_indices", "each token once", self.token_indices)
        return found

    def targets(self) -> str | list[str] | None:
        """`target_modules` as the method's config takes it: a list of names, one string (all-linear, a regular
        expression), or None for the architecture's usual ones."""
        text = self.target_modules.strip()
        if text == "auto":
            return None if self.method in ("ia3", "bitfit", "trainable_tokens") else "all-linear"
        if text == "all-linear" or any(character in text for character in r"\*+?[](){}|^$"):
            return text
        return [name.strip() for name in text.split(",") if name.strip()]


@dataclass
class FinetuneResult:
    """What a job gives back; `run.json` holds the same.

    status       "complete" or "interrupted" (a resumable checkpoint was written)
    losses       training loss of each optimizer step of this process (nats per token)
    eval_losses  (step, loss) of each evaluation of this process; step 0 is before training
    """

    output: Path
    status: str
    step: int
    total_steps: int
    checkpoint: Path | None = None
    losses: list[float] = field(default_factory=list)
    eval_losses: list[tuple[int, float]] = field(default_factory=list)
    trainable_parameters: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory: int = 0
    metrics_csv: Path | None = None
    loss_png: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def interrupted(self) -> bool:
        return self.status == "interrupted"


def trained_quantized(options: dict[str, Any]) -> bool:
    """Whether a run with these options (those of its run.json) trained on a 4-bit base."""
    wanted = options.get("quantize")
    return options.get("method") == "qlora" if wanted is None else wanted


def option(name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + name.replace("_", "-")


def _require(good: bool, name: str, expected: str, got: object) -> None:
    if not good:
        raise ConfigError(f"{option(name)}: expected {expected}, got {got!r}")


def _one_of(config: FinetuneConfig, name: str, allowed: tuple) -> None:
    value = getattr(config, name)
    _require(value in allowed, name, "one of " + ", ".join(map(str, allowed)), value)


def _integer(config: FinetuneConfig, name: str, low: int) -> None:
    value = getattr(config, name)
    good = isinstance(value, int) and not isinstance(value, bool) and value >= low
    _require(good, name, f"a whole number of at least {low}", value)


def _number(
    config: FinetuneConfig, name: str, *, low: float, high: float = math.inf, above: bool = False, below: bool = False
) -> None:
    value = getattr(config, name)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    good = good and (value > low if above else value >= low) and (value < high if below else value <= high)
    expected = f"a number {'above' if above else 'of at least'} {low:g}"
    if high < math.inf:
        expected += f" and {'below' if below else 'at most'} {high:g}"
    _require(good, name, expected, value)
