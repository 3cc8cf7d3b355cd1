"""The fine-tuning job from options to files: data, model, adapter, optimizer, loop, result."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pyfastpeft.finetune.checkpoint import load_optimizer
from pyfastpeft.finetune.config import FinetuneConfig, FinetuneResult
from pyfastpeft.finetune.data import BatchOrder, Sequences, make_sequences, split_heldout, step_seed, tokenize
from pyfastpeft.finetune.errors import DataError
from pyfastpeft.finetune.eva import initialise_by_eva
from pyfastpeft.finetune.loop import TrainingLoop, perplexity
from pyfastpeft.finetune.metrics import MetricsLog, draw_losses, peak_memory
from pyfastpeft.finetune.model import (
    Base,
    check_tokens,
    choose_device,
    choose_dtype,
    load_base,
    load_tokenizer,
    padding_token,
    put_adapter_on,
    quantize_base,
    read_model_config,
    sequence_length,
    trainable_parameters,
)
from pyfastpeft.finetune.output import METRICS, PLOT, OutputFolder
from pyfastpeft.finetune.progress import ProgressLine, silent
from pyfastpeft.finetune.reading import fingerprint, read_documents


def run(config: FinetuneConfig, console: Console | None = None) -> FinetuneResult:
    """See pyfastpeft.finetune.finetune."""
    config.validate()
    notes: list[str] = []

    def note(*lines: str) -> None:
        notes.extend(lines)
        if console is not None:
            for line in lines:
                console.print(f"note: {line}", markup=False, highlight=False, soft_wrap=True)

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    output = OutputFolder(config)
    note(*output.open())
    model_config = read_model_config(config.model)
    length = sequence_length(config.sequence_length, model_config, config.added_tokens)
    device, device_notes = choose_device(config.device)
    note(*device_notes)
    dtype = choose_dtype(config.dtype, device)
    data = _load_data(config, load_tokenizer(config.model), length)
    note(*data.train.notes, *(data.heldout.notes if data.heldout else []), *data.notes)
    order = BatchOrder(
        len(data.train),
        config.batch_size * config.gradient_accumulation,
        seed=config.seed,
        epochs=config.epochs,
        max_steps=config.max_steps,
    )
    resolved = {
        "dtype": str(dtype).removeprefix("torch."),
        "sequence_length": length,
        "packing": data.train.packed,
        "train_sequences": len(data.train),
        "eval_sequences": len(data.heldout) if data.heldout else 0,
        "total_steps": order.steps,
    }
    with torch.random.fork_rng():
        torch.manual_seed(step_seed(config.seed, 0, "initialisation"))
        base = load_base(config.model, device=str(device), dtype=dtype)
        check_tokens(data.train.ids, base.model)
        model = build(base, config, output.checkpoint, order.steps)
        if config.init == "eva" and output.checkpoint is None:
            note(initialise_by_eva(model, config, data.train, data.pad))
        parameters = trainable_parameters(model)

        def save_adapter(folder: str) -> None:
            with warnings.catch_warnings():  # the note below says it once
                warnings.filterwarnings("ignore", "(?s).*base_weights.safetensors")
                model.save_pretrained(folder)

        if config.method == "relora":
            note(
                "the base's weights change and are saved beside the adapter (base_weights.safetensors), for pyfastpeft"
            )
        optimizer = _optimizer(config, list(parameters.values()))
        scaler = None
        if output.checkpoint is not None:
            scaler = load_optimizer(output.checkpoint, optimizer, list(parameters), device)
        output.begin(data.fingerprints, resolved)
        count = sum(p.numel() for p in parameters.values())
        if console is not None:
            _introduce(console, config, resolved, device, count, data)
        progress = ProgressLine(console, order.steps, log_seconds=config.log_seconds) if console is not None else None
        metrics = MetricsLog(output.path / METRICS, output.state.step if output.checkpoint else None)
        loop = TrainingLoop(
            model,
            config,
            output=output.path,
            train=data.train,
            heldout=data.heldout,
            order=order,
            optimizer=optimizer,
            state=output.state,
            metrics=metrics,
            save_adapter=save_adapter,
            report=progress.reporter() if progress is not None else silent(),
            device=device,
            pad=data.pad,
            loss_scaling=dtype == torch.float16,
        )
        loop.last_checkpoint = output.checkpoint
        if scaler is not None:
            loop.scaler.load_state_dict(scaler)
        try:
            with progress if progress is not None else nullcontext():
                complete = loop.run()
        except BaseException as error:
            output.write(status=f"failed: {type(error).__name__}")
            raise
        finally:
            metrics.close()
        if complete:
            output.save_adapter(save_adapter)
        plot = output.path / PLOT
        draw_losses(plot, metrics.rows, f"{config.method} on {Path(config.data).name}, {config.size_in_words()}")
    state = output.state
    if config.optimizer.startswith("paged_"):
        note(_paging_note(optimizer.memory_report()))
    if state.skipped_steps:
        note(f"{state.skipped_steps} steps were skipped because float16 gradients overflowed; the scale adapts to that")
    result = FinetuneResult(
        output=output.path,
        status="complete" if complete else "interrupted",
        step=state.step,
        total_steps=order.steps,
        checkpoint=loop.last_checkpoint,
        losses=loop.losses,
        eval_losses=loop.eval_losses,
        trainable_parameters=count,
        tokens=state.tokens,
        seconds=state.seconds,
        tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
        peak_memory=peak_memory(device.type),
        metrics_csv=output.path / METRICS,
        loss_png=plot,
        notes=notes,
    )
    output.write(status=result.status, result=_summary(result, metrics.rows))
    return result


def build(base: Base, config: FinetuneConfig, checkpoint: Path | None, total_steps: int) -> torch.nn.Module:
    """The model to train, on its device: quantised where wanted, with gradient checkpointing if wanted, and its adapter."""
    if config.quantized:
        quantize_base(base, blocksize=config.blocksize, quant_type=config.quant_type, double_quant=config.double_quant)
    base.model.to(base.device)
    base.model.config.use_cache = False
    if config.gradient_checkpointing:
        # transformers renamed it in 5.x
        rename = hasattr(base.model, "activation_checkpointing_enable")
        enable = base.model.activation_checkpointing_enable if rename else base.model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return put_adapter_on(base, config, checkpoint, total_steps).to(base.device)


@dataclass
class _Data:
    train: Sequences
    heldout: Sequences | None
    fingerprints: dict[str, str]
    notes: list[str]
    pad: int


def _load_data(config: FinetuneConfig, tokenizer: Any, length: int) -> _Data:
    name = Path(config.data).name
    documents = tokenize(read_documents(config.data, tokenizer), tokenizer, name)
    fingerprints = {"data": fingerprint(config.data)}
    notes: list[str] = []
    if config.eval_data is not None:
        heldout = tokenize(read_documents(config.eval_data, tokenizer), tokenizer, Path(config.eval_data).name)
        fingerprints["eval_data"] = fingerprint(config.eval_data)
        heldout_name = Path(config.eval_data).name
    else:
        documents, heldout = split_heldout(documents, config.eval_fraction, config.seed)
        heldout_name = f"held-out part of {name}"
    plain = all(document.plain for document in documents)
    packing = config.packing if config.packing is not None else plain
    train = make_sequences(documents, length, packing, name)
    sequences = None
    if any(document.targets[1:].any() for document in heldout):
        enough = sum(document.ids.numel() for document in heldout) > length
        try:
            sequences = make_sequences(heldout, length, packing and enough, heldout_name)
        except DataError:
            if config.eval_data is not None:
                raise
    if sequences is None and config.eval_fraction > 0:
        notes.append(f"{name} is too short to hold a part of it out: there will be no held-out loss")
    return _Data(train, sequences, fingerprints, notes, padding_token(tokenizer))


def _optimizer(config: FinetuneConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from pyfastpeft.optim import AdamW, PagedAdamW

    options = {
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
        "state_bits": 8 if config.optimizer.endswith("8bit") else 32,
    }
    if not config.optimizer.startswith("paged_"):
        return AdamW(parameters, **options)
    return PagedAdamW(parameters, resident_bytes=config.optimizer_memory, spill_dir=config.spill_dir, **options)


def _paging_note(report: dict[str, Any]) -> str:
    state, budget, spilled = (report[key] or 0 for key in ("state_bytes", "budget_bytes", "spilled_bytes"))
    text = f"optimizer state: {state / 2**20:,.1f} MiB in pages, of which up to {budget / 2**20:,.1f} MiB in memory"
    if not spilled:
        return text
    return (
        f"{text}; {spilled / 2**20:,.1f} MiB are in {report['spill_dir']}: {report['bytes_in'] / 2**20:,.0f} MiB read, "
        f"{report['bytes_out'] / 2**20:,.0f} MiB written, {report['seconds_waited']:.1f} s waited for them"
    )


def _introduce(
    console: Console, config: FinetuneConfig, resolved: dict[str, Any], device: torch.device, count: int, data: _Data
) -> None:
    quantised = (
        f"{config.quant_type} blocks of {config.blocksize}{', double quantisation' if config.double_quant else ''}, "
        if config.quantized
        else ""
    )
    heldout = f", {len(data.heldout)} held out" if data.heldout else ""
    for line in (
        f"{config.method} on {config.model}: {quantised}{resolved['dtype']} on {device}, {config.size_in_words()}, "
        f"{count:,} trainable parameters",
        f"{len(data.train)} sequences of up to {resolved['sequence_length']} tokens{heldout}; "
        f"{resolved['total_steps']} steps "
        f"of {config.batch_size * config.gradient_accumulation} sequences, {torch.get_num_threads()} threads",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _summary(result: FinetuneResult, rows: list[dict[str, float]]) -> dict[str, Any]:
    evaluations = [row for row in rows if "eval_loss" in row]
    training = [row for row in rows if "train_loss" in row]
    summary: dict[str, Any] = {
        "step": result.step,
        "total_steps": result.total_steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory": result.peak_memory,
        "trainable_parameters": result.trainable_parameters,
        "checkpoint": str(result.checkpoint) if result.checkpoint else None,
        "train_loss": training[-1]["train_loss"] if training else None,
    }
    if evaluations:
        for when, row in (("before", evaluations[0]), ("after", evaluations[-1])):
            summary[f"eval_loss_{when}"] = row["eval_loss"]
            summary[f"eval_perplexity_{when}"] = perplexity(row["eval_loss"])
    return summary
