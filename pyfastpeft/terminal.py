"""What the commands share: where words go, and how an error becomes a message and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

USAGE, FAILURE, INTERRUPTED = 2, 1, 130
settings = {"traceback": False}


def out() -> Console:
    return Console()


def err() -> Console:
    return Console(stderr=True)


@contextmanager
def errors_in_words() -> Iterator[None]:
    """Turns an exception into one red message and an exit code: 2 for an option, 130 for Ctrl-C, 1 for the rest."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        fail("interrupted; nothing was saved since the last checkpoint", INTERRUPTED)
    except Exception as error:
        from pyfastpeft.finetune.errors import ConfigError

        if settings["traceback"]:
            traceback.print_exc()
        expected = isinstance(error, (ValueError, TypeError, RuntimeError, OSError))
        text = str(error) or type(error).__name__
        if not expected:
            text = f"{type(error).__name__}: {text} (run again with --traceback before the command, and report it)"
        fail(text, USAGE if isinstance(error, ConfigError) else FAILURE)


def fail(text: str, code: int) -> None:
    console = err()
    console.print("error: ", style="bold red", end="", soft_wrap=True)
    console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def say(line: str = "") -> None:
    out().print(line, markup=False, highlight=False, soft_wrap=True)


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
