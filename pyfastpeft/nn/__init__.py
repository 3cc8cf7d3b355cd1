"""Layers: NF4Linear, and the views of linear (and other) bases that the methods build on."""

from pyfastpeft.nn.base_linear import BaseLinear, as_base_linear, register_base_linear
from pyfastpeft.nn.base_tables import as_base_layer
from pyfastpeft.nn.nf4_linear import NF4Linear

__all__ = ["BaseLinear", "NF4Linear", "as_base_layer", "as_base_linear", "register_base_linear"]
