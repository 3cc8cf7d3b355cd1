"""The two text domains of the offline demo, read from the standard library that every CPython carries.

* English (``english_text``): the topics of ``pydoc_data`` and the docstrings of the standard library.
* Python (``python_source``): source files of the standard library, comments kept, docstrings removed.

Nothing is imported or executed: files are read as text and parsed with ``ast``. Both functions return
``(train, heldout)`` and are deterministic for one installed CPython.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = [
    "DOCUMENT_SEPARATOR",
    "PYTHON_HELDOUT_MODULES",
    "PYTHON_TRAIN_MODULES",
    "CorpusError",
    "PydocDataMissingError",
    "english_text",
    "python_source",
    "strip_docstrings",
]

#: What stands between two documents (a topic, the docstrings of one module, one source file).
DOCUMENT_SEPARATOR = "\n\n\n"

#: Source files of the Python domain that are trained on, as paths below the standard library. A file an
#: installation lacks (the list covers CPython 3.10 to 3.14) is skipped.
PYTHON_TRAIN_MODULES: tuple[str, ...] = (
    "_collections_abc.py",
    "_compat_pickle.py",
    "_markupbase.py",
    "_pydatetime.py",
    "_pyio.py",
    "_strptime.py",
    "_threading_local.py",
    "_weakrefset.py",
    "abc.py",
    "argparse.py",
    "ast.py",
    "asyncio/base_events.py",
    "asyncio/events.py",
    "asyncio/futures.py",
    "asyncio/locks.py",
    "asyncio/queues.py",
    "asyncio/streams.py",
    "asyncio/tasks.py",
    "base64.py",
    "bdb.py",
    "bisect.py",
    "calendar.py",
    "cmd.py",
    "codecs.py",
    "collections/__init__.py",
    "concurrent/futures/_base.py",
    "concurrent/futures/process.py",
    "concurrent/futures/thread.py",
    "configparser.py",
    "contextlib.py",
    "copy.py",
    "csv.py",
    "ctypes/__init__.py",
    "dataclasses.py",
    "datetime.py",
    "difflib.py",
    "dis.py",
    "doctest.py",
    "email/_header_value_parser.py",
    "email/feedparser.py",
    "email/generator.py",
    "email/header.py",
    "email/message.py",
    "enum.py",
    "filecmp.py",
    "fractions.py",
    "ftplib.py",
    "functools.py",
    "getopt.py",
    "gettext.py",
    "gzip.py",
    "heapq.py",
    "html/parser.py",
    "http/client.py",
    "http/cookiejar.py",
    "http/cookies.py",
    "http/server.py",
    "imaplib.py",
    "importlib/_bootstrap.py",
    "importlib/_bootstrap_external.py",
    "inspect.py",
    "ipaddress.py",
    "json/decoder.py",
    "json/encoder.py",
    "linecache.py",
    "locale.py",
    "logging/__init__.py",
    "logging/config.py",
    "logging/handlers.py",
    "mailbox.py",
    "multiprocessing/connection.py",
    "multiprocessing/managers.py",
    "multiprocessing/pool.py",
    "optparse.py",
    "os.py",
    "pdb.py",
    "pickle.py",
    "platform.py",
    "plistlib.py",
    "poplib.py",
    "posixpath.py",
    "pprint.py",
    "profile.py",
    "pyclbr.py",
    "queue.py",
    "random.py",
    "selectors.py",
    "shutil.py",
    "smtplib.py",
    "socket.py",
    "socketserver.py",
    "ssl.py",
    "statistics.py",
    "string.py",
    "subprocess.py",
    "symtable.py",
    "tarfile.py",
    "telnetlib.py",
    "textwrap.py",
    "threading.py",
    "timeit.py",
    "tokenize.py",
    "trace.py",
    "traceback.py",
    "types.py",
    "typing.py",
    "unittest/case.py",
    "unittest/mock.py",
    "urllib/parse.py",
    "urllib/request.py",
    "uuid.py",
    "warnings.py",
    "weakref.py",
    "xml/dom/minidom.py",
    "xml/etree/ElementTree.py",
    "zipfile.py",
    "zipfile/__init__.py",
)

#: Source files of the Python domain that are held out: whole other files, never trained on.
PYTHON_HELDOUT_MODULES: tuple[str, ...] = (
    "asyncio/subprocess.py",
    "code.py",
    "compileall.py",
    "copyreg.py",
    "fileinput.py",
    "fnmatch.py",
    "getpass.py",
    "glob.py",
    "graphlib.py",
    "hmac.py",
    "mimetypes.py",
    "netrc.py",
    "pkgutil.py",
    "pstats.py",
    "rlcompleter.py",
    "runpy.py",
    "sched.py",
    "shelve.py",
    "shlex.py",
    "signal.py",
    "tempfile.py",
    "tracemalloc.py",
    "unittest/loader.py",
    "unittest/runner.py",
    "wave.py",
    "zipapp.py",
)

_SKIPPED_DIRECTORIES = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "ensurepip",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
_HELDOUT_SHARE = 12  # one name in this many is held out
_SPLIT_SALT = "6"  # names the split; another value would draw another one
_SIGNIFICANT_LINE = 45  # characters from which on a line counts for the de-duplication
_ENGLISH_MINIMUM = 400_000  # bytes of training text below which the installation is called stripped-down
_PYTHON_MINIMUM = 300_000
_HELDOUT_MINIMUM = 20_000


class CorpusError(RuntimeError):
    """The installed standard library does not hold the text that the demo needs."""


class PydocDataMissingError(CorpusError):
    """``pydoc_data/topics.py`` is missing or unreadable in the installed standard library."""


def stdlib_directory() -> Path:
    """Return the folder with the standard library's source files (the base one inside a virtual environment)."""
    return Path(sysconfig.get_paths()["stdlib"])


