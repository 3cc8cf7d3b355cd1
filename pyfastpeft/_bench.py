"""Finds the benchmark suite: pyfastpeft.bench is the folder bench/ of a checkout, or its copy inside an installed wheel."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path


def load() -> types.ModuleType:
    """Imports pyfastpeft.bench and returns it; ImportError says where it was looked for."""
    try:
        return importlib.import_module("pyfastpeft.bench")
    except ModuleNotFoundError as error:
        if error.name != "pyfastpeft.bench":
            raise
    folder = Path(__file__).resolve().parent.parent / "bench"
    file = folder / "__init__.py"
    if not file.exists():
        raise ImportError(
            f"the benchmark suite is neither installed as pyfastpeft.bench nor at {folder}; reinstall pyfastpeft"
        )
    spec = importlib.util.spec_from_file_location("pyfastpeft.bench", file, submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["pyfastpeft.bench"] = module
    spec.loader.exec_module(module)
    return module
