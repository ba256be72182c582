"""The second interface of the same: its names."""

from . import functional

__all__ = ["functional"]