def english_text(stdlib: str | os.PathLike[str] | None = None) -> tuple[str, str]:
    """Return the English domain as ``(train, heldout)``.

    The text is the topics of ``pydoc_data`` plus the docstrings of the standard library, without doctest
    examples. Whole topics and whole top-level modules are held out by a hash of their name. A paragraph
    that repeats is kept once, and a held-out paragraph that shares a line of 45 characters or more
    with the training text is dropped.

    Args:
        stdlib: folder of the standard library; the running interpreter's own by default.

    Returns:
        Two ``str``, about 1.7 million and 0.12 million characters on CPython 3.11.

    Raises:
        PydocDataMissingError: ``pydoc_data/topics.py`` is not there.
        CorpusError: there are too few source files.
    """
    return _english_text(Path(stdlib) if stdlib is not None else stdlib_directory())


def python_source(stdlib: str | os.PathLike[str] | None = None) -> tuple[str, str]:
    """Return the Python domain as ``(train, heldout)``: standard-library source without docstrings.

    The files are those of ``PYTHON_TRAIN_MODULES`` and ``PYTHON_HELDOUT_MODULES`` that are installed.

    Args:
        stdlib: folder of the standard library; the running interpreter's own by default.

    Returns:
        Two ``str``, about 3.7 million and 0.27 million characters on CPython 3.11.

    Raises:
        CorpusError: there are too few source files.
    """
    return _python_source(Path(stdlib) if stdlib is not None else stdlib_directory())


@functools.lru_cache(maxsize=4)
def _english_text(stdlib: Path) -> tuple[str, str]:
    train: list[tuple[str, list[str]]] = []
    heldout: list[tuple[str, list[str]]] = []
    for name, text in _topics(stdlib):
        (heldout if _is_heldout("topic:" + name) else train).append((name, _paragraphs(text)))
    for name, docstrings in _module_docstrings(stdlib):
        paragraphs = [paragraph for text in docstrings for paragraph in _paragraphs(text) if ">>>" not in paragraph]
        (heldout if _is_heldout("module:" + _family(name)) else train).append((name, paragraphs))
    seen_paragraphs: set[str] = set()
    train_documents = _deduplicated(train, seen_paragraphs, frozenset())
    lines = {line for document in train_documents for line in _significant_lines(document)}
    heldout_documents = _deduplicated(heldout, seen_paragraphs, lines)
    result = DOCUMENT_SEPARATOR.join(train_documents), DOCUMENT_SEPARATOR.join(heldout_documents)
    _check_size("English", stdlib, result, _ENGLISH_MINIMUM)
    return result


@functools.lru_cache(maxsize=4)
def _python_source(stdlib: Path) -> tuple[str, str]:
    result = (_stripped_files(stdlib, PYTHON_TRAIN_MODULES), _stripped_files(stdlib, PYTHON_HELDOUT_MODULES))
    _check_size("Python", stdlib, result, _PYTHON_MINIMUM)
    return result


def strip_docstrings(source: str) -> str:
    """Return Python ``source`` without its docstrings and other bare string statements; comments stay.

    A body that held nothing else keeps a ``pass``. Lines are removed, never changed otherwise, except where
    a string shares its line with other code.
    """
    tree = _parse(source)
    lines = source.encode("utf-8").split(b"\n")  # ast counts columns in UTF-8 bytes
    statements: list[tuple[ast.Expr, bool]] = []
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if not isinstance(body, list):
                continue
            strings = [statement for statement in body if _is_bare_string(statement)]
            alone = len(strings) == len(body) and not isinstance(node, ast.Module)
            statements += [(statement, alone and index == 0) for index, statement in enumerate(strings)]
    # From the last to the first, so that earlier line numbers stay valid.
    for statement, needs_pass in sorted(
        statements, key=lambda item: (item[0].lineno, item[0].col_offset), reverse=True
    ):
        first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
        before = lines[first][: statement.col_offset]
        after = lines[last][statement.end_col_offset :]
        if before.strip() or after.strip():
            lines[first : last + 1] = [before + b"pass" + after]
        elif needs_pass:
            lines[first : last + 1] = [before + b"pass"]
        else:
            end = last + 1
            while end < len(lines) - 1 and not lines[end].strip():  # blank lines that set the docstring off
                end += 1
            lines[first:end] = []
    return b"\n".join(lines).decode("utf-8")


