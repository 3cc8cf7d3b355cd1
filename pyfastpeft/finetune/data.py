"""From a data file to training sequences: reading, tokenising, packing or padding.

A dataset is one flat run of tokens with a flag per token (is it a target of the loss?) and the start and end of each
sequence in it. A sequence of T + 1 tokens gives T inputs and T labels that are already shifted: labels[t] is the token
after inputs[t], or −100 where the loss does not look. Neighbouring packed sequences share one token, so that every
token but the first of all is predicted once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch

from pyfastpeft.finetune.errors import DataError
from pyfastpeft.finetune.reading import Document

IGNORED = -100  # torch's cross_entropy skips this label
TOKENIZER_BATCH = 512  # texts per tokenizer call: fast tokenizers work through a call in parallel


@dataclass
class TokenizedDocument:
    """Token ids of one document, and for each whether the loss looks at it. `plain`: every token is a target."""

    ids: torch.Tensor  # int32 [n]
    targets: torch.Tensor  # bool [n]
    plain: bool


@dataclass
class Sequences:
    """Training sequences as slices of one token run; `sequences[i]` is (inputs, labels), int64 [T_i] each."""

    ids: torch.Tensor  # int32 [n]
    targets: torch.Tensor  # bool [n]
    starts: torch.Tensor  # int64 [sequences]
    ends: torch.Tensor  # int64 [sequences]
    packed: bool
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return self.starts.numel()

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start, end = int(self.starts[index]), int(self.ends[index])
        ids = self.ids[start:end].long()
        labels = torch.where(self.targets[start + 1 : end], ids[1:], IGNORED)
        return ids[:-1], labels

    def batch(self, indices: list[int], pad: int) -> dict[str, torch.Tensor]:
        """Rows padded on the right to the longest: input_ids, labels and, where there is padding, attention_mask.

        Without padding there is no mask: attention then runs its causal fast path.
        """
        rows = [self[index] for index in indices]
        length = max(inputs.numel() for inputs, _ in rows)
        inputs = torch.full((len(rows), length), pad, dtype=torch.int64)
        labels = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
        mask = torch.zeros((len(rows), length), dtype=torch.int64)
        for i, (row, label) in enumerate(rows):
            inputs[i, : row.numel()] = row
            labels[i, : row.numel()] = label
            mask[i, : row.numel()] = 1
        result = {"input_ids": inputs, "labels": labels}
        if not bool(mask.all()):
            result["attention_mask"] = mask
        return result


def tokenize(documents: list[Document], tokenizer: Any, source: str) -> list[TokenizedDocument]:
    """Tokenises each document's parts. Text and completions end with the end-of-text token; a chat ends as its template
    does. A part that starts a document gets the tokens that the tokenizer itself puts first (a BOS)."""
    # first part of a document? → (document, part, text)
    flat: dict[bool, list[tuple[int, int, str]]] = {True: [], False: []}
    for d, document in enumerate(documents):
        for p, part in enumerate(document.parts):
            flat[p == 0 and not document.templated].append((d, p, part.text))
    ids: dict[tuple[int, int], torch.Tensor] = {}
    eos = tokenizer.eos_token_id
    for first, items in flat.items():
        for begin in range(0, len(items), TOKENIZER_BATCH):
            batch = items[begin : begin + TOKENIZER_BATCH]
            encoded = tokenizer([text for _, _, text in batch], add_special_tokens=first, verbose=False)["input_ids"]
            for (d, p, _), tokens in zip(batch, encoded, strict=True):
                if first and eos is not None and tokens and tokens[-1] == eos:
                    tokens = tokens[:-1]  # T5's tokenizers end every text; ours ends documents only
                ids[d, p] = torch.tensor(tokens, dtype=torch.int32)
    result = []
    for d, document in enumerate(documents):
        tokens = [ids.pop((d, p)) for p in range(len(document.parts))]
        targets = [torch.full((t.numel(),), part.is_target) for t, part in zip(tokens, document.parts, strict=True)]
        if not document.templated and eos is not None:
            tokens.append(torch.tensor([eos], dtype=torch.int32))
            targets.append(torch.tensor([True]))
        plain = all(part.is_target for part in document.parts)
        result.append(TokenizedDocument(torch.cat(tokens), torch.cat(targets), plain))
    if not any(document.targets[1:].any() for document in result):
        raise DataError(f"{source}: no token is left to learn from after tokenising {len(documents)} documents")
    return result


def split_heldout(
    documents: list[TokenizedDocument], fraction: float, seed: int
) -> tuple[list[TokenizedDocument], list[TokenizedDocument]]:
    """(training, held out): whole documents drawn by the seed, or the end of the text where there is only one."""
    if fraction <= 0:
        return documents, []
    if len(documents) == 1:
        document = documents[0]
        cut = document.ids.numel() - round(document.ids.numel() * fraction)
        first, second = (
            TokenizedDocument(document.ids[part], document.targets[part], document.plain)
            for part in (slice(None, cut), slice(cut, None))
        )
        return [first], [second]
    count = min(len(documents) - 1, max(1, round(len(documents) * fraction)))
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    heldout = set(order[:count])
    return (
        [document for i, document in enumerate(documents) if i not in heldout],
        [document for i, document in enumerate(documents) if i in heldout],
    )


def make_sequences(documents: list[TokenizedDocument], length: int, packing: bool, source: str) -> Sequences:
    """Cuts documents into sequences of at most `length` inputs.

    packing: the documents one after another, cut into full sequences of `length`; the ragged rest is dropped.
    Otherwise one document a row. A plain text longer than that goes on in the next row; an example with a masked part
    (prompt, user turns) is cut at the end, and left out where no target would remain.
    """
    ids = torch.cat([document.ids for document in documents]) if documents else torch.empty(0, dtype=torch.int32)
    targets = torch.cat([document.targets for document in documents]) if documents else torch.empty(0, dtype=torch.bool)
    notes: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    if packing:
        count = max(0, (ids.numel() - 1) // length)
        if count == 0:
            raise DataError(
                f"{source}: {ids.numel()} tokens are fewer than one sequence of {length} + 1; give more text, a "
                "smaller --sequence-length, or --no-packing (padded rows)"
            )
        starts = [i * length for i in range(count)]
        ends = [start + length + 1 for start in starts]
    else:
        cut = 0
        begin = 0
        for document in documents:
            size = document.ids.numel()
            if document.plain:
                for start in range(0, max(1, size - 1), length):
                    starts.append(begin + start)
                    ends.append(begin + min(start + length + 1, size))
            else:
                starts.append(begin)
                ends.append(begin + min(length + 1, size))
                cut += size > length + 1
            begin += size
        if cut:
            notes.append(f"{source}: {cut} of {len(documents)} examples are longer than {length} tokens and were cut")
    keep = [i for i, (s, e) in enumerate(zip(starts, ends, strict=True)) if bool(targets[s + 1 : e].any())]
    if len(keep) < len(starts):
        notes.append(
            f"{source}: {len(starts) - len(keep)} of {len(starts)} sequences hold nothing to learn from (no completion "
            f"within {length} tokens) and were left out"
        )
    if not keep:
        raise DataError(
            f"{source}: none of the {len(starts)} sequences holds a token to learn from within {length} tokens; give a "
            "larger --sequence-length or shorter prompts"
        )
    kept_starts, kept_ends = (torch.tensor([values[i] for i in keep], dtype=torch.int64) for values in (starts, ends))
    return Sequences(ids, targets, kept_starts, kept_ends, packing, notes)


class BatchOrder:
    """Which sequences step s trains on: a function of (seed, s) alone, so that a resumed run needs no state.

    Epoch e is the permutation drawn by (seed, e); the epochs follow each other without a gap, and a batch may straddle
    two. The run holds `total` = round(epochs · sequences) sequences, or any number where the length is given in steps.
    """

    def __init__(self, sequences: int, per_step: int, *, seed: int, epochs: float, max_steps: int | None) -> None:
        self.sequences, self.per_step, self.seed = sequences, per_step, seed
        total = max(1, round(epochs * sequences))
        self.steps = max_steps if max_steps is not None else -(-total // per_step)
        self.total = self.steps * per_step if max_steps is not None else total
        self._permutations: dict[int, list[int]] = {}

    def indices(self, step: int) -> list[int]:
        """The sequences of optimizer step `step`, `per_step` of them (fewer in the last step of a run in epochs)."""
        begin = step * self.per_step
        positions = range(begin, min(begin + self.per_step, self.total))
        return [self._permutation(p // self.sequences)[p % self.sequences] for p in positions]

    def epoch(self, step: int) -> float:
        """Epochs done before step `step`."""
        return min(step * self.per_step, self.total) / self.sequences

    def _permutation(self, epoch: int) -> list[int]:
        if epoch not in self._permutations:
            self._permutations = {k: v for k, v in self._permutations.items() if k >= epoch - 1}  # at most two are used
            generator = torch.Generator().manual_seed(step_seed(self.seed, epoch, "order"))
            self._permutations[epoch] = torch.randperm(self.sequences, generator=generator).tolist()
        return self._permutations[epoch]


def step_seed(seed: int, step: int, purpose: str) -> int:
    """A well-mixed 63-bit seed of (seed, step, purpose): torch's CPU generator keeps the low 32 bits only."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
