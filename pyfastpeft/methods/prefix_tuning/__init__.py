"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190) and P-tuning v2 (Liu et al. 2021, arXiv:2110.07602), which is
prefix tuning without projection: trained keys and values before those of the text, in every layer."""

from pyfastpeft.methods.prefix_tuning.config import PrefixTuningConfig
from pyfastpeft.methods.prefix_tuning.encoder import PrefixEncoder
from pyfastpeft.methods.prefix_tuning.method import PrefixTuningMethod

__all__ = ["PrefixEncoder", "PrefixTuningConfig", "PrefixTuningMethod"]
