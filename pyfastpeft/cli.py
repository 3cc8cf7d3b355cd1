"""The command line: `pyfastpeft finetune | generate | merge | bench | doctor`. Thin: options in, one library call, words out.

Only typer and rich are imported here; everything heavy is imported inside the commands, so `--help` is quick.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from pyfastpeft import terminal

app = typer.Typer(
    name="pyfastpeft",
    help="Parameter-efficient fine-tuning at the speed of the hardware: quantise, train, generate, merge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the `pyfastpeft` command."""
    app()


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version("pyfastpeft")
    except PackageNotFoundError:  # running from its source folder
        from pyfastpeft.build_info import build_info

        number = build_info()["version"]
    typer.echo(f"pyfastpeft {number}")
    raise typer.Exit


@app.callback()
def _options(
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the Python traceback of an error (or PYFASTPEFT_TRACEBACK=1).")
    ] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    terminal.settings["traceback"] = show_traceback or os.environ.get("PYFASTPEFT_TRACEBACK", "") not in ("", "0")


JOB, ADAPTER, TRAINING, DATA, RUN = "The job", "Adapter and quantisation", "Training", "Data", "Running and saving"
_Text = Optional[str]  # noqa: UP045  (typer reads these annotations at run time, Python 3.10 included)
_Int = Optional[int]  # noqa: UP045


def _option(help_text: str, panel: str | None = None, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, **more)


