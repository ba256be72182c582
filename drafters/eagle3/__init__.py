"""EAGLE-3: one decoder layer over fused target features, drafting a chain (arXiv 2503.01840)."""

from drafters.eagle3.config import Eagle3Config
from drafters.eagle3.drafter import Eagle3Drafter, Eagle3Settings

__all__ = ["Eagle3Config", "Eagle3Drafter", "Eagle3Settings"]
