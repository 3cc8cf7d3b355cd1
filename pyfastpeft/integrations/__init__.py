"""Where pyfastpeft meets other libraries' own classes."""

from pyfastpeft.integrations.trainer import AdapterCheckpoints

__all__ = ["AdapterCheckpoints"]
