"""Does AdamW with 8-bit state follow AdamW with 32-bit state? The demo's model, from English to Python source.

    python bench/eight_bit_state.py --json bench/results/eight_bit_state.json

QLoRA as the demo trains it, and the whole model; each seed decides the order of the text and the adapter's initial values.
Compared are the mean training losses of every quarter of the run and the loss on held-out text, in nats per byte, by the
test of quality.py: equal within the noise of seeds where |m₁ − m₂| ≤ 2 √(s₁² / n + s₂² / n). One thread; a run that was cut
goes on from its results file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "bench"

import torch
from torch import nn

from .measure import environment
from .quality import Texts, base_model, compare, heldout_loss, labels_of

SETTINGS = {"steps": 120, "batch": 4, "length": 128, "heldout_bytes": 16384, "dtype": "float32"}
RATES = {"QLoRA": 4e-3, "full": 5e-4}
QUARTERS = 4


def model_of(kind: str, seed: int) -> nn.Module:
    import pyfastpeft as pf

    base = base_model(SETTINGS["dtype"])
    torch.manual_seed(seed)
    if kind == "full":
        return base
    pf.quantize_model(base, double_quant=True)
    return pf.get_peft_model(base, pf.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def train(kind: str, bits: int, seed: int, texts: Texts) -> dict:
    import pyfastpeft as pf

    begun, steps = time.monotonic(), SETTINGS["steps"]
    model = model_of(kind, seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = pf.optim.AdamW(parameters, lr=RATES[kind], state_bits=bits)
    model.train()
    losses = []
    for step, ids in enumerate(texts.batches(seed, steps)):
        optimizer.param_groups[0]["lr"] = RATES[kind] * (1 - step / steps)
        loss = model(input_ids=ids, labels=labels_of(ids), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
    in_8_bits = sum(p.numel() for p in parameters if "state1" in optimizer.state[p])
    return {
        "kind": kind,
        "bits": bits,
        "seed": seed,
        "heldout_loss": heldout_loss(model, texts.heldout),
        "train_losses": losses,
        "parameters": sum(p.numel() for p in parameters),
        "share_in_8_bits": round(in_8_bits / sum(p.numel() for p in parameters), 4),
        "seconds": round(time.monotonic() - begun, 2),
    }


def comparisons(document: dict) -> dict:
    """kind → what is compared → quality.compare's result for 8 bits beside 32."""
    length = SETTINGS["steps"] // QUARTERS
    measures = {"held-out": lambda run: run["heldout_loss"]}
    for i in range(QUARTERS):
        cut = slice(i * length, (i + 1) * length)
        measures[f"quarter {i + 1}"] = lambda run, cut=cut: statistics.fmean(run["train_losses"][cut])
    found: dict = {}
    for kind in RATES:
        runs = {bits: [r for r in document["runs"] if (r["kind"], r["bits"]) == (kind, bits)] for bits in (8, 32)}
        for name, of in measures.items():
            result = compare(*({run["seed"]: of(run) for run in runs[bits]} for bits in (8, 32)))
            if result is not None:
                found.setdefault(kind, {})[name] = result
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    document = {"settings": SETTINGS, "rates": RATES, "environment": environment(), "runs": []}
    if arguments.json.exists():
        document |= {"runs": json.loads(arguments.json.read_text())["runs"]}
    texts = Texts(SETTINGS["batch"], SETTINGS["length"], SETTINGS["heldout_bytes"])
    done = {(run["kind"], run["bits"], run["seed"]) for run in document["runs"]}
    for seed in range(arguments.seeds):
        for kind in RATES:
            for bits in (32, 8):
                if (kind, bits, seed) not in done:
                    document["runs"].append(train(kind, bits, seed, texts))
                    document["comparisons"] = comparisons(document)
                    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
                    print(*(f"{k} {v}" for k, v in document["runs"][-1].items() if k != "train_losses"), flush=True)
    for kind, found in document["comparisons"].items():
        for name, r in found.items():
            verdict = "equal" if r["equal"] else "NOT equal"
            print(f"{kind:6} {name:10} 8-bit {r['means'][0]:.4f}  32-bit {r['means'][1]:.4f}  "
                  f"difference {r['difference']:+.4f}  2 s.e. {2 * r['standard_error']:.4f}  {verdict}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
