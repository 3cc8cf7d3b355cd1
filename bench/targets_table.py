"""What was aimed at on a CPU beside what was measured, in one or more results files (one machine, other instruction sets).

python bench/targets_table.py bench/results/zen4.json bench/results/zen4_avx2.json > bench/results/targets.md

A ratio is the peer's time over ours, the share that of what the machine can do (its memory's bandwidth, or torch's matmul
rate), both of the row's own run. Where an instruction set is forced, it is ours alone that keeps to it. A target that is met is bold.
Where the share is near 100 % no kernel could be faster; torch's own product of dense matrices is the 100 % of the matmul
rate, and the better of a copy and an update in place that of the bandwidth.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PEERS = ("bitsandbytes", "bitsandbytes eval", "bitsandbytes kernel", "bitsandbytes 8-bit", "peft", "torchao")
BASE = "frozen base"
STEP = "step, 6 layers, 4x256 tokens"

# (work, section, row, [(beside, the ratio wanted)], the share wanted of copy bandwidth); "peers": the fastest of them
AIMS: list[tuple] = [
    *((f"NF4 linear 4096², bf16, M = {m}", "matmul", f"M {m} bfloat16 forward", [("peers", p), ("dense", d)], None)
      for m, p, d in ((1, 1.2, 2.5), (4, 1.8, 1.8), (16, 3, 1.1), (64, 5.5, 1.1), (128, 5, 1.3), (512, 2.7, 1.25),
                      (2048, 1.3, 1.15))),
    ("the same, M = 512, forward + backward", "matmul", "M 512 bfloat16 forward + backward",
     [("peers", 2.2), ("dense", 1.15)], None),
    ("NF4 quantise 4096², bf16", "quantise", "4096x4096 bfloat16 nf4", [("peers", 100)], 0.6),
    ("dequantise 4096² into a given tensor", "dequantise", "4096x4096 into a given tensor", [("peers", 2.2)], None),
    ("dequantise 4096×14336 into a given tensor", "dequantise", "4096x14336 into a given tensor", [], 0.8),
    ("dequantise 4096² into a new tensor", "dequantise", "4096x4096 into a new tensor", [("peers", 1.2)], None),
    ("nested dequantise 4096×14336", "dequantise", "4096x14336 nested into a given tensor", [("ours plain", 0.95)], None),
    ("LoRA step, 84 M Llama shape", "step", f"LoRA {STEP}", [(BASE, 1 / 1.1)], None),
    ("QLoRA step, the same", "step", f"QLoRA {STEP}", [(BASE, 1 / 1.1), ("QLoRA, peft + bitsandbytes", 1.5)], None),
    ("(IA)³ step, the same", "step", f"(IA)³ {STEP}", [(BASE, 1)], None),
    ("AdamW, 32 M values", "optimizer", "one tensor of 32 M values, fp32 state", [("torch fused", 1)], None),
    ("AdamW, 448 matrices of 16×4096", "optimizer", "448 matrices of 16x4096, fp32 state", [("torch fused", 1.1)], None),
    ("AdamW, 10,000 tensors of 256 values", "optimizer", "10,000 tensors of 256 values, fp32 state",
     [("torch fused", 5)], None),
    ("AdamW, 32 M values, 8-bit state", "optimizer", "one tensor of 32 M values, 8-bit state", [("torch fused", 1)],
     None),
]  # fmt: skip


def ratio(row: dict, beside: str) -> float | None:
    """The peer's time over ours; None where the peer was not there."""
    if beside == "peers":
        found = [row["speedup"][name] for name in PEERS if name in row["speedup"]]
        return min(found, default=None)
    return row["speedup"].get(beside)


def cells(document: dict, aim: tuple) -> str:
    """Measured ratios in the order of the aims, the shares, and the spread of ours against itself."""
    _, section, name, wanted, wanted_share = aim
    row = next((r for r in document["rows"] if (r["section"], r["row"]) == (section, name) and "speedup" in r), None)
    if row is None:
        return "–"
    spread, parts = row["a_a_spread"], []
    for beside, least in wanted:
        found = ratio(row, beside)
        # within the spread of ours against itself two times are equal; a wild spread excuses nothing
        text = "–" if found is None else f"{found:.2f}×" if found < 10 else f"{found:.0f}×"
        parts.append(f"**{text}**" if found is not None and found * (1 + min(spread, 0.02)) >= least else text)
    for key, of in (("of_copy", "of copy"), ("of_matmul", "of matmul")):
        if key in row and (row[key] >= 0.3 or (key == "of_copy" and wanted_share is not None)):
            text = f"{row[key]:.0%} {of}"
            met = key == "of_copy" and wanted_share is not None and row[key] >= wanted_share
            parts.append(f"**{text}**" if met else text)
    return ", ".join([*parts, f"A/A {spread:.1%}"])


def aims(aim: tuple) -> str:
    _, _, _, wanted, share = aim
    names = {"peers": "best peer", "QLoRA, peft + bitsandbytes": "PEFT + bitsandbytes"}
    parts = [f"{least:.3g}× {names.get(beside, beside)}" for beside, least in wanted]
    return ", ".join(parts + ([] if share is None else [f"{share:.0%} of copy"]))


def heading(document: dict) -> str:
    e, limits = document["environment"], document["limits"]
    forced = ", ".join(f"{name}={value}" for name, value in e.get("forced", {}).items())
    return (
        f"- **{e['isa']}{' forced' if forced else ''}**: {e['cores']} cores of an {e['cpu']}, {e['threads']} threads, "
        f"torch {e['torch']}, commit {e['commit']}{'; ' + forced if forced else ''}. Copy "
        f"{limits['copy_bytes_per_second'] / 1e9:.1f} GB/s, torch matmul bf16 "
        f"{limits['matmul_bfloat16_flops_per_second'] / 1e9:.0f} and fp32 "
        f"{limits['matmul_float32_flops_per_second'] / 1e9:.0f} GFLOP/s"
    )


def text(documents: list[dict]) -> str:
    lines = ["# CPU: what was aimed at, and what was measured", "", *__doc__.strip().splitlines()[4:], ""]
    lines += [*map(heading, documents), ""]
    lines.append("| work | aim | " + " | ".join(d["environment"]["isa"] for d in documents) + " |")
    lines.append("|---|---|" + "---|" * len(documents))
    lines += [f"| {aim[0]} | {aims(aim)} | " + " | ".join(cells(d, aim) for d in documents) + " |" for aim in AIMS]
    return "\n".join(lines)


if __name__ == "__main__":
    print(text([json.loads(Path(file).read_text(encoding="utf-8")) for file in sys.argv[1:]]))
