"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): v trained embeddings before the text."""

from pyfastpeft.methods.prompt_tuning.config import PromptTuningConfig, PromptTuningInit
from pyfastpeft.methods.prompt_tuning.method import PromptTuningMethod

__all__ = ["PromptTuningConfig", "PromptTuningInit", "PromptTuningMethod"]
