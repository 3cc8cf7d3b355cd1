"""Data files: what is read, and for each broken one the place and the reason."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyfastpeft.finetune import DataError
from pyfastpeft.finetune.reading import Part, read_documents


class Template:
    """A tokenizer as far as reading needs one."""

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert tokenize is False
        if any(m["role"] == "boom" for m in messages):
            raise ValueError("unknown role boom")
        return "".join(f"<{m['role']}>{m['content']}|" for m in messages) + "<assistant>" * add_generation_prompt


CHAT = Template("a template")


def write(tmp_path, content, name="data.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path, tokenizer=CHAT):
    with pytest.raises(DataError) as error:
        read_documents(path, tokenizer)
    return str(error.value)


def test_text_is_one_document(tmp_path):
    (document,) = read_documents(write(tmp_path, "\ufeffa\r\n\nb é", "data.txt"), CHAT)
    assert document.parts == (Part("a\r\n\nb é", True),)


def test_jsonl_kinds(tmp_path):
    rows = [
        {"text": "plain"},
        {"prompt": "2+2=", "completion": "4", "id": 7},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    ]
    documents = read_documents(write(tmp_path, "\n\n".join(map(json.dumps, rows)) + "\n \n"), CHAT)
    assert documents[0].parts == (Part("plain", True),)
    assert documents[1].parts == (Part("2+2=", False), Part("4", True))
    assert documents[2].parts == (Part("<user>hi|<assistant>", False), Part("yo|", True))
    assert [d.templated for d in documents] == [False, False, True]


def test_every_assistant_turn_is_learnt(tmp_path):
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (document,) = read_documents(write(tmp_path, json.dumps(row)), CHAT)
    assert [part.text for part in document.parts if part.is_target] == ["b|", "d|"]
    assert (
        "".join(part.text for part in document.parts) == "<system>s|<user>a|<assistant>b|<user>c|<assistant>d|<user>e|"
    )


def test_missing_file(tmp_path):
    assert "nowhere.txt does not exist" in refused(tmp_path / "nowhere.txt")


def test_folder(tmp_path):
    assert "is a folder" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b""), ("a.jsonl", b""), ("a.txt", b" \n\t"), ("a.jsonl", b"\n \n")]
)
def test_empty(tmp_path, name, content):
    assert "is empty" in refused(write(tmp_path, content, name))


def test_other_suffix(tmp_path):
    message = refused(write(tmp_path, "[]", "data.json"))
    assert "expected a name ending in .txt or .jsonl, got .json" in message and "one object a line" in message


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl"])
def test_nul_byte_is_named_with_its_offset(tmp_path, name):
    first = b'{"text": "fine"}\n' if name.endswith("jsonl") else b"fine\n"
    message = refused(write(tmp_path, first + b"ab\0cd", name))
    assert "binary" in message and f"offset {len(first) + 2}" in message
    assert ("(line 2)" in message) == name.endswith("jsonl")


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl"])
def test_undecodable_byte_is_named_with_its_offset(tmp_path, name):
    first = '{"text": "é"}\n'.encode()
    message = refused(write(tmp_path, first + b'{"text": "caf\xe9"}', name))
    assert f"byte 0xe9 at offset {len(first) + 13}" in message and "not UTF-8" in message


@given(prefix=st.text(max_size=20), bad=st.sampled_from([b"\xff", b"\xc3(", b"\0"]))
def test_offset_of_the_first_bad_byte(tmp_path_factory, prefix, bad):
    prefix = prefix.replace("\0", "")
    path = write(tmp_path_factory.mktemp("p"), prefix.encode("utf-8", "ignore") + bad + b"tail", "data.txt")
    assert f"offset {len(prefix.encode('utf-8', 'ignore'))}" in refused(path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a"', "not JSON: Expecting ',' delimiter at column"),
        ("text", "not JSON: Expecting value at column 1"),
        ("[1]", "expected a JSON object"),
        ("3", "got a number"),
        ("{}", "got none"),
        (
            '{"txt": "a", "prompt": "b"}',
            'expected the keys "text", or "prompt" and "completion", or "messages"; got "txt", "prompt"',
        ),
        ('{"text": 3}', '"text" should be a string, got a number'),
        ('{"text": null}', '"text" should be a string, got null'),
        ('{"text": " "}', '"text" is empty'),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
        ('{"prompt": "a", "completion": ""}', '"completion" is empty'),
        ('{"prompt": ["a"], "completion": "b"}', '"prompt" should be a string, got a list'),
        ('{"messages": "hi"}', '"messages" should be a list'),
        ('{"messages": []}', '"messages" should be a list of at least one'),
        ('{"messages": ["hi"]}', "message 1 should be an object"),
        ('{"messages": [{"role": "user"}]}', 'message 1 has no "content"'),
        ('{"messages": [{"role": "user", "content": 1}]}', '"content" should be a string'),
        ('{"messages": [{"role": "user", "content": "a"}]}', 'no message has the role "assistant"'),
        (
            '{"messages": [{"role": "boom", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "chat template refuses this conversation: unknown role boom",
        ),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_line_is_named(tmp_path, line, expected):
    message = refused(write(tmp_path, '{"text": "fine"}\n\n' + line + "\n"))
    assert "line 3" in message
    assert expected in message


def test_messages_without_a_template(tmp_path):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    message = refused(write(tmp_path, json.dumps(row)), Template())
    assert "line 1" in message and "chat template" in message and '"prompt" and "completion"' in message


def test_template_that_rewrites_history(tmp_path):
    class Rewriting(Template):
        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return f"{len(messages)}:" + super().apply_chat_template(messages, tokenize, add_generation_prompt)

    row = {"messages": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "a"}]}
    assert "renders message 1 differently" in refused(write(tmp_path, json.dumps(row)), Rewriting("x"))
