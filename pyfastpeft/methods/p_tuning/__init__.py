"""P-tuning (Liu et al. 2021, arXiv:2103.10385): virtual tokens that an MLP or an LSTM computes."""

from pyfastpeft.methods.p_tuning.config import PromptEncoderConfig, PromptEncoderReparameterizationType
from pyfastpeft.methods.p_tuning.encoder import PromptEncoder
from pyfastpeft.methods.p_tuning.method import PTuningMethod

__all__ = ["PTuningMethod", "PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"]
