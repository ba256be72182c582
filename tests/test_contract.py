"""The contract of every registered drafter, loss and policy: a new one is covered at once."""

from __future__ import annotations

from cosched.testing import DrafterContract, LossContract, PolicyContract


class TestDrafters(DrafterContract):
    """All drafters there are."""


class TestLosses(LossContract):
    """All losses there are."""


class TestPolicies(PolicyContract):
    """All policies there are."""
