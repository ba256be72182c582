"""Several drafters, of which each request takes the one that gets most accepted for what it costs."""

from drafters.best_of.drafter import BestOfDrafter, BestOfSettings

__all__ = ["BestOfDrafter", "BestOfSettings"]
