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
PEERS = (
    "bitsandbytes eval",
    "bitsandbytes kernel",
    "bitsandbytes 8-bit",
    "bitsandbytes",
    "peft",
    "torch fused",
    "torch",
)


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def table(document: dict) -> str:
    """One line per row that has a peer: ours beside the fastest of the peers."""
    lines = ["| work | ours | the best peer | ratio |", "|---|---|---|---|"]
    for row in document["rows"]:
        seconds = row.get("seconds", {})
        peers = [n for n in seconds if n in PEERS or n.split(", ")[-1] in ("peft", "peft + bitsandbytes")]
        if "speedup" not in row or not peers:
            continue
        ours, best = next(n for n in seconds if n not in row["speedup"]), min(peers, key=seconds.get)
        ratio = seconds[best] / seconds[ours]
        label = best.rpartition(", ")[2]
        shown = f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×"
        work = row["row"].removesuffix(f", {label}")
        lines.append(
            f"| {row['section']}: {work} | {_time(seconds[ours])} | {_time(seconds[best])} ({label}) | {shown} |"
        )
    return "\n".join(lines)


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
