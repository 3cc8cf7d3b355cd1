"""README's table of methods, written from a results file between two marks.

    pyfastpeft bench methods --json bench/results/methods.json
    python bench/methods_table.py bench/results/methods.json [--check]

--check changes nothing and exits with 1 where README's table is another one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- methods: made by bench/methods_table.py from {} -->", "<!-- methods: end -->"
PEERS = {"peft": "PEFT", "peft + bitsandbytes": "PEFT + bitsandbytes", "torch": "plain torch"}


def table(document: dict) -> str:
    """One line per method, "ours / the peer's" where the two differ."""
    lines = [
        "| method | trained parameters | adapter file | peak memory of a step | step | ratio | beside |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        if row["section"] == "methods" and "seconds" in row:
            lines.append(_line(row))
    return "\n".join(lines)


def _line(row: dict) -> str:
    peer = next((name for name in row["seconds"] if name != "ours"), None)
    ours, theirs = row["seconds"]["ours"], row["seconds"].get(peer)
    cells = [
        row["method"],
        f"{row['parameters']['ours']:,}",
        _both(row["file_bytes"], peer, _size),
        _both(row["peak_mb"], peer, lambda megabytes: f"{megabytes:.0f} MB"),
        _both(row["seconds"], peer, lambda seconds: f"{seconds * 1e3:.0f} ms"),
        "" if theirs is None else f"{theirs / ours:.2f}×",
        PEERS.get(peer, ""),
    ]
    return "| " + " | ".join(cells) + " |"


def _both(values: dict, peer: str | None, shown: Callable[[float], str]) -> str:
    texts = [shown(values[name]) for name in ("ours", peer) if values.get(name) is not None]
    return " / ".join(dict.fromkeys(texts))


def _size(size: float) -> str:
    return f"{size / 1e3:,.0f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"


def text(document: dict) -> str:
    e = document["environment"]
    versions = ", ".join(f"{name} {e[name]}" for name in ("torch", "bitsandbytes", "peft") if e.get(name))
    return (
        f"A training step of a Llama shape of 29 M parameters (hidden 1024, 2 layers), 4×256 tokens, bf16, on {e['cores']} "
        f"cores of an {e['cpu']} ({e['isa']}, {e['threads']} threads), {versions}, commit {e['commit']}; ours / the "
        f"peer's, memory with the weights, a ratio above 1 in our favour.\n\n{table(document)}"
    )


def replaced(before: str, file: Path) -> str:
    """README's text with the table of the file in place of the former one; SystemExit where its marks are missing."""
    begin = BEGIN.format(file.resolve().relative_to(README.parent).as_posix())
    head, mark, rest = before.partition(BEGIN.split("{")[0])
    if not mark or END not in rest:
        raise SystemExit(f"{README} has no marks {begin!r} … {END!r}")
    document = json.loads(file.read_text(encoding="utf-8"))
    return f"{head}{begin}\n{text(document)}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where README differs")
    options = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = replaced(before, options.results)
    if options.check:
        if after != before:
            print(f"README's table is not the one of {options.results}; run it without --check")
        return int(after != before)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