@app.command()
def finetune(
    model: Annotated[_Text, _option("Folder or Hugging Face id of a causal language model.", JOB)] = None,
    data: Annotated[_Text, _option("A .txt or .jsonl file: text; prompt + completion; or chat messages.", JOB)] = None,
    output: Annotated[
        _Text, _option("Folder for the adapter, checkpoints, metrics.csv, loss.png, run.json.", JOB)
    ] = None,
    method: Annotated[
        str,
        _option(
            "qlora (4-bit base), lora, adalora, ia3, relora, bitfit, prompt, p_tuning, prefix or trainable_tokens.", JOB
        ),
    ] = "qlora",
    demo: Annotated[
        bool, _option("The whole job offline on the packaged small model, in minutes.", JOB, "--demo")
    ] = False,
    rank: Annotated[int, _option("Rank of the adapter.", ADAPTER)] = 16,
    alpha: Annotated[float, _option("LoRA alpha; the update is scaled by alpha / rank.", ADAPTER)] = 32,
    dropout: Annotated[float, _option("LoRA dropout.", ADAPTER)] = 0.05,
    rslora: Annotated[bool, _option("Scale by alpha / sqrt(rank).", ADAPTER, "--rslora")] = False,
    init: Annotated[
        str, _option("lora, qlora: default, gaussian, orthogonal or eva (from the data's directions).", ADAPTER)
    ] = "default",
    target_modules: Annotated[
        str, _option('"auto", "all-linear", module names with commas between them, or a regular expression.', ADAPTER)
    ] = "auto",
    modules_to_save: Annotated[_Text, _option("Modules trained whole, with commas between them.", ADAPTER)] = None,
    quantize: Annotated[
        Optional[bool],  # noqa: UP045
        _option("Quantise the base to 4 bits on load (default: for qlora).", ADAPTER),
    ] = None,
    virtual_tokens: Annotated[int, _option("prompt, p_tuning, prefix: how many.", ADAPTER)] = 20,
    prompt_text: Annotated[_Text, _option("prompt: start from the embeddings of this text.", ADAPTER)] = None,
    prompt_encoder: Annotated[str, _option("p_tuning: mlp or lstm.", ADAPTER)] = "mlp",
    prefix_projection: Annotated[
        bool, _option("prefix: train embeddings and an MLP.", ADAPTER, "--prefix-projection")
    ] = False,
    token_indices: Annotated[_Text, _option('trainable_tokens: which, such as "7,32000-32009".', ADAPTER)] = None,
    restart_every: Annotated[_Int, _option("relora: steps between restarts (default: five a run).", ADAPTER)] = None,
    blocksize: Annotated[int, _option("Values per quantisation block.", ADAPTER)] = 64,
    quant_type: Annotated[str, _option("nf4 or fp4.", ADAPTER)] = "nf4",
    double_quant: Annotated[bool, _option("Quantise the block scales too.", ADAPTER)] = True,
    learning_rate: Annotated[float, _option("Peak learning rate.", TRAINING, "--learning-rate", "--lr")] = 2e-4,
    schedule: Annotated[str, _option("cosine, linear or constant.", TRAINING)] = "cosine",
    warmup_steps: Annotated[_Int, _option("Steps of linear warm-up.", TRAINING)] = None,
    warmup_ratio: Annotated[float, _option("Warm-up as a share of all steps.", TRAINING)] = 0.03,
    min_lr_ratio: Annotated[float, _option("Final learning rate as a share of the peak.", TRAINING)] = 0.0,
    epochs: Annotated[float, _option("Passes over the data.", TRAINING)] = 1.0,
    max_steps: Annotated[_Int, _option("Optimizer steps, in place of --epochs.", TRAINING)] = None,
    batch_size: Annotated[int, _option("Sequences per forward.", TRAINING)] = 4,
    gradient_accumulation: Annotated[int, _option("Forwards per optimizer step.", TRAINING)] = 4,
    gradient_checkpointing: Annotated[
        bool, _option("Recompute activations: less memory, more time.", TRAINING, "--gradient-checkpointing")
    ] = False,
    optimizer: Annotated[
        str,
        _option("adamw (32-bit state) or adamw8bit; paged_adamw or paged_adamw8bit: state beyond memory.", TRAINING),
    ] = "adamw",
    optimizer_memory: Annotated[
        _Text, _option('Memory for a paged optimizer\'s state, such as "2GB" (default: half of the free).', TRAINING)
    ] = None,
    spill_dir: Annotated[_Text, _option("Folder for what of that state does not fit, on a disk.", TRAINING)] = None,
    weight_decay: Annotated[float, _option("Decoupled weight decay.", TRAINING)] = 0.0,
    max_grad_norm: Annotated[float, _option("Clip the gradients' norm to this; 0: never.", TRAINING)] = 1.0,
    dtype: Annotated[str, _option("auto, float32, bfloat16 or float16.", TRAINING)] = "auto",
    seed: Annotated[int, _option("Seed of initialisation, data order and dropout.", TRAINING)] = 0,
    sequence_length: Annotated[
        _Int, _option("Tokens per sequence (default: 512, or the model's maximum).", DATA)
    ] = None,
    packing: Annotated[
        Optional[bool],  # noqa: UP045
        _option("Join documents and cut full sequences, or pad one a row (default: pack text, pad the rest).", DATA),
    ] = None,
    eval_data: Annotated[_Text, _option("A file of held-out data.", DATA)] = None,
    eval_fraction: Annotated[float, _option("Share of --data to hold out, without --eval-data.", DATA)] = 0.05,
    eval_every: Annotated[_Int, _option("Steps between evaluations (default: ten a run).", RUN)] = None,
    save_every: Annotated[_Int, _option("Steps between checkpoints (default: ten a run).", RUN)] = None,
    keep_last: Annotated[int, _option("Checkpoints kept.", RUN)] = 2,
    resume: Annotated[
        bool, _option("Go on from the newest checkpoint, or start where there is none.", RUN, "--resume")
    ] = False,
    resume_from: Annotated[_Text, _option("Go on from this checkpoint folder.", RUN)] = None,
    overwrite: Annotated[bool, _option("Replace an earlier run in the output folder.", RUN, "--overwrite")] = False,
    device: Annotated[str, _option("auto, cpu, cuda or cuda:N.", RUN)] = "auto",
    threads: Annotated[_Int, _option("CPU threads (default: torch's choice).", RUN)] = None,
    log_seconds: Annotated[float, _option("Seconds between progress lines without a terminal.", RUN)] = 10.0,
    demo_eval_bytes: Annotated[_Int, typer.Option(hidden=True)] = None,
) -> None:
    """Fine-tune a model by LoRA, QLoRA, AdaLoRA, ReLoRA, (IA)³, or another of the methods.

    Ctrl-C saves a checkpoint; the same command with --resume then goes on exactly there.
    """
    options = {name: value for name, value in locals().items() if name not in ("demo", "demo_eval_bytes")}
    with terminal.errors_in_words():
        if demo:
            _demo(options, demo_eval_bytes)
            return
        from pyfastpeft.finetune import ConfigError, FinetuneConfig
        from pyfastpeft.finetune import finetune as run

        missing = [f"--{name}" for name in ("model", "data", "output") if options[name] is None]
        if missing:
            raise ConfigError(f"{', '.join(missing)}: missing (or use --demo, which needs none of them)")
        config = FinetuneConfig(**options)
        result = run(config, console=terminal.err())
        if result.interrupted:
            terminal.say(
                f"interrupted at step {result.step}/{result.total_steps}; checkpoint saved: {result.checkpoint}"
            )
            terminal.say("go on with the same command and --resume")
            raise typer.Exit(terminal.INTERRUPTED)
        _finished(result, config)


