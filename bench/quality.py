"""Does each method learn as well as its peer? Real training: the demo's model, from English to Python source.

    python bench/quality.py --json bench/results/quality.json --plot bench/results/quality.png --table bench/results/quality.md
    python bench/quality.py --json bench/results/quality.json --report        the table of a finished run again

Every method of methods.py is trained for the same number of steps on the same batches with every seed, ours and the
peer's; a seed decides the order of the text and the adapter's initial values. What is compared is the loss on held-out
text, in nats per byte. With means m and standard deviations s over n seeds, two implementations are equal within the
noise of seeds where

    |m₁ − m₂| ≤ 2 √(s₁² / n + s₂² / n)

The results file is written after every training, and a run that was cut goes on from it (with the same settings).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "bench"

import torch
from torch import nn

from .measure import environment, version
from .methods import METHODS, OURS, Method, adapted, after_step, method_named

BYTE_OFFSET = 3  # token of byte b: b + 3, as ByT5 numbers them
EVAL_BATCH = 16
SETTINGS = {"steps": 120, "batch": 4, "length": 128, "heldout_bytes": 16384, "dtype": "bfloat16"}
# ours of one method beside ours of another: a rank's worth of parameters spent in two ways, or 4 bits beside 16
ACROSS = (
    ("QLoRA", "LoRA"),
    ("AdaLoRA", "LoRA"),
    ("AdaLoRA, its best rate", "LoRA, its best rate"),
    ("DoRA", "LoRA"),
    ("ReLoRA", "LoRA"),
)


class Texts:
    """The demo's Python source: random training batches by seed, and the held-out sequences."""

    def __init__(self, batch: int, length: int, heldout_bytes: int) -> None:
        from pyfastpeft.demo.corpus import python_source

        train, heldout = (
            torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() + BYTE_OFFSET
            for text in python_source()
        )
        self.train, self.batch, self.length = train, batch, length
        count = min(heldout_bytes, len(heldout)) // length
        self.heldout = heldout[: count * length].view(count, length)

    def batches(self, seed: int, steps: int) -> torch.Tensor:
        """[steps, batch, length], the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(self.train) - self.length, (steps, self.batch), generator=generator)
        return self.train[starts[..., None] + torch.arange(self.length)]


def base_model(dtype: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    from pyfastpeft.finetune.demo import demo_model

    return AutoModelForCausalLM.from_pretrained(demo_model(), dtype=getattr(torch, dtype))


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    """The first byte is no target: nothing precedes it, except virtual tokens."""
    labels = ids.clone()
    labels[:, 0] = -100
    return labels


@torch.no_grad()
def heldout_loss(model: nn.Module, heldout: torch.Tensor) -> float:
    """Nats per byte, from the logits: PEFT's AdaLoRA adds its penalty to the loss even here."""
    model.eval()
    total = 0.0
    for ids in heldout.split(EVAL_BATCH):
        logits = model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] : -1]  # behind any virtual tokens
        total += nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).item() * len(ids)
    return total / len(heldout)


def train(method: Method, implementation: str, seed: int, texts: Texts, settings: dict) -> dict:
    """One training; a row of the results."""
    from pyfastpeft.finetune.demo import demo_model

    begun, steps = time.monotonic(), settings["steps"]
    base = base_model(settings["dtype"])
    torch.manual_seed(seed)
    model = adapted(method, implementation, base, steps, demo_model())
    parameters = [p for p in model.parameters() if p.requires_grad]
    if implementation == OURS:
        import pyfastpeft as pf

        optimizer = pf.optim.AdamW(parameters, lr=method.rate)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=method.rate)
    more = after_step(method, implementation, model, optimizer, steps)
    model.train()
    torch.manual_seed(seed)
    losses = []
    for step, ids in enumerate(texts.batches(seed, steps)):
        if method.name != "ReLoRA":  # whose schedule is its own
            for group in optimizer.param_groups:
                group["lr"] = method.rate * (1 - step / steps)
        loss = model(input_ids=ids, labels=labels_of(ids), use_cache=False).loss
        loss.backward()
        optimizer.step()
        if more is not None:
            more(step + 1)
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(loss.item(), 5))
    return {
        "method": method.name,
        "implementation": implementation,
        "seed": seed,
        "heldout_loss": heldout_loss(model, texts.heldout),
        "train_losses": losses,
        "parameters": sum(p.numel() for p in parameters),
        "seconds": round(time.monotonic() - begun, 2),
    }


