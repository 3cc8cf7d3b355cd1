"""`pyfastpeft bench`: rows, refusals, files, comparison; timings themselves are never asserted."""

import csv
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pyfastpeft import _bench
from pyfastpeft.cli import app

_bench.load()
from pyfastpeft.bench import (  # noqa: E402
    bench_methods,
    bench_scaling,
    command,
    methods_table,
    quality,
    readme_table,
    report,
    suite,
    targets_table,
)


@pytest.fixture
def quick(monkeypatch):
    """A suite that measures its limits on nothing large."""
    monkeypatch.setattr(
        suite,
        "limits",
        lambda: {
            "copy_bytes_per_second": 1e10,
            "matmul_bfloat16_flops_per_second": 1e12,
            "matmul_float32_flops_per_second": 1e11,
        },
    )
    return suite.Suite(rounds=3, quick=True)


def test_a_row(quick, capsys):
    x = torch.ones(1000)
    quick._section = "ia3"
    row = quick.compare(
        "add", {"ours": lambda: x + 1, "peer": lambda: x + 2, "absent": None}, moved_bytes=8000, flops=1000
    )
    assert set(row["seconds"]) == {"ours", "peer"} and set(row["speedup"]) == {"peer"}
    assert row["seconds"]["ours"] > 0 and row["rounds"] >= 3 and row["a_a_spread"] >= 0
    assert row["of_copy"] == pytest.approx(8000 / row["seconds"]["ours"] / 1e10)
    assert "x peer" in capsys.readouterr().out


def test_a_red_check_prints_no_timing_and_fails_the_run(quick, capsys, monkeypatch):
    def wrong():
        raise AssertionError("error 3, torch's 1")

    called = []
    assert quick.compare("sum", {"ours": lambda: called.append(1)}, check=wrong) is None
    assert not called and quick.failures and quick.document["rows"][-1]["failed"] == "error 3, torch's 1"
    out = capsys.readouterr().out
    assert "CHECK FAILED, not timed" in out and " ms" not in out and " us" not in out
    monkeypatch.setattr(command, "Suite", lambda **options: quick)
    monkeypatch.setattr(quick, "run", lambda names: quick.document.update(seconds=0))
    options = dict.fromkeys(("threads", "json_file", "csv_file", "plots", "compare"))
    assert command.run(["ia3"], quick=True, rounds=3, **options) == 1


def document(**seconds):
    rows = [
        {"section": "s", "row": name, "seconds": {"ours": ours, "peer": peer}, "speedup": {"peer": peer / ours}, "a_a_spread": 0.01,
         "flops": 10, "moved_bytes": 5}
        for name, (ours, peer) in seconds.items()
    ]  # fmt: skip
    environment = {"cpu": "c", "threads": 2, "isa": "scalar", "commit": "0", "cores": 2, "torch": "2"}
    limits = {"copy_bytes_per_second": 1.0, "matmul_bfloat16_flops_per_second": 2.0}
    return {"environment": environment, "limits": limits, "rows": rows}


def test_comparison_flags_what_became_slower_than_the_machine_did():
    old = document(slow=(1.0, 1.0), machine=(1.0, 1.0), fast=(1.0, 1.0), noise=(1.0, 1.0), gone=(1.0, 1.0))
    new = document(slow=(1.3, 1.0), machine=(1.3, 1.3), fast=(0.5, 1.0), noise=(1.04, 1.0), fresh=(1.0, 1.0))
    lines, regressions = report.compare(new, old)
    assert regressions == 1 and len(lines) == 4
    verdicts = {line.split(": ")[1]: line.split()[0] for line in lines}
    assert verdicts == {"slow": "SLOWER", "machine": "same", "noise": "same", "fast": "faster"}
    new["environment"]["isa"] = "avx2"
    assert report.compare(new, old)[0][0] == "note: isa was scalar, is avx2"


def test_files(tmp_path):
    made = document(a=(1.0, 2.0))
    made["rows"].append({"section": "m", "row": "peak", "values": {"ours": 3.0, "peer": None}, "unit": "MB"})
    report.write_csv(made, tmp_path / "r.csv")
    rows = list(csv.DictReader(open(tmp_path / "r.csv", encoding="utf-8")))
    assert [(r["candidate"], r["seconds"], r["value"]) for r in rows] == [
        ("ours", "1.0", ""), ("peer", "2.0", ""), ("ours", "", "3.0"), ("peer", "", ""),
    ]  # fmt: skip
    suite.write_json(made, tmp_path / "deep" / "r.json")
    assert report.read(tmp_path / "deep" / "r.json") == made
    for file in report.plot(made, tmp_path / "plots"):
        assert file.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("**/*.tmp"))


