"""`pyfastpeft finetune --demo`: the whole job, offline, on a small model that ships with the package.

A byte-level Llama that was pretrained on English (the documentation that CPython carries) is quantised to NF4 and tuned
by QLoRA on another domain, Python source of the standard library. Held-out perplexity is measured before, after, after
reloading the adapter from disk (it must be the same to the last bit), and after merging it into a dense model.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from pyfastpeft.finetune import ConfigError, FinetuneConfig, FinetuneResult, ModelError, OutputError, finetune
from pyfastpeft.finetune.data import Sequences, make_sequences, tokenize
from pyfastpeft.finetune.files import prepare_output, read_json, reason, write_bytes
from pyfastpeft.finetune.loop import mean_loss, perplexity
from pyfastpeft.finetune.model import Base
from pyfastpeft.finetune.output import RUN, OutputFolder
from pyfastpeft.finetune.progress import duration
from pyfastpeft.finetune.reading import Document, Part
from pyfastpeft.generate import GenerateConfig, generate_text, load_adapted
from pyfastpeft.merge import MergeConfig, MergeResult, merge

DEMO_OUTPUT = "pyfastpeft-demo"
DATA = "data"  # folder of the corpora, in the output folder
SEQUENCE = 512  # bytes: the model's context
BATCH = 4
STEPS = 320
LEARNING_RATE = 4e-3  # a model this small takes, and needs, far more than a large one
HELDOUT_BYTES = 64 * 1024  # of each domain, from the start of its held-out part
PROMPT = "    def read(self, "
SAMPLE_TOKENS = 240


@dataclass
class Measured:
    """Mean loss in nats per byte on each held-out text, and a sample, of one state of the model."""

    python: float
    english: float
    sample: str


@dataclass
class Stopwatch:
    """Seconds of each phase, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun


def demo_model() -> Path:
    """The folder of the packaged base model; ModelError where this installation lacks it."""
    from pyfastpeft.demo import MODEL_DIRECTORY as folder

    if not (folder / "config.json").is_file():
        raise ModelError(f"the demo's model is not in {folder}; reinstall pyfastpeft (its package data are missing)")
    return folder


