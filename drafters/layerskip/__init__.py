"""Self-speculation: the target drafts for itself, with a part of its layers."""

from drafters.layerskip.drafter import LayerskipDrafter, LayerskipSettings

__all__ = ["LayerskipDrafter", "LayerskipSettings"]