def _finished(result: Any, config: Any) -> None:
    from pyfastpeft.finetune.loop import perplexity
    from pyfastpeft.finetune.progress import duration

    lines = [
        f"done: {result.step} steps, {result.tokens:,} tokens in {duration(result.seconds)} "
        f"({result.tokens_per_second:,.0f} tokens/s), peak memory {result.peak_memory / 2**30:.2f} GiB"
    ]
    if len(result.eval_losses) > 1:
        before, after = result.eval_losses[0][1], result.eval_losses[-1][1]
        lines.append(f"held-out perplexity per token: {perplexity(before):.3f} -> {perplexity(after):.3f}")
    lines += [
        f"adapter: {result.output}",
        f"loss curve: {result.loss_png}    metrics: {result.metrics_csv}",
        f"try it: pyfastpeft generate --model {config.model} --adapter {result.output} --prompt ...",
    ]
    for line in lines:
        terminal.say(line)


def _demo(options: dict[str, Any], eval_bytes: int | None) -> None:
    from pyfastpeft.finetune.config import ConfigError
    from pyfastpeft.finetune.demo import DEMO_OUTPUT, run_demo

    allowed = {"output", "max_steps", "seed", "threads", "overwrite", "log_seconds"}
    given = [n for n in options if n not in allowed and options[n] != _default(n)]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"--demo chooses {names} itself; leave them out, or leave --demo out")
    code = run_demo(
        output=options["output"] or DEMO_OUTPUT,
        max_steps=options["max_steps"],
        seed=options["seed"],
        threads=options["threads"],
        eval_bytes=eval_bytes,
        log_seconds=options["log_seconds"],
        overwrite=options["overwrite"],
        out=terminal.out(),
        progress=terminal.err(),
    )
    if code:
        raise typer.Exit(code)


def _default(name: str) -> Any:
    import inspect

    return inspect.signature(finetune).parameters[name].default