def run_demo(
    *,
    output: str = DEMO_OUTPUT,
    max_steps: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    eval_bytes: int | None = None,
    log_seconds: float = 10.0,
    overwrite: bool = False,
    out: Console | None = None,
    progress: Console | None = None,
    model: Path | None = None,
) -> int:
    """Runs the demo and prints what it measures; returns an exit code.

    output      folder for data/, the adapter and its run files, and merged/; an earlier demo there is replaced
    max_steps, eval_bytes    a shorter run (tests): optimizer steps, held-out bytes of each domain
    out, progress            consoles for results and for the progress line
    model                    another base model than the packaged one (tests)
    """
    out = out or Console()
    watch = Stopwatch()
    model = model or demo_model()
    folder = Path(output).expanduser()
    earlier = read_json(folder / RUN)
    replace = overwrite or (earlier is not None and earlier.get("base_model") == str(model))
    target = folder / "merged"
    if target.exists() and not replace:
        raise ConfigError(f"{target} exists and is no earlier demo's; choose another --output, or use --overwrite")
    if threads is not None:
        torch.set_num_threads(threads)

    def say(line: str) -> None:
        out.print(line, markup=False, highlight=False, soft_wrap=True)

    say(f"pyfastpeft demo: QLoRA on {model.name}/, from English to Python source, on {torch.get_num_threads()} threads")
    config = FinetuneConfig(
        model=str(model),
        data=str(folder / DATA / "python-train.txt"),
        eval_data=str(folder / DATA / "python-heldout.txt"),
        output=str(folder),
        method="qlora",
        rank=16,
        alpha=32,
        dropout=0.0,
        target_modules="all-linear",
        learning_rate=LEARNING_RATE,
        warmup_ratio=0.05,
        max_steps=max_steps or STEPS,
        batch_size=BATCH,
        gradient_accumulation=1,
        sequence_length=SEQUENCE,
        eval_every=max(1, (max_steps or STEPS) // 4),
        save_every=0,
        keep_last=1,
        seed=seed,
        overwrite=replace,
        device="cpu",
        log_seconds=log_seconds,
    )
    OutputFolder(config).open()  # an earlier run in the way is said before anything else
    with watch.phase("reading the corpora"):
        files = write_corpora(folder, eval_bytes or HELDOUT_BYTES)
    heldout = {}
    with watch.phase("quantising, first measurements"):
        base, network = load_adapted(_generation(config, seed, adapter=None))
        for name in ("python", "english"):
            heldout[name] = _sequences(files[f"{name}-heldout"], base)
        before = _measure(base, network, {"english": heldout["english"]}, config)
    say(f"\nbefore: a sample after {PROMPT!r}")
    say(_indented(before.sample))
    del base, network
    gc.collect()

    with watch.phase("training"):
        result = finetune(config, console=progress)
    if result.interrupted:
        say(f"interrupted at step {result.step}/{result.total_steps}; start the demo again to repeat it")
        return 130
    before.python = result.eval_losses[0][1]
    trained = result.eval_losses[-1][1]

    with watch.phase("reloading the adapter"):
        base, network = load_adapted(_generation(config, seed, adapter=result.output))
        after = _measure(base, network, heldout, config)
    if after.python != trained:
        raise OutputError(
            f"the adapter read back from {result.output} gives a held-out loss of {after.python!r}, the one in "
            f"memory had {trained!r}: what was saved is not what was trained"
        )
    say(f"\nafter: a sample after {PROMPT!r}")
    say(_indented(after.sample))
    del base, network
    gc.collect()

    with watch.phase("merging"):
        shutil.rmtree(target, ignore_errors=True)
        merged = merge(MergeConfig(model=str(model), adapter=str(result.output), output=str(target)))
        base, network = load_adapted(GenerateConfig(model=str(target), quantize=False, seed=seed, device="cpu"))
        joined = _measure(base, network, heldout, config)
    say("\nmerged into a dense model: its sample")
    say(_indented(joined.sample))
    _summary(out, say, config, result, before, after, joined, merged, watch)
    return 0


def write_corpora(folder: Path, heldout_bytes: int) -> dict[str, Path]:
    """data/python-train.txt, python-heldout.txt, english-heldout.txt below `folder`, by name."""
    from pyfastpeft.demo.corpus import english_text, python_source

    train, python = python_source()
    texts = {
        "python-train": train,
        "python-heldout": _beginning(python, heldout_bytes),
        "english-heldout": _beginning(english_text()[1], heldout_bytes),
    }
    data = folder / DATA
    prepare_output(data)
    files = {}
    try:
        for name, text in texts.items():
            files[name] = data / f"{name}.txt"
            write_bytes(files[name], text.encode())
    except OSError as error:
        raise OutputError(f"{data} could not be written: {reason(error)}") from error
    return files


def _beginning(text: str, size: int) -> str:
    """The first `size` bytes of a text, as whole characters."""
    return text.encode()[:size].decode(errors="ignore")


def _generation(config: FinetuneConfig, seed: int, adapter: Path | None) -> GenerateConfig:
    return GenerateConfig(
        model=config.model,
        adapter=str(adapter) if adapter is not None else None,
        quantize=True,
        blocksize=config.blocksize,
        quant_type=config.quant_type,
        double_quant=config.double_quant,
        seed=seed,
        device="cpu",
    )


def _sequences(file: Path, base: Base) -> Sequences:
    document = Document((Part(file.read_text(encoding="utf-8"), True),))
    return make_sequences(tokenize([document], base.tokenizer, file.name), SEQUENCE, True, file.name)


def _measure(base: Base, model: torch.nn.Module, heldout: dict[str, Sequences], config: FinetuneConfig) -> Measured:
    losses = {
        name: mean_loss(model, sequences, batch_size=config.batch_size, pad=0, device=base.device)
        for name, sequences in heldout.items()
    }
    sampling = GenerateConfig(
        model=config.model, max_new_tokens=SAMPLE_TOKENS, temperature=0.7, top_p=0.9, seed=config.seed
    )
    sample = PROMPT + generate_text(model, base, PROMPT, sampling)
    nan = float("nan")
    return Measured(losses.get("python") or nan, losses.get("english") or nan, sample)


def _indented(text: str) -> str:
    return "\n".join("  | " + line for line in text.rstrip().split("\n"))


def _summary(
    out: Console,
    say: Callable[[str], None],
    config: FinetuneConfig,
    result: FinetuneResult,
    before: Measured,
    after: Measured,
    joined: Measured,
    merged: MergeResult,
    watch: Stopwatch,
) -> None:
    table = Table(title="held-out perplexity per byte (one token is one byte)", title_justify="left")
    for name, justify in (("", "left"), ("Python source", "right"), ("English", "right")):
        table.add_column(name, justify=justify)
    for name, state in (
        ("NF4 base, before", before),
        ("with the adapter (reloaded)", after),
        (f"merged, {str(merged.dtype).removeprefix('torch.')}", joined),
    ):
        table.add_row(name, f"{perplexity(state.python):.3f}", f"{perplexity(state.english):.3f}")
    say("")
    out.print(table)
    say(
        f"the adapter read back from disk gives the same held-out loss as the one in memory, to the last bit "
        f"({after.python:.6f} nats per byte)"
    )
    for note in merged.notes:
        say(note)
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in watch.seconds.items())
    say(
        f"{result.step} steps, {result.tokens:,} bytes, {result.trainable_parameters:,} trained parameters, "
        f"{result.tokens_per_second:,.0f} bytes/s; {duration(sum(watch.seconds.values()))} in all: {spent}"
    )
    say(f"adapter: {result.output}    merged model: {merged.output}")
    say(f"metrics: {result.metrics_csv}    loss curve: {result.loss_png}")
    say(f"try it: pyfastpeft generate --model {config.model} --adapter {result.output} --prompt 'import '")