def test_table_names_the_fastest_peer():
    made = document(row=(1e-3, 2e-3))
    made["rows"][0]["seconds"] = {"ours": 1e-3, "bitsandbytes": 4e-3, "bitsandbytes eval": 0.5e-3, "dense": 1e-4}
    made["rows"][0]["speedup"] = {"bitsandbytes": 4.0, "bitsandbytes eval": 0.5, "dense": 0.1}
    assert readme_table.table(made, (("s", "row", "a layer"),)).splitlines()[2:] == [
        "| a layer | 1.00 ms | 500 µs (bitsandbytes eval) | 0.50× | 0.10× dense |"
    ]
    with pytest.raises(KeyError, match="another row"):
        readme_table.table(made, (("s", "another row", "a layer"),))


def test_methods_are_measured(quick, monkeypatch):
    monkeypatch.setattr(bench_methods, "METHODS", [bench_methods.method_named("BitFit")])
    for name, value in (("LAYERS", 1), ("BATCH", 1), ("TOKENS", 16)):
        monkeypatch.setattr(bench_methods, name, value)
    monkeypatch.setattr(bench_methods, "_memory", lambda names: dict.fromkeys(names, 7.0))
    bench_methods.run(quick)
    (row,) = quick.document["rows"]
    assert not quick.failures and set(row["seconds"]) == {"ours", "torch"} == set(row["peak_mb"])
    assert row["parameters"]["ours"] == row["parameters"]["torch"] > 0
    assert row["file_bytes"]["ours"] > 4 * row["parameters"]["ours"] and row["file_bytes"]["torch"] is None


def test_table_of_methods(tmp_path, monkeypatch):
    e = {"cores": 2, "cpu": "C", "isa": "avx2", "threads": 1, "torch": "2", "commit": "c"}
    sizes = {"parameters": {"ours": 1234, "peft": 1234}, "file_bytes": {"ours": 5000, "peft": 5000}}
    peaks = {"peak_mb": {"ours": 10.0, "peft": 20.4}}
    rows = [
        {"section": "methods", "row": "L", "method": "LoRA", "seconds": {"ours": 0.01, "peft": 0.02}} | sizes | peaks,
        {"section": "methods", "row": "R", "method": "R", "seconds": {"ours": 0.3}, "peak_mb": {"ours": None}} | sizes,
    ]
    for row in rows:
        row["speedup"] = {}
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"environment": e, "rows": rows}))
    monkeypatch.setattr(methods_table, "README", tmp_path / "README.md")
    made = methods_table.replaced(
        "a <!-- methods: made by bench/methods_table.py from x -->old<!-- methods: end --> b", file
    )
    assert made.startswith("a <!-- methods: made by bench/methods_table.py from r.json -->\nA training step")
    assert "old" not in made and made.endswith("\n<!-- methods: end --> b")
    assert "| LoRA | 1,234 | 5 kB | 10 MB / 20 MB | 10 ms / 20 ms | 2.00× | PEFT |" in made
    assert "| R | 1,234 | 5 kB |  | 300 ms |  |  |" in made
    with pytest.raises(SystemExit, match="has no marks"):
        methods_table.replaced("no marks", file)


def test_exponent():
    assert bench_scaling.exponent({n: 3.0 * n**1.5 for n in (1, 2, 4, 8, 16)}) == pytest.approx(1.5)
    assert bench_scaling.exponent({1: 2.0, 2: 1.0}) == pytest.approx(-1.0)


def test_bad_options(tmp_path):
    def run(*arguments):
        result = CliRunner().invoke(app, ["bench", *arguments])
        return result.exit_code, result.output

    code, out = run("matmull")
    assert code != 0 and "no section 'matmull'" in out and "matmul" in out
    code, out = run("--rounds", "2", "ia3")
    assert code != 0 and "--rounds is 2" in out
    code, out = run("--threads", "0", "ia3")
    assert code != 0 and "--threads is 0" in out
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({"rows": []}))
    code, out = run("--compare", str(wrong), "ia3")
    assert code != 0 and "not a results file" in out
    wrong.write_text("{")
    code, out = run("--compare", str(wrong), "ia3")
    assert code != 0 and "not a results file" in out
    code, out = run("--list")
    assert code == 0 and all(name in out for name in suite.SECTIONS)


