"""Trainable tokens: new or existing tokens trained, everything else frozen."""

from pyfastpeft.methods.trainable_tokens.config import TrainableTokensConfig
from pyfastpeft.methods.trainable_tokens.method import TrainableTokensMethod

__all__ = ["TrainableTokensConfig", "TrainableTokensMethod"]
