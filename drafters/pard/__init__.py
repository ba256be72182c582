"""PARD and PARD-2: a small language model that drafts its whole block through mask tokens."""

from drafters.pard.config import PardConfig
from drafters.pard.drafter import PardDrafter

__all__ = ["PardConfig", "PardDrafter"]
