"""bench/gpu/llama.py on a CPU and a tiny shape: its figures mean nothing there; that it runs for every candidate does."""

import importlib.util
from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / "bench" / "gpu" / "llama.py"
SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 96,
}  # fmt: skip


def test_every_candidate_trains_and_decodes():
    spec = importlib.util.spec_from_file_location("gpu_llama", FILE)
    llama = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(llama)
    sizes = {"batch": 2, "tokens": 8, "prompt": 4, "new": 3, "batches": (1, 2)}
    rows = llama.run("cpu", 1, SHAPE, sizes, compiled=False)
    names = {
        kind: [name for name, _ in llama.present(c)]
        for kind, c in (("train", llama.TRAINED), ("decode", llama.DECODED))
    }
    assert "ours" in names["train"] and {"ours", "bf16"} <= set(names["decode"])
    assert len(rows) == 2 * (len(names["train"]) + 2 * len(names["decode"]))
    assert all(row["tokens_per_second"] > 0 for row in rows)
    losses = [row["loss"] for row in rows if row["row"] == "train"]
    assert max(losses) - min(losses) < 0.1 * max(losses)  # one base, the same tokens' distribution
