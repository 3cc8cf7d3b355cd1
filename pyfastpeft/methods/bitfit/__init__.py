"""BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): only the biases train."""

from pyfastpeft.methods.bitfit.config import BitFitConfig
from pyfastpeft.methods.bitfit.layer import BitFitLayer
from pyfastpeft.methods.bitfit.method import BitFitMethod

__all__ = ["BitFitConfig", "BitFitLayer", "BitFitMethod"]
