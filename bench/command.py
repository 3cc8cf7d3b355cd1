"""`pyfastpeft bench`: options checked before anything is measured, results written after."""

from __future__ import annotations

from pathlib import Path

from . import report
from .suite import SECTIONS, Suite, write_json


def section_list() -> str:
    width = max(map(len, SECTIONS))
    return "".join(f"{name:{width}}  {what}\n" for name, (_, what) in SECTIONS.items())


def run(
    sections: list[str],
    *,
    quick: bool,
    rounds: int,
    threads: int | None,
    json_file: Path | None,
    csv_file: Path | None,
    plots: Path | None,
    compare: Path | None,
) -> int:
    """Runs the sections (all if none is named); the exit code: 0, or 1 for a failed check or a regression."""
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        raise ValueError(f"there is no section {unknown[0]!r}; expected some of {', '.join(SECTIONS)}")
    if rounds < 3:
        raise ValueError(f"--rounds is {rounds}, expected at least 3: a median of fewer says nothing")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads is {threads}, expected 1 or more")
    old = None if compare is None else report.read(compare)
    suite = Suite(rounds=min(rounds, 7) if quick else rounds, quick=quick, threads=threads)
    suite.run([name for name in SECTIONS if name in sections] or list(SECTIONS))
    print(f"\n{len(suite.document['rows'])} rows in {suite.document['seconds']} s")
    if json_file is not None:
        write_json(suite.document, json_file)
    if csv_file is not None:
        report.write_csv(suite.document, csv_file)
    files = [file for file in (json_file, csv_file) if file is not None]
    if plots is not None:
        files += report.plot(suite.document, plots)
    for file in files:
        print(f"written: {file}")
    regressions = 0
    if old is not None:
        lines, regressions = report.compare(suite.document, old)
        print(f"\nagainst {compare} (commit {old['environment'].get('commit')}):")
        print("\n".join("  " + line for line in lines) or "  no row in common")
    for failure in suite.failures:
        print(f"CHECK FAILED: {failure}")
    return 1 if suite.failures or regressions else 0
