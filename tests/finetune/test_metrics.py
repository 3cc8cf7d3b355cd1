"""metrics.csv reads back exactly and survives a torn line; the picture; the progress line in both forms."""

import io

import pytest
from rich.console import Console

from pyfastpeft.finetune.checkpoint import TrainerState
from pyfastpeft.finetune.metrics import COLUMNS, MetricsLog, draw_losses, peak_memory
from pyfastpeft.finetune.progress import ProgressLine, duration


def test_rows_read_back_exactly(tmp_path):
    log = MetricsLog(tmp_path / "metrics.csv")
    log.add(step=0, eval_loss=1 / 3, eval_perplexity=float("inf"))
    log.add(step=1, tokens=5, train_loss=0.1 + 0.2)
    log.add(step=2, tokens=10, train_loss=2e-300)
    log.close()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3,1.0,15,0.")  # a process was killed here
    again = MetricsLog(tmp_path / "metrics.csv", upto=1)
    assert again.rows == log.rows[:2]
    again.close()
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
    assert MetricsLog(tmp_path / "metrics.csv").rows == []


def test_torn_line_with_text(tmp_path):
    (tmp_path / "m.csv").write_text(",".join(COLUMNS) + "\n1,,,0.5\nabc,def\n2,1,2,3,4,5,6,7,8,9,10,11,12,13\n")
    assert MetricsLog(tmp_path / "m.csv", upto=9).rows == [{"step": 1, "train_loss": 0.5}]


@pytest.mark.parametrize(
    "rows", [[], [{"step": 1, "train_loss": 2.0}], [{"step": i, "train_loss": 2.0 - i / 50} for i in range(50)]]
)
def test_picture(tmp_path, rows):
    draw_losses(tmp_path / "loss.png", [*rows, {"step": 1, "eval_loss": 1.5}] if rows else [], "a title")
    data = (tmp_path / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 5_000


def row(step):
    return {"step": step, "train_loss": 1.5, "tokens_per_second": 1000.0, "peak_memory_mib": 2048.0}


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_what_matters(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with ProgressLine(console, 3, log_seconds=1e9) as line:
        line.evaluation(TrainerState(step=0), 0.5)
        for step in (1, 2, 3):
            line.step(TrainerState(step=step), row(step))
    text = console.file.getvalue()
    for part in (
        "held out",
        "loss 0.5000, perplexity 1.649",
        "loss 1.5000",
        "1,000 tokens/s",
        "peak 2.00 GiB",
        "left",
        "3/3",
    ):
        assert part in text, part
    assert ("\x1b[" in text) == terminal
    if not terminal:
        assert "step 1/3" in text and "step 2/3" not in text  # every `log_seconds`, and the last


def test_duration():
    assert [duration(s) for s in (3.2, 247, 3909)] == ["0:03", "4:07", "1:05:09"]


def test_peak_memory_is_this_process():
    assert 2**20 < peak_memory("cpu") < 2**40
