"""LogitSpec: lookup guided by the logits that decided the last token (arXiv 2507.01449)."""

from drafters.logitspec.drafter import LogitSpecDrafter, LogitSpecSettings

__all__ = ["LogitSpecDrafter", "LogitSpecSettings"]
