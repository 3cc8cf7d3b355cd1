"""Optimizers over pyfastpeft's kernels; each is a torch.optim.Optimizer."""

from pyfastpeft.optim.adamw import AdamW
from pyfastpeft.optim.loraplus import create_loraplus_optimizer
from pyfastpeft.optim.paged_adamw import PagedAdamW

__all__ = ["AdamW", "PagedAdamW", "create_loraplus_optimizer"]
