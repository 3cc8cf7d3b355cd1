"""(IA)³ (Liu et al. 2022, arXiv:2205.05638): learned vectors that rescale activations, and T-Few's losses."""

from pyfastpeft.methods.ia3.config import IA3Config
from pyfastpeft.methods.ia3.layer import IA3Linear
from pyfastpeft.methods.ia3.method import IA3Method
from pyfastpeft.methods.ia3.tfew import choice_scores, length_normalized_loss, tfew_loss, unlikelihood_loss

__all__ = [
    "IA3Config",
    "IA3Linear",
    "IA3Method",
    "choice_scores",
    "length_normalized_loss",
    "tfew_loss",
    "unlikelihood_loss",
]
