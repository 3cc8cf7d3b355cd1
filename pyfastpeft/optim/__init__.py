"""Optimizers over pyfastpeft's kernels; each is a torch.optim.Optimizer."""

from pyfastpeft.optim.adamw import AdamW

__all__ = ["AdamW"]
