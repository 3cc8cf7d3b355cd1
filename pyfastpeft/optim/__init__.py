"""Optimizers over pyfastpeft's kernels; each is a torch.optim.Optimizer."""

from pyfastpeft.optim.adamw import AdamW
from pyfastpeft.optim.in_backward import GradientsReleasedError
from pyfastpeft.optim.lion import Lion, PagedLion
from pyfastpeft.optim.loraplus import create_loraplus_optimizer
from pyfastpeft.optim.paged_adamw import PagedAdamW
from pyfastpeft.optim.sgd import SGD, PagedSGD

__all__ = [
    "SGD",
    "AdamW",
    "GradientsReleasedError",
    "Lion",
    "PagedAdamW",
    "PagedLion",
    "PagedSGD",
    "create_loraplus_optimizer",
]
