"""The demo's corpora (deterministic, disjoint, free of docstrings) and the base model that is shipped."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from pyfastpeft.demo import MODEL_DIRECTORY, corpus

SIZE_LIMIT = 8_000_000  # bytes of package data
LOSS_BOUND = 1.35  # nats per byte; 5.8 for a random model, about 3.1 for a model of single-byte frequencies


def long_lines(text: str) -> set[str]:
    return {" ".join(line.split()) for line in text.splitlines() if len(line.strip()) >= 45}


def is_bare_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def without_docstrings(source: str) -> str:
    """The syntax tree of ``source`` with its bare strings taken out, as text."""
    tree = parse(source)
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list) and any(map(is_bare_string, body)):
                kept = [statement for statement in body if not is_bare_string(statement)]
                setattr(node, field, kept if kept or isinstance(node, ast.Module) else [ast.Pass()])
    return ast.dump(tree)


# English ------------------------------------------------------------------------------------------------------------


def test_english_sizes_and_kind() -> None:
    train, heldout = corpus.english_text()
    assert len(train) > 1_000_000
    assert 50_000 < len(heldout) < len(train) / 5
    assert "Augmented assignment" in train + heldout  # from the topics
    assert (train + heldout).count(">>>") < 400  # doctests are left out; a few topics show a session
    words = re.findall(r"[a-z]+", train.lower())
    assert words.count("the") / len(words) > 0.04  # English


def test_english_train_and_heldout_share_nothing() -> None:
    train, heldout = corpus.english_text()
    assert not long_lines(train) & long_lines(heldout)
    train_paragraphs, heldout_paragraphs = (
        [" ".join(p.split()) for p in re.split(r"\n{2,}", text) if p.strip()] for text in (train, heldout)
    )
    assert not set(train_paragraphs) & set(heldout_paragraphs)
    assert len(train_paragraphs) == len(set(train_paragraphs))


def test_the_split_is_by_the_name_of_a_whole_module() -> None:
    assert corpus._family("asyncio/base_events.py") == corpus._family("asyncio/tasks.py") == "asyncio"
    assert corpus._family("_pydecimal.py") == corpus._family("decimal.py") == "decimal"
    assert corpus._family("pathlib.py") == corpus._family("pathlib/_local.py") == "pathlib"
    assert corpus._family("_weakrefset.py") == "weakrefset"
    assert corpus._family("__future__.py") == "future__"


def test_corpora_are_the_same_in_another_process() -> None:
    program = (
        "import hashlib\n"
        "from pyfastpeft.demo.corpus import english_text, python_source\n"
        "for part in english_text() + python_source(): print(hashlib.sha256(part.encode()).hexdigest())\n"
    )
    here = [hashlib.sha256(part.encode()).hexdigest() for part in corpus.english_text() + corpus.python_source()]
    root = Path(corpus.__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(root)}
    out = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert out.stdout.split() == here


def test_missing_pydoc_data_is_a_named_error_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(corpus.PydocDataMissingError, match=r"expected .*topics.* got no such file.*Way out: install"):
        corpus.english_text(tmp_path)
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = make_topics()\n", encoding="utf-8")
    with pytest.raises(corpus.PydocDataMissingError, match="got a file without them"):
        corpus.english_text(tmp_path)
    assert issubclass(corpus.PydocDataMissingError, corpus.CorpusError)


def test_stripped_down_library_is_an_error_and_python_does_without_pydoc_data(tmp_path: Path) -> None:
    with pytest.raises(corpus.CorpusError, match=r"Python demo corpus: expected at least .* got 0 and 0.*Way out"):
        corpus.python_source(tmp_path / "nothing")
    stdlib = corpus.stdlib_directory()
    for name in corpus.PYTHON_TRAIN_MODULES + corpus.PYTHON_HELDOUT_MODULES:
        if (stdlib / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(stdlib / name, tmp_path / name)
    (tmp_path / "ssl.py").unlink()  # one absent module is no error
    train, heldout = corpus.python_source(tmp_path)
    full_train, full_heldout = corpus.python_source()
    assert 0.9 * len(full_train) < len(train) < len(full_train)
    assert heldout == full_heldout
    with pytest.raises(corpus.PydocDataMissingError):
        corpus.english_text(tmp_path)


# Python -------------------------------------------------------------------------------------------------------------


def test_python_sizes_and_disjoint_files() -> None:
    train, heldout = corpus.python_source()
    assert len(train) > 1_000_000
    assert 100_000 < len(heldout) < len(train) / 5
    names = corpus.PYTHON_TRAIN_MODULES + corpus.PYTHON_HELDOUT_MODULES
    assert len(names) == len(set(names))
    assert len(long_lines(train) & long_lines(heldout)) < 0.03 * len(long_lines(heldout))


def test_the_two_domains_do_not_overlap() -> None:
    english, python = corpus.english_text(), corpus.python_source()
    shared = long_lines("\n".join(english)) & long_lines("\n".join(python))
    assert len(shared) < 0.002 * len(long_lines("\n".join(python)))


def test_python_holds_no_docstring_and_is_otherwise_unchanged() -> None:
    stdlib = corpus.stdlib_directory()
    checked = 0
    for name in (corpus.PYTHON_TRAIN_MODULES + corpus.PYTHON_HELDOUT_MODULES)[::2]:
        path = stdlib / name
        if not path.exists():
            continue
        source = path.read_text(encoding="utf-8")
        stripped = corpus.strip_docstrings(source)
        assert ast.dump(parse(stripped)) == without_docstrings(source), name
        checked += 1
    assert checked > 50


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""Doc."""\n\n# kept\nx = 1\n', "# kept\nx = 1\n"),
        ('def f():\n    """Doc\n    two."""\n    # kept\n    return 1\n', "def f():\n    # kept\n    return 1\n"),
        ('class A:\n    "Doc."\n', "class A:\n    pass\n"),
        ('def f(): "Doc."\n', "def f(): pass\n"),
        ('def f():\n    "é"; x = "é"\n', 'def f():\n    pass; x = "é"\n'),
        ('x = 1\n"""about x"""\ny = 2\n', "x = 1\ny = 2\n"),
        ('if x:\n    "a"\n    "b"\n', "if x:\n    pass\n"),
        ("s = '''text'''\n", "s = '''text'''\n"),
    ],
)
def test_strip_docstrings(source: str, expected: str) -> None:
    assert corpus.strip_docstrings(source) == expected