@app.command()
def generate(
    model: Annotated[str, _option("Base model: folder or Hugging Face id.")],
    adapter: Annotated[_Text, _option("Folder of the adapter; without it the base alone.")] = None,
    prompt: Annotated[_Text, _option('The text to go on from; "-" or nothing: standard input.')] = None,
    chat: Annotated[bool, _option("The prompt is a user's message to the chat template.", None, "--chat")] = False,
    max_new_tokens: Annotated[int, _option("Tokens to generate at most.")] = 200,
    temperature: Annotated[float, _option("Sampling temperature.")] = 0.8,
    top_p: Annotated[float, _option("Sample from the smallest set with this probability.")] = 0.95,
    top_k: Annotated[int, _option("Sample from this many likeliest tokens; 0: all.")] = 0,
    greedy: Annotated[bool, _option("Always the likeliest token.", None, "--greedy")] = False,
    seed: Annotated[int, _option("Seed of the draws.")] = 0,
    quantize: Annotated[
        Optional[bool],  # noqa: UP045
        _option("NF4 on load, or not (default: as the adapter was trained).", None, "--quantize/--no-quantize"),
    ] = None,
    dtype: Annotated[str, _option("auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, _option("auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[_Int, _option("CPU threads.")] = None,
    stream: Annotated[bool, _option("Print while generating.")] = True,
    echo: Annotated[bool, _option("Print the prompt first.")] = True,
) -> None:
    """Generate text with an adapter, streaming to the terminal."""
    with terminal.errors_in_words():
        from pyfastpeft.finetune.errors import ConfigError

        if prompt is None or prompt == "-":
            if prompt is None and sys.stdin.isatty():
                raise ConfigError("--prompt: expected a text (or a pipe on standard input), got none")
            prompt = sys.stdin.read()
        if not prompt.strip():
            raise ConfigError("--prompt: expected a text, got nothing")
        import torch

        from pyfastpeft.generate import GenerateConfig, Generator

        config = GenerateConfig(
            model=model,
            adapter=adapter,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            greedy=greedy,
            seed=seed,
            quantize=quantize,
            dtype=dtype,
            device=device,
            chat=chat,
        )
        if threads is not None:
            torch.set_num_threads(threads)
        generator = Generator(config)
        if echo and not chat:
            terminal.write(prompt)
        text = generator(prompt, terminal.write if stream else None)
        terminal.write("\n" if stream else text + "\n")


@app.command()
def merge(
    model: Annotated[str, _option("Base model: folder or Hugging Face id.")],
    adapter: Annotated[str, _option("Folder of the adapter.")],
    output: Annotated[str, _option("Folder of the merged model; must not exist yet.")],
    dtype: Annotated[_Text, _option("float32, bfloat16 or float16 (default: as the base's files).")] = None,
    into: Annotated[
        str, _option('"original" weights, or the "dequantized" 4-bit ones that a qlora adapter was trained on.')
    ] = "original",
) -> None:
    """Merge an adapter into its base: a plain transformers model with its tokenizer."""
    with terminal.errors_in_words():
        from pyfastpeft.merge import MergeConfig
        from pyfastpeft.merge import merge as run

        result = run(MergeConfig(model=model, adapter=adapter, output=output, dtype=dtype, into=into))
        for note in result.notes:
            terminal.say(f"note: {note}")
        kind = str(result.dtype).removeprefix("torch.")
        terminal.say(f"merged {result.layers} layers; {result.parameters:,} parameters in {kind}: {result.output}")


@app.command()
def bench(
    sections: Annotated[list[str] | None, typer.Argument(help="Sections to run; all of them if none is named.")] = None,
    quick: Annotated[bool, _option("Fewer shapes and rounds: about two minutes.")] = False,
    rounds: Annotated[int, _option("Samples of each candidate.")] = 21,
    threads: Annotated[int | None, _option("Threads; torch's number if not given.")] = None,
    json_file: Annotated[Path | None, _option("Write the results here as JSON.", None, "--json")] = None,
    csv_file: Annotated[Path | None, _option("Write the results here as CSV.", None, "--csv")] = None,
    plots: Annotated[
        Path | None, _option("Draw ratios.png, roofline.png and (paged) optimizer_budget.png into this folder.")
    ] = None,
    compare: Annotated[
        Path | None, _option("An older run's JSON: say what became slower; exit 1 if anything did.")
    ] = None,
    list_sections: Annotated[bool, _option("Name the sections and exit.", None, "--list")] = False,
) -> None:
    """Measures this machine: every kernel and layer beside the installed peers, with its share of the machine's limits."""
    with terminal.errors_in_words():
        from pyfastpeft import _bench

        _bench.load()
        from pyfastpeft.bench import command

        if list_sections:
            terminal.write(command.section_list())
            return
        code = command.run(
            sections or [], quick=quick, rounds=rounds, threads=threads, json_file=json_file, csv_file=csv_file,
            plots=plots, compare=compare,
        )  # fmt: skip
        if code:
            raise typer.Exit(code)


@app.command()
def doctor(
    as_json: Annotated[bool, _option("The report as JSON, for scripts and bug reports.", None, "--json")] = False,
) -> None:
    """Versions, instruction sets, CUDA, OpenMP; which kernel runs where; problems and their fixes."""
    with terminal.errors_in_words():
        from pyfastpeft.doctor import print_report, report

        result = report()
        if as_json:
            import json

            terminal.write(json.dumps(result, indent=2) + "\n")
        else:
            print_report(result)


if __name__ == "__main__":
    main()
