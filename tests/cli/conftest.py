"""The fixtures of tests/finetune, for the command line."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "finetune"))

from tiny_job import one_thread, text_file, tiny_model  # noqa: E402, F401
