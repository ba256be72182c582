"""N-gram lookup: continues as the text itself did where its end stood before."""

from drafters.ngram.drafter import NgramDrafter, NgramSettings

__all__ = ["NgramDrafter", "NgramSettings"]