def losses_of(document: dict, method: str, implementation: str) -> dict[int, float]:
    """seed → held-out loss."""
    return {
        run["seed"]: run["heldout_loss"]
        for run in document["runs"]
        if run["method"] == method and run["implementation"] == implementation
    }


def compare(first: dict[int, float], second: dict[int, float]) -> dict | None:
    """Means, standard deviations, their difference and the test above, over the seeds that both have (two at least)."""
    seeds = sorted(set(first) & set(second))
    if len(seeds) < 2:
        return None
    values = [[losses[seed] for seed in seeds] for losses in (first, second)]
    means = [statistics.fmean(v) for v in values]
    deviations = [statistics.stdev(v) for v in values]
    error = math.sqrt(sum(s * s for s in deviations) / len(seeds))
    paired = [a - b for a, b in zip(*values, strict=True)]
    return {
        "seeds": len(seeds),
        "means": means,
        "deviations": deviations,
        "difference": means[0] - means[1],
        "standard_error": error,
        "same_seed_difference": max(paired, key=abs),
        "equal": abs(means[0] - means[1]) <= 2 * error,
    }


def comparisons(document: dict) -> list[dict]:
    """Every method beside its peer, then ours across methods."""
    pairs = [((m.name, OURS), (m.name, m.peer)) for m in METHODS if m.peer]
    pairs += [((a, OURS), (b, OURS)) for a, b in ACROSS]
    found = []
    for first, second in pairs:
        result = compare(losses_of(document, *first), losses_of(document, *second))
        if result is not None:
            found.append({"first": list(first), "second": list(second), **result})
    return found


