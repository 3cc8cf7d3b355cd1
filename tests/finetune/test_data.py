"""Tokenising, packing, padding, splitting, and the order of batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyfastpeft.finetune import DataError
from pyfastpeft.finetune.data import (
    IGNORED,
    BatchOrder,
    TokenizedDocument,
    make_sequences,
    split_heldout,
    step_seed,
    tokenize,
)
from pyfastpeft.finetune.reading import Document, Part


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer(extra_ids=0)


def byte_ids(text):
    return [byte + 3 for byte in text.encode()]


def plain(*sizes):
    """Documents of distinct ascending tokens."""
    result, begin = [], 0
    for size in sizes:
        ids = torch.arange(begin, begin + size, dtype=torch.int32)
        result.append(TokenizedDocument(ids, torch.ones(size, dtype=torch.bool), plain=True))
        begin += size
    return result


def test_documents_end_with_the_end_of_text_token(tokenizer):
    documents = [
        Document((Part("ab", True),)),
        Document((Part("q", False), Part("aé", True))),
        Document((Part("<u>x", False), Part("y", True)), templated=True),
    ]
    text, pair, chat = tokenize(documents, tokenizer, "here")
    assert text.ids.tolist() == [*byte_ids("ab"), 1] and text.plain
    assert pair.ids.tolist() == [*byte_ids("qaé"), 1] and not pair.plain
    assert pair.targets.tolist() == [False, True, True, True, True]
    assert chat.ids.tolist() == byte_ids("<u>xy")
    assert chat.targets.tolist() == [False] * 4 + [True]


def test_a_leading_bos_stays():
    class WithBos:
        eos_token_id = 2

        def __call__(self, texts, add_special_tokens, verbose):
            return {"input_ids": [[1] * add_special_tokens + [ord(c) for c in text] for text in texts]}

    document = Document((Part("a", False), Part("b", True)))
    assert tokenize([document], WithBos(), "here")[0].ids.tolist() == [1, 97, 98, 2]


def test_packed_sequences_predict_every_token_but_the_first_once():
    sequences = make_sequences(plain(10, 7, 8), 8, True, "here")
    inputs, labels = zip(*[sequences[i] for i in range(len(sequences))], strict=True)
    assert [row.numel() for row in inputs] == [8, 8, 8]
    assert torch.cat(inputs).tolist() == list(range(24))
    assert torch.cat(labels).tolist() == list(range(1, 25))
    assert "attention_mask" not in sequences.batch([0, 2], pad=0)


@given(
    sizes=st.lists(st.integers(2, 30), min_size=1, max_size=6),
    length=st.integers(1, 12),
    packing=st.booleans(),
)
def test_labels_are_the_next_tokens(sizes, length, packing):
    documents = plain(*sizes)
    if packing and sum(sizes) < length + 1:
        with pytest.raises(DataError, match="fewer than one sequence"):
            make_sequences(documents, length, True, "here")
        return
    sequences = make_sequences(documents, length, packing, "here")
    predicted = []
    for i in range(len(sequences)):
        inputs, labels = sequences[i]
        assert 1 <= inputs.numel() <= length
        assert torch.equal(labels, inputs + 1)  # tokens ascend by one
        predicted += labels.tolist()
    assert len(set(predicted)) == len(predicted)
    if not packing:  # a text is cut into rows, never lost: all but each document's first token
        firsts = {sum(sizes[:i]) for i in range(len(sizes))}
        assert set(predicted) == set(range(sum(sizes))) - firsts


def test_padding_is_masked():
    batch = make_sequences(plain(4, 6), 8, False, "here").batch([0, 1], pad=9)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 9, 9], [4, 5, 6, 7, 8]]
    assert batch["labels"].tolist() == [[1, 2, 3, IGNORED, IGNORED], [5, 6, 7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_only_the_completion_is_learnt_and_long_examples_are_cut(tokenizer):
    documents = tokenize(
        [Document((Part("12345678", False), Part("ab", True))), Document((Part("12", False), Part("abcdef", True)))],
        tokenizer,
        "here",
    )
    sequences = make_sequences(documents, 4, False, "here")
    assert len(sequences) == 1  # the first prompt fills the window: nothing to learn
    assert sequences[0][0].tolist() == byte_ids("12ab")
    assert sequences[0][1].tolist() == [IGNORED, *byte_ids("abc")]
    assert "2 of 2 examples are longer than 4 tokens and were cut" in sequences.notes[0]
    assert "1 of 2 sequences hold nothing to learn from" in sequences.notes[1]
    with pytest.raises(DataError, match="none of the 1 sequences holds a token to learn from within 4"):
        make_sequences(documents[:1], 4, False, "here")


def test_split_by_documents_and_within_one():
    documents = plain(*[5] * 20)
    train, heldout = split_heldout(documents, 0.1, seed=3)
    assert len(train) == 18 and len(heldout) == 2
    assert {id(d) for d in train} | {id(d) for d in heldout} == {id(d) for d in documents}
    assert [id(d) for d in split_heldout(documents, 0.1, seed=3)[1]] == [id(d) for d in heldout]
    (train,), (heldout,) = split_heldout(plain(100), 0.1, seed=0)
    assert train.ids.tolist() == list(range(90)) and heldout.ids.tolist() == list(range(90, 100))
    assert split_heldout(documents, 0.0, seed=0) == (documents, [])
    assert [len(part) for part in split_heldout(plain(5, 5), 0.9, seed=0)] == [1, 1]  # something is left to train on


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 3), st.integers(1, 3))
def test_an_epoch_holds_each_sequence_once(count, per_step, seed, epochs):
    order = BatchOrder(count, per_step, seed=seed, epochs=epochs, max_steps=None)
    assert order.steps == -(-count * epochs // per_step)
    seen = [index for step in range(order.steps) for index in order.indices(step)]
    assert len(seen) == count * epochs
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))
    # any step can be asked for alone: a resumed run does
    fresh = BatchOrder(count, per_step, seed=seed, epochs=epochs, max_steps=None)
    assert fresh.indices(order.steps - 1) == order.indices(order.steps - 1)


def test_order_differs_between_epochs_and_seeds():
    order = BatchOrder(50, 50, seed=0, epochs=2, max_steps=None)
    assert order.indices(0) != order.indices(1)
    assert order.indices(0) != BatchOrder(50, 50, seed=1, epochs=2, max_steps=None).indices(0)
    assert BatchOrder(50, 50, seed=0, epochs=1, max_steps=7).steps == 7


def test_step_seeds_differ_in_the_bits_that_torch_uses():
    seeds = {step_seed(seed, step, what) & 0xFFFFFFFF for seed in range(5) for step in range(200) for what in "ab"}
    assert len(seeds) == 2000