def _is_bare_string(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        return ast.parse(source)


def _read(path: Path) -> str | None:
    """Return the text of ``path`` with Unix newlines, or None where it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _topics(stdlib: Path) -> list[tuple[str, str]]:
    """Return (name, text) of every pydoc topic, sorted by name."""
    path = stdlib / "pydoc_data" / "topics.py"
    source = _read(path)
    topics: object = None
    if source is not None:
        try:
            for statement in _parse(source).body:
                if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or statement.value is None:
                    continue
                targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
                if any(isinstance(target, ast.Name) and target.id == "topics" for target in targets):
                    topics = ast.literal_eval(statement.value)
        except (SyntaxError, ValueError):
            topics = None
    if not isinstance(topics, dict) or not topics:
        raise PydocDataMissingError(
            f"English demo corpus: expected the pydoc topics (a dict named 'topics') in {path}, got "
            f"{'no such file' if source is None else 'a file without them'}. Way out: install the full standard "
            "library (Debian and Ubuntu: apt-get install libpython3-stdlib python3; Fedora: python3-libs; conda and "
            "python.org builds have it), or pass stdlib=FOLDER of a complete CPython."
        )
    return sorted((str(name), str(text)) for name, text in topics.items())


def _module_docstrings(stdlib: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (relative path, its docstrings in source order) for every module of the standard library, sorted."""
    for directory, subdirectories, files in os.walk(stdlib):
        subdirectories[:] = sorted(
            name for name in subdirectories if name not in _SKIPPED_DIRECTORIES and not name.startswith("config-")
        )
        for file in sorted(files):
            if not file.endswith(".py") or file.startswith(("_sysconfigdata", "sitecustomize")):
                continue
            source = _read(Path(directory, file))
            if source is None or ('"""' not in source and "'''" not in source):
                continue
            try:
                tree = _parse(source)
            except (SyntaxError, ValueError):
                continue
            docstrings = [text for node in _documented_nodes(tree) if (text := ast.get_docstring(node))]
            if docstrings:
                yield Path(directory, file).relative_to(stdlib).as_posix(), docstrings


def _documented_nodes(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the module, classes and functions below ``node`` in source order (functions in functions left out)."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    for child in getattr(node, "body", ()):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.If, ast.Try)):
            yield from _documented_nodes(child)


def _family(path: str) -> str:
    """Return the name that decides the split for a file: its top-level module, ``_pydecimal`` as ``decimal``."""
    name = path.split("/")[0].removesuffix(".py")
    return (name.removeprefix("_py") if name.startswith("_py") else name.lstrip("_")) or name


def _is_heldout(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(f"{_SPLIT_SALT}/{name}".encode()).digest()[:8], "big") % _HELDOUT_SHARE == 0


def _paragraphs(text: str) -> list[str]:
    """Split at blank lines; trailing blanks are removed and tabs expanded."""
    paragraphs: list[str] = []
    current: list[str] = []
    for line in inspect.cleandoc(text).expandtabs().splitlines():
        if line.strip():
            current.append(line.rstrip())
        elif current:
            paragraphs.append("\n".join(current))
            current = []
    if current:
        paragraphs.append("\n".join(current))
    return paragraphs


def _significant_lines(text: str) -> Iterator[str]:
    return (" ".join(line.split()) for line in text.splitlines() if len(line.strip()) >= _SIGNIFICANT_LINE)


def _deduplicated(
    documents: Iterable[tuple[str, list[str]]], seen: set[str], forbidden_lines: set[str] | frozenset[str]
) -> list[str]:
    """Join each document's paragraphs that are new; ``seen`` is extended by them."""
    result = []
    for _, paragraphs in documents:
        kept = []
        for paragraph in paragraphs:
            key = " ".join(paragraph.split())
            if key in seen or (forbidden_lines and any(x in forbidden_lines for x in _significant_lines(paragraph))):
                continue
            seen.add(key)
            kept.append(paragraph)
        if kept:
            result.append("\n\n".join(kept))
    return result


def _stripped_files(stdlib: Path, names: Iterable[str]) -> str:
    sources = []
    for name in names:
        source = _read(stdlib / name)
        if source is None:
            continue
        try:
            stripped = strip_docstrings(source)
        except (SyntaxError, ValueError):
            continue
        lines = [line.rstrip() for line in stripped.expandtabs().splitlines()]
        sources.append("\n".join(lines).strip("\n"))
    return DOCUMENT_SEPARATOR.join(source for source in sources if source)


def _check_size(domain: str, stdlib: Path, texts: tuple[str, str], minimum: int) -> None:
    train, heldout = texts
    if len(train) < minimum or len(heldout) < _HELDOUT_MINIMUM:
        raise CorpusError(
            f"{domain} demo corpus: expected at least {minimum} characters of training text and {_HELDOUT_MINIMUM} "
            f"of held-out text from the .py files below {stdlib}, got {len(train)} and {len(heldout)}. This standard "
            "library is stripped down (no source files, a zip file, or a minimal package). Way out: use a complete "
            "CPython 3.10 or later (Debian and Ubuntu: apt-get install python3 libpython3-stdlib), or pass "
            "stdlib=FOLDER of one."
        )
