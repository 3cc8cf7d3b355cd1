"""Pretrain the demo's base model: a byte-level Llama on the English text of the standard library.

``python -m pyfastpeft.demo.pretrain --out DIR [--minutes 60 | --steps 4000]`` writes ``config.json``,
``generation_config.json``, ``model.safetensors`` (bf16), the tokenizer's files and ``PRETRAINING.md``. It needs
torch, transformers and safetensors, no network and no GPU. A stopped run goes on from its last checkpoint
when it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import ByT5Tokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from pyfastpeft.demo.corpus import english_text

BYTE_OFFSET = 3  # ByT5: byte b is token b + 3; 0 is padding, 1 the end of a text, 2 unknown
CONTEXT = 512  # tokens, i.e. bytes
CHECKPOINT_NAME = "checkpoint.pt"


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run (the clock does too where ``minutes`` is set)."""

    seed: int = 20240607
    steps: int | None = None  # length of the learning-rate schedule in optimizer steps
    minutes: float | None = None  # length of the schedule in minutes of training; the first limit reached ends the run
    batch_size: int = 4  # sequences of CONTEXT bytes
    learning_rate: float = 5e-3  # peak
    final_learning_rate_ratio: float = 0.02
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    optimizer: str = "muon"  # Muon on the layers' matrices and AdamW on the rest; or "adamw" for all
    autocast: bool = True  # bf16 matrix products; weights, gradients and optimizer state stay fp32


@dataclass
class Progress:
    """Where a run stands; saved with each checkpoint."""

    step: int = 0
    elapsed: float = 0.0  # seconds of training and evaluation, over all resumed parts
    log: list[dict[str, float]] = field(default_factory=list)


def model_config() -> LlamaConfig:
    """Return the configuration: 3.85 million parameters, every linear dimension a multiple of 64."""
    return LlamaConfig(
        vocab_size=320,  # 256 bytes and 3 special tokens, padded to a multiple of 64
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


def byte_tokens(text: str) -> torch.Tensor:
    """Return what ``ByT5Tokenizer()`` makes of ``text`` without special tokens: int64 ``[bytes]``, in one pass."""
    raw = torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8)
    return raw.to(torch.int64) + BYTE_OFFSET