def table(document: dict) -> str:
    """Two Markdown tables: methods beside their peers, and across methods."""
    base = document["base_loss"]
    lines = [
        f"Held-out loss in nats per byte (the base alone: {base:.4f}), mean ± standard deviation over seeds.",
        "",
        "| method | rate | ours | peer | difference | 2 s.e. | equal | largest at one seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    across = ["", "| ours | beside ours | difference | 2 s.e. | equal |", "|---|---|---|---|---|"]
    for c in document["comparisons"]:
        (name, _), (other, peer) = c["first"], c["second"]
        ours, theirs = (f"{m:.4f} ± {s:.4f}" for m, s in zip(c["means"], c["deviations"], strict=True))
        test = f"{c['difference']:+.4f} | {2 * c['standard_error']:.4f} | {'yes' if c['equal'] else 'NO'} |"
        if name == other:
            rate = method_named(name).rate
            lines.append(
                f"| {name} | {rate:g} | {ours} | {theirs} ({peer}) | {test} {c['same_seed_difference']:+.4f} |"
            )
        else:
            across.append(f"| {name} {ours} | {other} {theirs} | {test}")
    return "\n".join(lines + (across if len(across) > 3 else []))


def plot(document: dict, file: Path) -> None:
    """A dot per training: methods down the side, held-out loss along, ours and the peer's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [m for m in METHODS if losses_of(document, m.name, OURS)]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(shown) + 1.6))
    for place, method in enumerate(shown):
        for implementation, shift, colour, mark in (
            (OURS, -0.14, "tab:blue", "o"),
            (method.peer, 0.14, "tab:orange", "s"),
        ):
            losses = list(losses_of(document, method.name, implementation).values()) if implementation else []
            if not losses:
                continue
            label = None if place else ("ours" if implementation == OURS else "peer")
            axes.plot(losses, [place + shift] * len(losses), mark, color=colour, markersize=5, alpha=0.6, label=label)
            axes.plot([statistics.fmean(losses)] * 2, [place + shift - 0.12, place + shift + 0.12], color=colour)
    axes.axvline(document["base_loss"], color="black", linewidth=0.8, linestyle="--", label="the base alone")
    axes.set_yticks(range(len(shown)), [m.name for m in shown])
    axes.invert_yaxis()
    axes.set_xlabel(f"held-out loss after {document['settings']['steps']} steps, nats per byte; a mark for each seed")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def write(document: dict, file: Path) -> None:
    """The whole file or the former one, never a part."""
    document["comparisons"] = comparisons(document)
    partial = file.with_name(file.name + ".part")
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)


def read(file: Path, settings: dict) -> dict | None:
    """The results so far; ValueError where they were made with other settings."""
    if not file.exists():
        return None
    document = json.loads(file.read_text(encoding="utf-8"))
    if document["settings"] != settings:
        raise ValueError(
            f"{file} was made with {document['settings']}, not {settings}; remove it, or name another file"
        )
    return document


def run(methods: list[Method], seeds: int, settings: dict, file: Path) -> dict:
    """Trains what the file does not hold yet, a seed after the other, so that a cut run has all methods."""
    import transformers

    transformers.logging.disable_progress_bar()
    texts = Texts(settings["batch"], settings["length"], settings["heldout_bytes"])
    document = read(file, settings)
    if document is None:
        document = {
            "environment": environment(),
            "settings": settings,
            "base_loss": heldout_loss(base_model(settings["dtype"]), texts.heldout),
            "runs": [],
        }
    document["methods"] = {
        m.name: {"config": m.config, "options": m.options, "rate": m.rate, "rate_from": m.of} for m in METHODS
    }
    done = {(r["method"], r["implementation"], r["seed"]) for r in document["runs"]}
    absent = {name for method in methods for name in method.needs if version(name) is None}
    for name in sorted(absent):
        print(f"{name} is not installed: what stands beside it is left out (pip install {name})")
    for seed in range(seeds):
        for method in methods:
            peers = [method.peer] if method.peer and not absent.intersection(method.needs) else []
            for implementation in (OURS, *peers):
                if (method.name, implementation, seed) in done:
                    continue
                row = train(method, implementation, seed, texts, settings)
                document["runs"].append(row)
                write(document, file)
                print(
                    f"seed {seed}  {method.name}, {implementation}: {row['heldout_loss']:.4f} in {row['seconds']:.0f} s",
                    flush=True,
                )
    return document


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="results; a run that was cut goes on from here")
    parser.add_argument("--plot", type=Path, help="PNG")
    parser.add_argument("--table", type=Path, help="the tables as Markdown")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    parser.add_argument("--heldout-bytes", type=int, default=SETTINGS["heldout_bytes"])
    parser.add_argument("--methods", help="some of them, by name, separated by semicolons")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--report", action="store_true", help="train nothing; table and plot of the file")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.steps < 10:
        parser.error("--seeds must be at least 1 and --steps at least 10")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.report:
        document = json.loads(options.json.read_text(encoding="utf-8"))
    else:
        names = [m.name for m in METHODS] if options.methods is None else options.methods.split(";")
        unknown = [name for name in names if name not in [m.name for m in METHODS]]
        if unknown:
            parser.error(f"there is no method {unknown[0]!r}; expected some of {'; '.join(m.name for m in METHODS)}")
        settings = SETTINGS | {"steps": options.steps, "heldout_bytes": options.heldout_bytes}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                document = run([method_named(name) for name in names], options.seeds, settings, options.json)
        except ValueError as error:
            parser.error(str(error))
    document["comparisons"] = comparisons(document)
    print("\n" + table(document))
    if options.table is not None:
        options.table.write_text(table(document) + "\n", encoding="utf-8")
        print(f"\nwritten: {options.table}")
    if options.plot is not None:
        plot(document, options.plot)
        print(f"\nwritten: {options.plot}")
    apart = [c for c in document["comparisons"] if c["first"][0] == c["second"][0] and not c["equal"]]
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