def test_one_section_end_to_end(tmp_path):
    result = CliRunner().invoke(
        app, ["bench", "ia3", "--quick", "--threads", str(torch.get_num_threads()), "--json", str(tmp_path / "r.json")]
    )
    assert result.exit_code == 0, result.output
    made = report.read(tmp_path / "r.json")
    assert {row["section"] for row in made["rows"]} == {"ia3"} and made["limits"]["copy_bytes_per_second"] > 1e8
    assert torch.__version__.startswith(made["environment"]["torch"])


def test_quality_of_a_method(tmp_path, capsys):
    """Two seeds of one method beside plain torch: rows, the test, a table, a plot; a second call trains nothing."""
    pytest.importorskip("transformers")
    file, picture = tmp_path / "q.json", tmp_path / "q.png"
    how = ["--json", str(file), "--plot", str(picture), "--steps", "10", "--heldout-bytes", "1024"]
    assert quality.main([*how, "--seeds", "2", "--methods", "BitFit"]) == 0
    made = json.loads(file.read_text())
    assert [(r["implementation"], r["seed"]) for r in made["runs"]] == [
        ("ours", 0), ("torch", 0), ("ours", 1), ("torch", 1)
    ]  # fmt: skip
    assert all(r["heldout_loss"] < made["base_loss"] and len(r["train_losses"]) == 10 for r in made["runs"])
    assert made["comparisons"][0]["equal"] and picture.stat().st_size > 1000
    assert "| BitFit | 0.001 |" in capsys.readouterr().out
    made["runs"][0]["heldout_loss"] += 1.0
    file.write_text(json.dumps(made))
    assert quality.main([*how, "--seeds", "2", "--methods", "BitFit"]) == 0
    assert json.loads(file.read_text())["runs"] == made["runs"]
    made["runs"][2]["heldout_loss"] += 1.0
    file.write_text(json.dumps(made))
    assert quality.main([*how, "--report"]) == 1
    for wrong in (["--methods", "Lora"], ["--seeds", "0"], ["--steps", "12"]):
        with pytest.raises(SystemExit):
            quality.main([*how, *wrong])
    assert "there is no method 'Lora'" in (errors := capsys.readouterr().err) and "was made with" in errors


def test_the_table_of_targets_marks_what_was_met():
    row = {"section": "matmul", "row": "M 16 bfloat16 forward", "a_a_spread": 0.01, "of_copy": 0.1, "of_matmul": 0.6,
           "speedup": {"bitsandbytes": 5.0, "bitsandbytes eval": 2.0, "dense": 1.095}}  # fmt: skip
    aim = ("work", "matmul", "M 16 bfloat16 forward", [("peers", 3), ("dense", 1.1)], None)
    # the best peer decides; 1.095 is 1.1 within the spread
    assert targets_table.cells({"rows": [row]}, aim) == "2.00×, **1.09×**, 60% of matmul, A/A 1.0%"
    assert targets_table.cells({"rows": [{**row, "a_a_spread": 0.001}]}, aim).startswith("2.00×, 1.09×")
    assert targets_table.cells({"rows": []}, aim) == "–"
    assert targets_table.aims((*aim[:4], 0.6)) == "3× best peer, 1.1× dense, 60% of copy"
    assert targets_table.cells({"rows": [row]}, (*aim[:3], [], 0.6)) == "10% of copy, 60% of matmul, A/A 1.0%"
    with_share = targets_table.cells({"rows": [{**row, "of_copy": 0.7}]}, (*aim[:3], [], 0.6))
    assert with_share.startswith("**70% of copy**")


def test_every_target_has_a_row_in_the_committed_results():
    document = json.loads(
        (Path(__file__).resolve().parents[2] / "bench" / "results" / "zen4.json").read_text(encoding="utf-8")
    )
    rows = {(row["section"], row["row"]) for row in document["rows"]}
    missing = [aim[0] for aim in targets_table.AIMS if (aim[1], aim[2]) not in rows]
    assert not missing