def heldout_loss(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    autocast: bool = False,
) -> float:
    """Return the mean next-byte cross-entropy in nats per byte.

    The text is cut into windows of ``CONTEXT + 1`` bytes that overlap by one, so that each byte but the first
    is predicted once, from at most ``CONTEXT`` bytes before it in its window. A last part window is left out.

    Args:
        model: a causal language model with ``.logits`` ``[batch, length, vocabulary]``.
        tokens: int64 ``[bytes]``.
        limit: evaluate only the first so many bytes.
        batch_size: windows at a time.
        autocast: compute in bf16.
    """
    tokens = tokens[:limit]
    windows = tokens.unfold(0, CONTEXT + 1, CONTEXT)
    total = 0.0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for rows in windows.split(batch_size):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(input_ids=rows[:, :-1], use_cache=False).logits
            total += torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
            ).item()
    model.train(was_training)
    return total / (windows.shape[0] * CONTEXT)


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it to disk and rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Pretraining:
    """One pretraining run: data, model, optimizers, schedule, checkpoint."""

    def __init__(self, settings: Settings, out: Path, work: Path) -> None:
        self.settings, self.out, self.work = settings, out, work
        train, heldout = english_text()
        self.train_tokens, self.heldout_tokens = byte_tokens(train), byte_tokens(heldout)
        self.data_sha256 = hashlib.sha256(f"{train}\0{heldout}".encode()).hexdigest()
        torch.manual_seed(settings.seed)
        self.model = LlamaForCausalLM(model_config()).train()
        self.optimizers = self._optimizers()
        self.progress = Progress()
        self.checkpoint = work / CHECKPOINT_NAME
        if self.checkpoint.exists():
            self._resume()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        settings = self.settings
        matrices = [p for name, p in self.model.named_parameters() if p.ndim == 2 and ".layers." in name]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        options = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        adamw_options = {"betas": (0.9, 0.95), "fused": True}
        norms = {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0}
        rest = {"params": [p for p in others if p.ndim >= 2]}
        if settings.optimizer == "muon":
            muon = torch.optim.Muon(matrices, momentum=0.95, adjust_lr_fn="match_rms_adamw", **options)
            return [muon, torch.optim.AdamW([norms, rest], **options, **adamw_options)]
        return [torch.optim.AdamW([norms, rest, {"params": matrices}], **options, **adamw_options)]

    def _fraction(self) -> float:
        """Return how much of the schedule is over, 0 to 1: by steps, by time, or by whichever is further."""
        settings, parts = self.settings, [0.0]
        if settings.steps:
            parts.append(self.progress.step / settings.steps)
        if settings.minutes:
            parts.append(self.progress.elapsed / (60.0 * settings.minutes))
        return min(1.0, max(parts))

    def _learning_rate(self) -> float:
        settings = self.settings
        if self.progress.step < settings.warmup_steps:
            return settings.learning_rate * (self.progress.step + 1) / settings.warmup_steps
        cosine = 0.5 * (1.0 + math.cos(math.pi * self._fraction()))
        low = settings.final_learning_rate_ratio
        return settings.learning_rate * (low + (1.0 - low) * cosine)

    def _batch(self) -> torch.Tensor:
        """Return int64 ``[batch_size, CONTEXT]``, drawn from the seed and the step alone."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.progress.step)
        last = self.train_tokens.numel() - CONTEXT
        starts = torch.randint(0, last + 1, (self.settings.batch_size,), generator=generator)
        return torch.stack([self.train_tokens[start : start + CONTEXT] for start in starts.tolist()])

    def step(self) -> tuple[float, float]:
        """Take one optimizer step; return (training loss in nats per byte, learning rate)."""
        learning_rate = self._learning_rate()
        batch = self._batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.autocast):
            logits = self.model(input_ids=batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"pretraining diverged: expected a finite loss at step {self.progress.step}, got {value}; "
                f"lower --learning-rate (now {self.settings.learning_rate}) and start again with an empty --work folder"
            )
        self.progress.step += 1
        return value, learning_rate

    def run(self, *, eval_every: int, save_seconds: float, heldout_limit: int = 65536) -> None:
        """Train to the end of the schedule and write the model to ``out``."""
        progress = self.progress
        started = time.monotonic() - progress.elapsed
        saved, losses, learning_rate = time.monotonic(), [], 0.0
        while self._fraction() < 1.0:
            loss, learning_rate = self.step()
            losses.append(loss)
            progress.elapsed = time.monotonic() - started
            if progress.step % eval_every == 0:
                self._log(losses, learning_rate, heldout_limit)
                losses = []
            if time.monotonic() - saved > save_seconds:
                self._save()
                saved = time.monotonic()
            progress.elapsed = time.monotonic() - started
        if losses:
            self._log(losses, learning_rate, heldout_limit)
        self._save()
        self.export()

    def _log(self, losses: list[float], learning_rate: float, heldout_limit: int) -> None:
        progress = self.progress
        entry = {
            "step": progress.step,
            "seconds": round(progress.elapsed, 1),
            "learning_rate": learning_rate,
            "train_loss": sum(losses) / len(losses),
            "heldout_loss": heldout_loss(self.model, self.heldout_tokens, limit=heldout_limit, autocast=True),
        }
        progress.log.append(entry)
        print(json.dumps({name: float(f"{value:.6g}") for name, value in entry.items()}), flush=True)

    def _save(self) -> None:
        state = {
            "settings": asdict(self.settings),
            "data_sha256": self.data_sha256,
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        atomic_write(self.checkpoint, lambda path: torch.save(state, path))

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        expected = {"settings": asdict(self.settings), "data_sha256": self.data_sha256}
        got = {name: state.get(name) for name in expected}
        if got != expected:
            raise ValueError(
                f"cannot resume from {self.checkpoint}: expected a run with {expected}, got one with {got}. "
                "Way out: give the same arguments and CPython, or another --work folder."
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        print(f"resumed at step {self.progress.step}, {self.progress.elapsed:.0f} s", flush=True)

    def export(self) -> None:
        """Write the model folder: weights in bf16, configurations, tokenizer, ``PRETRAINING.md``."""
        model = LlamaForCausalLM(model_config())
        model.load_state_dict(self.model.state_dict())
        model = model.to(torch.bfloat16).eval()
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=0.7, top_p=0.95, max_new_tokens=300, pad_token_id=0, eos_token_id=1
        )
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export.", dir=self.out.parent) as name:
            model.save_pretrained(name)
            # No extra ids: the vocabulary is the 256 bytes and three special tokens.
            ByT5Tokenizer(extra_ids=0, model_max_length=CONTEXT).save_pretrained(name)
            for file in sorted(Path(name).iterdir()):
                atomic_write(self.out / file.name, lambda path, file=file: shutil.copyfile(file, path))
        shipped = LlamaForCausalLM.from_pretrained(self.out, dtype=torch.float32, local_files_only=True)
        report = self.report(heldout_loss(shipped, self.heldout_tokens))
        atomic_write(self.out / "PRETRAINING.md", lambda path: path.write_text(report, encoding="utf-8"))
        print(report)

    def report(self, loss: float) -> str:
        """Return ``PRETRAINING.md`` for a full held-out ``loss`` (nats per byte) of the shipped bf16 weights."""
        progress, settings = self.progress, self.settings
        seen = progress.step * settings.batch_size * CONTEXT
        files = sorted(path for path in self.out.iterdir() if path.name != "PRETRAINING.md" and path.is_file())
        stride = max(1, len(progress.log) // 16)
        shown = progress.log[::stride]
        if progress.log and shown[-1] is not progress.log[-1]:
            shown.append(progress.log[-1])
        parameters = sum(p.numel() for p in self.model.parameters())
        rows = [
            f"| {e['step']:.0f} | {e['seconds']:.0f} | {e['learning_rate']:.2e} | {e['train_loss']:.4f} "
            f"| {e['heldout_loss']:.4f} |"
            for e in shown
        ]
        lines = [
            "# How these weights were made",
            "",
            "A byte-level Llama for the offline demo, trained from random weights with",
            "`python -m pyfastpeft.demo.pretrain` (`pyfastpeft/demo/pretrain.py`). It is a small demonstration model:",
            "it writes text that looks like Python's documentation and knows nothing else.",
            "",
            "## Data",
            "",
            "The English text that CPython carries, by `pyfastpeft.demo.corpus.english_text()`: the topics of",
            "`pydoc_data` and the standard library's docstrings without doctest examples. Whole topics and whole",
            "top-level modules are held out; no line of 45 characters or more is in both parts.",
            "",
            f"- CPython {platform.python_version()} (the text is under the PSF licence, like CPython)",
            f"- training text: {self.train_tokens.numel()} bytes; held-out text: {self.heldout_tokens.numel()} bytes",
            f"- SHA-256 of training text, a NUL byte and held-out text: `{self.data_sha256}`",
            "- one token is one byte (ByT5's tokenizer, no vocabulary file)",
            "",
            "## Training",
            "",
            f"- {parameters} parameters; {progress.step} steps of {settings.batch_size} x {CONTEXT} tokens = "
            f"{seen} tokens ({seen / self.train_tokens.numel():.1f} times the training text)",
            f"- {progress.elapsed / 60:.1f} minutes, {torch.get_num_threads()} thread(s), on {machine()}",
            f"- torch {torch.__version__}, settings: `{json.dumps(asdict(settings))}`",
            "",
            "| step | seconds | learning rate | training loss | held-out loss (first 64 KiB) |",
            "|---:|---:|---:|---:|---:|",
            *rows,
            "",
            "Losses are in nats per byte; the training loss is the mean since the row of the log before.",
            "",
            "## Result",
            "",
            "The shipped bf16 weights, computed in fp32, on all of the held-out text, in windows of 512 bytes:",
            "",
            f"- held-out loss: {loss:.4f} nats per byte",
            f"- perplexity per byte: {math.exp(loss):.4f}",
            f"- {loss / math.log(2):.4f} bits per byte",
            "",
            "The last weights are shipped; no checkpoint was chosen by its held-out loss.",
            "",
            "## Files",
            "",
            "| file | bytes | SHA-256 |",
            "|---|---:|---|",
            *(f"| `{path.name}` | {path.stat().st_size} | `{sha256_of(path)}` |" for path in files),
            "",
        ]
        return "\n".join(lines)


def machine() -> str:
    """Return the machine's kind in a few words: cores, processor, system."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{os.cpu_count()} cores of {name}, {platform.system()}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m pyfastpeft.demo.pretrain", description="Pretrain the demo's base model on the CPU."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model's files")
    parser.add_argument("--work", type=Path, help="folder for the checkpoint (default: OUT with '.work' at its end)")
    parser.add_argument("--minutes", type=float, help="length of the run in minutes of training")
    parser.add_argument("--steps", type=int, help="length of the run in steps (default: 4000 without --minutes)")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help=f"sequences of {CONTEXT} bytes")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate, help="peak learning rate")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default=defaults.optimizer)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--warmup-steps", type=int, default=defaults.warmup_steps)
    parser.add_argument("--fp32", action="store_true", help="fp32 matrix products in place of bf16 autocast")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--eval-every", type=int, default=100, help="steps between two lines of the log")
    parser.add_argument("--save-seconds", type=float, default=180.0, help="seconds between two checkpoints")
    options = parser.parse_args(arguments)
    for name in ("minutes", "steps", "batch_size", "learning_rate", "threads", "eval_every", "warmup_steps"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')}: expected a number above 0, got {value}")
    if options.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        parser.error(
            f"--optimizer muon: expected torch 2.9 or later, got {torch.__version__}; or use --optimizer adamw"
        )
    torch.set_num_threads(options.threads)
    settings = Settings(
        seed=options.seed,
        steps=options.steps or (None if options.minutes else 4000),
        minutes=options.minutes,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        optimizer=options.optimizer,
        autocast=not options.fp32,
    )
    out = options.out.resolve()
    run = Pretraining(settings, out, options.work or out.with_name(out.name + ".work"))
    print(
        f"{run.train_tokens.numel()} training bytes, {run.heldout_tokens.numel()} held-out bytes, "
        f"{sum(p.numel() for p in run.model.parameters())} parameters",
        flush=True,
    )
    run.run(eval_every=options.eval_every, save_seconds=options.save_seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
