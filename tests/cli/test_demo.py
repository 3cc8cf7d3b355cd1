"""The demo with a few steps: every stage runs, says what it measured, and leaves its files."""

import json
import re

from typer.testing import CliRunner

from pyfastpeft.cli import app
from pyfastpeft.finetune.demo import PROMPT


def test_demo_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr("pyfastpeft.finetune.demo.SAMPLE_TOKENS", 30)
    out = tmp_path / "demo"
    arguments = ["finetune", "--demo", "--output", out, "--max-steps", 3, "--demo-eval-bytes", 4200, "--threads", 1]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    text = done.stdout
    rows = re.findall(r"│ (NF4 base|with the adapter|merged)[^│]*│ +([\d.]+) │ +([\d.]+) │", text)
    assert [row[0] for row in rows] == ["NF4 base", "with the adapter", "merged"]
    before, after, merged = ([float(value) for value in row[1:]] for row in rows)
    assert after[0] < before[0] and 1.5 < before[0] < 10  # three steps are enough to see it move
    assert abs(merged[0] - after[0]) < 0.1 * after[0]
    assert "to the last bit" in text and "away from the original" in text
    assert text.count(f"  | {PROMPT.rstrip()}") == 3  # a sample before, after, and merged
    files = ["loss.png", "metrics.csv", "run.json", "adapter_model.safetensors", "merged/model.safetensors"]
    assert all((out / name).is_file() for name in files)
    assert str(out / "loss.png") in text
    record = json.loads((out / "run.json").read_text())
    assert (
        record["status"] == "complete" and record["options"]["method"] == "qlora" and record["options"]["double_quant"]
    )


def test_demo_does_not_replace_somebody_elses_run(tmp_path):
    (tmp_path / "run.json").write_text('{"base_model": "mine"}')
    done = CliRunner().invoke(app, ["finetune", "--demo", "--output", str(tmp_path), "--max-steps", "3"])
    assert done.exit_code == 2 and "holds an earlier run" in " ".join(done.stderr.split())
    assert (tmp_path / "run.json").read_text() == '{"base_model": "mine"}'
