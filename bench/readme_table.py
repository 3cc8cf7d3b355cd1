"""README's table of speeds, written from a results file between two marks; `--check` says whether it is the one there.

python bench/readme_table.py bench/results/FILE.json [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- speeds: made by bench/readme_table.py from {} -->", "<!-- speeds: end -->"
PLAIN = ("dense", "base", "frozen base")  # the layer or model without what is measured: not a peer but a measure

# (section, row, what the table calls it): the rows that a newcomer asks for; the file has the others
LINES = (
    ("quantise", "4096x4096 bfloat16 nf4", "NF4 quantise, 4096×4096 bf16"),
    ("dequantise", "4096x4096 into a given tensor", "dequantise into a given bf16 tensor, 4096×4096"),
    ("dequantise", "4096x14336 into a given tensor", "the same, 4096×14336"),
    *(("matmul", f"M {m} bfloat16 forward", f"NF4 linear 4096×4096, bf16, {m} token{'s'[: m > 1]}, forward")
      for m in (1, 4, 16, 64, 512)),
    *(("matmul", f"M {m} bfloat16 forward + backward", f"NF4 linear 4096×4096, bf16, {m} tokens, forward + backward")
      for m in (16, 128, 512)),
    *(("lora", f"M 2048 N 1024 K 1024 R 16 bfloat16 dropout {p} forward + backward",
       f"LoRA linear 1024×1024, r = 16, 2048 tokens, bf16, dropout {p}, forward + backward") for p in (0.0, 0.1)),
    ("lora", "M 512 N 4096 K 4096 R 16 bfloat16 dropout 0.0 forward + backward",
     "LoRA linear 4096×4096, r = 16, 512 tokens, bf16, forward + backward"),
    ("ia3", "1024x4096 bfloat16 forward + backward", "(IA)³ scale, 1024×4096 bf16, forward + backward"),
    ("step", "LoRA step, 6 layers, 4x256 tokens", "LoRA training step, 84 M-parameter Llama shape, 4×256 tokens, bf16"),
    ("step", "QLoRA step, 6 layers, 4x256 tokens", "QLoRA training step, the same"),
    ("optimizer", "one tensor of 32 M values, fp32 state", "AdamW step, 32 M values"),
    ("optimizer", "448 matrices of 16x4096, fp32 state", "AdamW step, 448 LoRA matrices of 16×4096"),
    ("optimizer", "10,000 tensors of 256 values, fp32 state", "AdamW step, 10,000 tensors of 256 values"),
    ("optimizer", "one tensor of 32 M values, 8-bit state", "AdamW step, 32 M values, 8-bit state"),
)  # fmt: skip


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×"


def line(row: dict, work: str) -> str:
    """Ours beside the fastest of the peers, and beside the plain layer where the row has one."""
    seconds = row["seconds"]
    ours = next(name for name in seconds if name not in row["speedup"])
    plain = next((name for name in PLAIN if name in seconds), None)
    best = min((n for n in seconds if n not in (ours, plain, "full fine-tuning") and "ours" not in n), key=seconds.get)
    beside = "" if plain is None else f"{_ratio(seconds[plain] / seconds[ours])} {plain}"
    peer = f"{_time(seconds[best])} ({best.rpartition(', ')[2]})"
    return f"| {work} | {_time(seconds[ours])} | {peer} | {_ratio(seconds[best] / seconds[ours])} | {beside} |"


def table(document: dict, lines: tuple = LINES) -> str:
    """A table of these rows; KeyError names the first row that the file has not, or did not time."""
    rows = {(row["section"], row["row"]): row for row in document["rows"] if "speedup" in row}
    made = ["| work | ours | the best peer | ratio | beside no adapter, no 4 bits |", "|---|---|---|---|---|"]
    return "\n".join(made + [line(rows[section, row], work) for section, row, work in lines])


def text(file: Path) -> str:
    document = json.loads(file.read_text(encoding="utf-8"))
    e = document["environment"]
    versions = ", ".join(f"{name} {e[name]}" for name in ("torch", "bitsandbytes", "peft") if e.get(name))
    where = (
        f"{e['cores']} cores of an {e['cpu']} ({e['isa']}, {e['threads']} threads), {versions}, commit {e['commit']}"
    )
    return f"Measured on {where}; a ratio above 1 is in our favour.\n\n{table(document)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where README differs")
    options = parser.parse_args()
    begin = BEGIN.format(options.results.resolve().relative_to(README.parent).as_posix())
    before = README.read_text(encoding="utf-8")
    head, mark, rest = before.partition(BEGIN.split("{")[0])
    if not mark or END not in rest:
        raise SystemExit(f"{README} has no marks {BEGIN!r} … {END!r}")
    after = f"{head}{begin}\n{text(options.results)}\n{END}{rest.partition(END)[2]}"
    if options.check:
        if after != before:
            print(
                f"README's table is not the one of {options.results}; run python bench/readme_table.py {options.results}"
            )
        return int(after != before)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
