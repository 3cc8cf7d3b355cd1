"""What is made of a results document: CSV, plots, a comparison with an older run, and README's table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from .suite import duration

NOISE = 0.05  # beyond both runs' A/A spreads, a change below this is not called one


def write_csv(document: dict, file: Path) -> None:
    """One line per row and candidate: section, row, candidate, seconds (or value), its ratio to ours."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as stream:
        out = csv.writer(stream)
        out.writerow(
            (
                "section",
                "row",
                "candidate",
                "seconds",
                "value",
                "unit",
                "over_ours",
                "a_a_spread",
                "of_copy",
                "of_matmul",
            )
        )
        for row in document["rows"]:
            for name, seconds in row.get("seconds", {}).items() if "speedup" in row else ():
                own = name not in row["speedup"]
                shares = (row.get("of_copy"), row.get("of_matmul")) if own else (None, None)
                out.writerow(
                    (
                        row["section"],
                        row["row"],
                        name,
                        seconds,
                        None,
                        "s",
                        row["speedup"].get(name, 1.0),
                        row["a_a_spread"],
                        *shares,
                    )
                )
            for name, value in row.get("values", {}).items():
                out.writerow((row["section"], row["row"], name, None, value, row["unit"], None, None, None, None))
    temporary.replace(file)


def compare(new: dict, old: dict) -> tuple[list[str], int]:
    """Lines about the rows both runs have, slowest change first, and how many of them are regressions.

    A machine that is slower today is slower for the peers too, so ours is judged by what it did beyond the median of
    the row's peers. A change counts where it exceeds both runs' A/A spreads and NOISE.
    """
    before = {(r["section"], r["row"]): r for r in old["rows"] if "speedup" in r}
    found = []
    for row in new["rows"]:
        former = before.get((row["section"], row["row"]))
        if former is None or "speedup" not in row:
            continue
        change = _ours(row) / _ours(former)
        peers = sorted(row["seconds"][n] / former["seconds"][n] for n in row["speedup"] if n in former["seconds"])
        machine = peers[len(peers) // 2] if peers else 1.0
        noise = max(row["a_a_spread"], former["a_a_spread"], NOISE)
        found.append((change / machine, change, machine, noise, row))
    found.sort(key=lambda item: -item[0])
    lines, regressions = [], 0
    for relative, change, machine, noise, row in found:
        verdict = "same"
        if relative > 1 + noise:
            verdict, regressions = "SLOWER", regressions + 1
        elif relative < 1 / (1 + noise):
            verdict = "faster"
        lines.append(
            f"{verdict:7} {row['section']}: {row['row']}: {duration(_ours(row))}, {change - 1:+.1%}"
            f" (peers {machine - 1:+.1%}, noise {noise:.1%})"
        )
    for key in ("cpu", "threads", "isa"):
        if new["environment"][key] != old["environment"][key]:
            lines.insert(0, f"note: {key} was {old['environment'][key]}, is {new['environment'][key]}")
    return lines, regressions


def _ours(row: dict) -> float:
    return next(seconds for name, seconds in row["seconds"].items() if name not in row["speedup"])


def read(file: Path) -> dict:
    """A results document; ValueError says what is wrong with the file."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not a results file: {error}; `pyfastpeft bench --json FILE` writes one") from None
    if not isinstance(document, dict) or not {"environment", "rows", "limits"} <= document.keys():
        raise ValueError(
            f"{file} is not a results file of this suite: expected the keys environment, limits and rows; "
            "`pyfastpeft bench --json FILE` writes one"
        )
    return document


def plot(document: dict, folder: Path) -> list[Path]:
    """ratios.png: ours over each peer, by row. roofline.png: rows with counted work under the machine's two limits.
    optimizer_budget.png: a step of a paged optimizer against the memory its state may take."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    e = document["environment"]
    machine = f"{e['cpu']}, {e['threads']} threads, {e['isa']}, commit {e['commit']}"
    files = []
    rows = [r for r in document["rows"] if r.get("speedup")]
    if rows:
        peers = sorted({name for r in rows for name in r["speedup"]})
        figure, axes = pyplot.subplots(figsize=(11, 0.34 * len(rows) + 2))
        for p, name in enumerate(peers):
            at = [i for i, r in enumerate(rows) if name in r["speedup"]]
            height = 0.8 / len(peers)
            axes.barh(
                [i + (p - len(peers) / 2) * height for i in at],
                [rows[i]["speedup"][name] for i in at],
                height,
                label=name,
            )
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yticks(range(len(rows)), [f"{r['section']}: {r['row']}" for r in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("the peer's time over ours (right of 1: ours is faster)")
        axes.set_title(machine, fontsize=9)
        axes.legend(fontsize=7)
        files.append(_save(figure, folder / "ratios.png"))
    counted = [r for r in document["rows"] if "flops" in r and "moved_bytes" in r]
    if counted:
        figure, axes = pyplot.subplots(figsize=(8, 5.5))
        bandwidth = document["limits"]["copy_bytes_per_second"]
        peak = document["limits"]["matmul_bfloat16_flops_per_second"]
        intensities = [r["flops"] / r["moved_bytes"] for r in counted]
        low, high = min(intensities) / 2, max(intensities) * 2
        xs = [low * (high / low) ** (i / 99) for i in range(100)]
        axes.plot(
            xs, [min(peak, bandwidth * x) for x in xs], color="black", label="copy bandwidth | torch's bf16 matmul"
        )
        for r, x in zip(counted, intensities, strict=True):
            axes.plot(x, r["flops"] / _ours(r), "o", color="tab:blue", markersize=5)
            axes.annotate(r["row"], (x, r["flops"] / _ours(r)), fontsize=6, xytext=(4, -8), textcoords="offset points")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("operations per byte moved")
        axes.set_ylabel("operations per second")
        axes.set_title(machine, fontsize=9)
        axes.legend(fontsize=8)
        files.append(_save(figure, folder / "roofline.png"))
    for r in document["rows"]:
        if not r.get("budget_curve"):
            continue
        points = sorted(r["budget_curve"], key=lambda point: point["share"])
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for name in points[0]:
            if name != "share":
                axes.plot([100 * p["share"] for p in points], [p[name] for p in points], "o-", label=name)
        if {"disk alone", "AdamW in memory"} <= points[0].keys():
            bound = [max(p["disk alone"], p["AdamW in memory"]) for p in points]
            axes.plot([100 * p["share"] for p in points], bound, "k--", label="bound: the slower of disk and AdamW")
        axes.set_xlabel("share of the optimizer's state that is in memory, %")
        axes.set_ylabel("seconds per step")
        axes.set_ylim(bottom=0)
        axes.set_title(f"{r['state_bytes'] / 1e6:.0f} MB of state; {machine}", fontsize=9)
        axes.legend(fontsize=8)
        files.append(_save(figure, folder / "optimizer_budget.png"))
    return files


def _save(figure, file: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return file
