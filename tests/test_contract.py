"""The contract of every registered plugin of every role: a new one is covered at once."""

from __future__ import annotations

from typing import Any

from msgspec import convert

from cosched.registry import Plugin
from cosched.testing import (
    DrafterContract,
    LengthContract,
    LossContract,
    ObjectiveContract,
    PolicyContract,
)


class TestDrafters(DrafterContract):
    """All drafters there are."""


class TestLosses(LossContract):
    """All losses there are, with the settings that change their arithmetic."""

    def settings(self, plugin: Plugin) -> list[Any]:
        cells: dict[str, list[dict[str, Any]]] = {
            "forward_kl": [{}, {"acceptance_prefix": True}],
            "top_k_cross_entropy": [{"k": k} for k in (1, 3, 7)],
            "sum": [
                {"terms": [{"kind": "forward_kl"}, {"kind": other, "weight": 0.5}]}
                for other in ("total_variation", "lk_hybrid", "proximal_kl")
            ],
        }
        found = cells.get(plugin.name, [{}])
        return [convert({"kind": plugin.name, **own}, plugin.cls.Settings) for own in found]


class TestPolicies(PolicyContract):
    """All policies there are."""


class TestObjectives(ObjectiveContract):
    """All objectives there are."""


class TestLengths(LengthContract):
    """All draft lengths there are."""