# The shipped model --------------------------------------------------------------------------------------------------

needs_model = pytest.mark.skipif(
    not (MODEL_DIRECTORY / "model.safetensors").exists(), reason="the demo model is not part of this checkout"
)


@pytest.fixture(scope="module")
def model_and_tokenizer():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL_DIRECTORY, dtype=torch.float32, local_files_only=True
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIRECTORY, local_files_only=True)
    return model.eval(), tokenizer


@needs_model
def test_size_and_hashes() -> None:
    from pyfastpeft.demo.pretrain import sha256_of

    files = {path.name: path for path in MODEL_DIRECTORY.iterdir() if path.is_file()}
    assert {"config.json", "generation_config.json", "model.safetensors", "PRETRAINING.md"} <= set(files)
    assert sum(path.stat().st_size for path in files.values()) <= SIZE_LIMIT
    table = re.findall(
        r"^\| `(\S+)` \| (\d+) \| `([0-9a-f]{64})` \|$", files["PRETRAINING.md"].read_text(), re.MULTILINE
    )
    stated = {name: (int(size), digest) for name, size, digest in table}
    found = {name: (path.stat().st_size, sha256_of(path)) for name, path in files.items() if name != "PRETRAINING.md"}
    assert stated == found


@needs_model
def test_model_dimensions_suit_blocks_of_64() -> None:
    config = json.loads((MODEL_DIRECTORY / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim"):
        assert config[name] % 64 == 0


@needs_model
def test_tokenizer_is_one_token_a_byte(model_and_tokenizer) -> None:
    from pyfastpeft.demo.pretrain import byte_tokens

    _, tokenizer = model_and_tokenizer
    text = "def naïve(x):\n\treturn '→'  # <b>\n"
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert tokens == byte_tokens(text).tolist() == [byte + 3 for byte in text.encode()]
    assert tokenizer.decode(tokens) == text


@needs_model
def test_shipped_model_has_learned_english(model_and_tokenizer) -> None:
    from pyfastpeft.demo.pretrain import byte_tokens, heldout_loss

    model, _ = model_and_tokenizer
    loss = heldout_loss(model, byte_tokens(corpus.english_text()[1]), limit=12_289)
    stated = re.search(r"held-out loss: ([\d.]+) nats per byte", (MODEL_DIRECTORY / "PRETRAINING.md").read_text())
    assert stated is not None
    assert loss < LOSS_BOUND
    assert math.isclose(loss, float(stated.group(1)), abs_tol=0.35)  # a part of the text, of maybe another CPython
    python_loss = heldout_loss(model, byte_tokens(corpus.python_source()[1]), limit=4_097)
    assert python_loss > loss  # the demo's other domain leaves something to learn


@needs_model
def test_sample_is_mostly_words_of_the_training_text(model_and_tokenizer) -> None:
    import torch

    model, tokenizer = model_and_tokenizer
    torch.manual_seed(0)
    prompt = "This method returns"
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    sample = tokenizer.decode(model.generate(**inputs, max_new_tokens=120)[0])
    assert sample.startswith(prompt)
    known = set(re.findall(r"[a-z]+", corpus.english_text()[0].lower()))
    words = re.findall(r"[a-z]+", sample.lower())[:-1]
    assert sum(word in known for word in words) >= 0.75 * len(words)


# The script ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_pretraining_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig

    from pyfastpeft.demo import pretrain

    text = "".join(f"The method number {i} returns the value {i * i}.\n" for i in range(400))
    monkeypatch.setattr(pretrain, "english_text", lambda: (text, text[:4000]))
    monkeypatch.setattr(
        pretrain,
        "model_config",
        lambda: LlamaConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=64,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=1,
        ),
    )
    settings = pretrain.Settings(steps=6, batch_size=2, warmup_steps=2, optimizer="adamw", autocast=False)
    once = pretrain.Pretraining(settings, tmp_path / "once", tmp_path / "once.work")
    once.run(eval_every=3, save_seconds=1e9, heldout_limit=1100)

    first = pretrain.Pretraining(settings, tmp_path / "twice", tmp_path / "twice.work")
    for _ in range(3):
        first.step()
    first._save()
    second = pretrain.Pretraining(settings, tmp_path / "twice", tmp_path / "twice.work")
    assert second.progress.step == 3
    second.run(eval_every=3, save_seconds=1e9, heldout_limit=1100)
    for (name, one), other in zip(once.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name

    files = {path.name for path in (tmp_path / "once").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "PRETRAINING.md"} <= files
    assert not any(name.startswith(".") for name in files)
    with pytest.raises(ValueError, match="cannot resume"):
        pretrain.Pretraining(pretrain.Settings(steps=7), tmp_path / "twice", tmp_path / "twice.work")


def test_atomic_write_leaves_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from pyfastpeft.demo.pretrain import atomic_write

    path = tmp_path / "file"
    atomic_write(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
