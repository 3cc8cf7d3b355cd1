"""Fixtures: a byte-level Llama of 31 thousand weights, its tokenizer, a text, and a config that trains on them in a
second."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pyfastpeft.finetune import FinetuneConfig

CONTEXT = 64
SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "sphinx of black quartz, judge my vow",
    "how vexingly quick daft zebras jump",
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "model"
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        LlamaForCausalLM(config).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0, model_max_length=CONTEXT).save_pretrained(folder)
    return folder


@pytest.fixture
def copied_model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "damaged"))


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text(". ".join(SENTENCES[i % 4] for i in range(40)) + ".\n", encoding="utf-8")
    return path


@pytest.fixture
def make_config(tiny_model, text_file, tmp_path):
    """`make_config(**options)`: 6 steps of 2 × 2 sequences of 32 bytes, in float32, with dropout."""

    def make(**options) -> FinetuneConfig:
        values = {
            "model": str(tiny_model),
            "data": str(text_file),
            "output": str(tmp_path / "out"),
            "method": "qlora",
            "rank": 4,
            "alpha": 8,
            "dropout": 0.1,
            "learning_rate": 1e-2,
            "max_steps": 6,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "sequence_length": 32,
            "dtype": "float32",
            "device": "cpu",
            "eval_every": 3,
            "save_every": 2,
        }
        return FinetuneConfig(**(values | options))

    return make
