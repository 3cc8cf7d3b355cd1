"""Reads `.txt` and `.jsonl` files into documents; what is wrong is named with its line or byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfastpeft.finetune.errors import DataError

EXPECTED_KEYS = '"text", or "prompt" and "completion", or "messages"'


@dataclass(frozen=True)
class Part:
    """A stretch of text; `is_target`: the loss looks at its tokens."""

    text: str
    is_target: bool


@dataclass(frozen=True)
class Document:
    """Parts that follow each other; `templated`: a chat template has already placed every special token."""

    parts: tuple[Part, ...]
    templated: bool = False


def read_documents(path: str | Path, tokenizer: Any) -> list[Document]:
    """The documents of a `.txt` or `.jsonl` file.

    `.txt` is one document. A `.jsonl` line is a JSON object with "text" (all of it is learnt), "prompt" and
    "completion" (the completion is learnt), or "messages", a list of {"role", "content"} that the tokenizer's chat
    template renders (the assistant's turns are learnt). Blank lines are skipped.

    Raises DataError: missing, empty, a folder, not UTF-8, binary (a NUL byte), broken JSON, wrong keys or types.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"data file {path} does not exist; check the path (it was looked for in {Path.cwd()})")
    if path.is_dir():
        raise DataError(f"data {path} is a folder, expected one .txt or .jsonl file")
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".jsonl"):
        hint = "; a JSON list can be written one object a line as .jsonl" if suffix == ".json" else ""
        raise DataError(f"data file {path}: expected a name ending in .txt or .jsonl, got {suffix or 'none'}{hint}")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"data file {path} is empty (0 bytes)")
        documents = [_text_document(path)] if suffix == ".txt" else list(_jsonl_documents(path, tokenizer))
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror or error}") from error
    if not documents:
        raise DataError(f"data file {path} is empty: it holds blank lines only")
    return documents


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal: a resumed run must read the same data."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _decode(raw: bytes, path: Path, offset: int, where: str) -> str:
    """UTF-8 text of `raw`, which begins at byte `offset` of the file; DataError names the first bad byte."""
    nul = raw.find(b"\0")
    if nul >= 0:
        raise DataError(
            f"data file {path} is binary: a NUL byte at offset {offset + nul}{where}; expected UTF-8 text (UTF-16 "
            "text can be converted by: iconv -f UTF-16 -t UTF-8)"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"data file {path}: byte 0x{raw[error.start]:02x} at offset {offset + error.start}{where} is not UTF-8 "
            f"({error.reason}); expected UTF-8 text (Latin-1 text can be converted by: iconv -f LATIN1 -t UTF-8)"
        ) from None


def _text_document(path: Path) -> Document:
    text = _decode(path.read_bytes(), path, 0, "").removeprefix("\ufeff")
    if not text.strip():
        raise DataError(f"data file {path} is empty: it holds white space only")
    return Document((Part(text, True),))


def _jsonl_documents(path: Path, tokenizer: Any) -> Iterator[Document]:
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = _decode(raw, path, offset, f" (line {number})")
            offset += len(raw)
            if number == 1:
                line = line.removeprefix("\ufeff")
            if line.strip():
                yield _jsonl_document(line, f"data file {path}, line {number}", tokenizer)


def _jsonl_document(line: str, where: str, tokenizer: Any) -> Document:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON: {error.msg} at column {error.colno}; expected one JSON object a line"
        ) from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply; expected a flat object") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object with {EXPECTED_KEYS}, got {_kind(row)}")
    if "messages" in row:
        return _chat(row["messages"], where, tokenizer)
    if "prompt" in row and "completion" in row:
        prompt, completion = _string(row, "prompt", where), _string(row, "completion", where)
        if not completion:
            raise DataError(f'{where}: "completion" is empty, so there is nothing to learn; leave the line out')
        return Document((Part(prompt, False), Part(completion, True)))
    if "text" in row:
        text = _string(row, "text", where)
        if not text.strip():
            raise DataError(f'{where}: "text" is empty; leave the line out')
        return Document((Part(text, True),))
    keys = ", ".join(f'"{key}"' for key in list(row)[:8]) or "none"
    raise DataError(f"{where}: expected the keys {EXPECTED_KEYS}; got {keys}")


def _string(row: dict, key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f'{where}: "{key}" should be a string, got {_kind(value)}')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f'{where}: "{key}" holds half a surrogate pair at character {error.start}; it is no valid text'
        ) from None
    return value


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


def _chat(messages: Any, where: str, tokenizer: Any) -> Document:
    """The rendered conversation; what the template writes from an assistant's turn on, up to its end, is the target."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where}: "messages" should be a list of at least one message, got {_kind(messages)}')
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(
                f'{where}: message {i + 1} should be an object with "role" and "content", got {_kind(message)}'
            )
        for key in ("role", "content"):
            if key not in message:
                raise DataError(
                    f'{where}: message {i + 1} has no "{key}"; its keys are {", ".join(map(repr, message))}'
                )
            _string(message, key, f"{where}, message {i + 1}")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f'{where}: no message has the role "assistant", so there is nothing to learn; leave the line out'
        )
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f'{where}: "messages" need a chat template and this model\'s tokenizer has none; use an '
            'instruction-tuned model, or write the conversation as "prompt" and "completion"'
        )

    def render(count: int, prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template raises whatever its author chose
            raise DataError(f"{where}: the chat template refuses this conversation: {error}") from error

    whole = render(len(messages), False)
    parts: list[Part] = []
    done = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(i, True) if i else "", render(i + 1, False)
        if not (whole.startswith(before) and whole.startswith(after) and done <= len(before) <= len(after)):
            raise DataError(
                f"{where}: the chat template renders message {i + 1} differently once later messages follow, so its "
                "tokens cannot be told apart; give conversations with one assistant turn, at the end"
            )
        parts += [Part(whole[done : len(before)], False), Part(whole[len(before) : len(after)], True)]
        done = len(after)
    parts.append(Part(whole[done:], False))
    return Document(tuple(part for part in parts if part.text), templated=True)
