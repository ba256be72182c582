"""DFlash: a block of masks over injected target features, drafted in one pass (arXiv 2602.06036)."""

from drafters.dflash.config import DFlashConfig
from drafters.dflash.drafter import DFlashDrafter

__all__ = ["DFlashConfig", "DFlashDrafter"]
