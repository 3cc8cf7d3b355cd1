"""Checks that the configs share: names of modules, regular expressions, flags. Messages begin with the config's class."""

from __future__ import annotations

import math
import re
from typing import Any


def check_names(config: Any, *fields: str) -> None:
    """Fields that hold a list of names, a regular expression, or None."""
    for field in fields:
        value = getattr(config, field)
        if isinstance(value, str):
            check_pattern(config, field, value)
        else:
            check_strings(config, field, value)


def names_to_set(config: Any, *fields: str) -> None:
    """Lists become sets, as PEFT keeps them."""
    for field in fields:
        value = getattr(config, field)
        if isinstance(value, (list, tuple)):
            setattr(config, field, set(value))


def check_pattern(config: Any, field: str, pattern: Any) -> None:
    owner = type(config).__name__
    if not isinstance(pattern, str):
        raise TypeError(f"{owner}: {field} holds {pattern!r}, expected a string")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{owner}: {field} {pattern!r} is not a valid regular expression: {error}") from None


def check_strings(config: Any, field: str, value: Any) -> None:
    if value is None:
        return
    owner = type(config).__name__
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{owner}: {field} is {value!r}, expected a list of strings")
    if "" in value:
        raise ValueError(f"{owner}: {field} holds an empty name")


def check_flags(config: Any, *fields: str) -> None:
    for field in fields:
        if not isinstance(getattr(config, field), bool):
            raise TypeError(f"{type(config).__name__}: {field} is {getattr(config, field)!r}, expected True or False")


def check_integers(config: Any, low: int, **values: Any) -> None:
    """Named values that must be integers of at least `low`."""
    owner, kind = type(config).__name__, "a positive integer" if low == 1 else f"an integer of at least {low}"
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{owner}: {name} is {value!r}, expected an integer")
        if value < low:
            raise ValueError(f"{owner}: {name} is {value}, expected {kind}")


def check_finite(config: Any, **values: Any) -> None:
    """Named values that must be finite numbers."""
    owner = type(config).__name__
    for name, value in values.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{owner}: {name} is {value!r}, expected a number")
        if not math.isfinite(value):
            raise ValueError(f"{owner}: {name} is {value}, expected a finite number")
