"""Policies by name, and what they decide on scripted snapshots."""

from __future__ import annotations

from typing import Any

from cosched.registry import POLICIES
from tests.helpers.rounds import snapshot

TRAINING = sorted({p.name for p in POLICIES.plugins() if p.cls.__module__[:10] == "schedulers"})
TRAINING.remove("never")
PAYS = {
    "num_running": 1,
    "num_updates": 20,
    "rounds_since_update": 16,
    "recent_acceptance_length": 2.0,
    "recent_round_seconds": 0.1,
    "expected_tokens_left": 10_000,
    "micro_step_seconds": 0.2,
    "update_gain": 1.02,
}
"""A long text and an update that brings more than it takes."""


def policy(kind: str, **settings: Any) -> Any:
    cls = POLICIES.get(kind)
    return cls(cls.Settings(kind=kind, **settings))


def steps(policy: Any, script: list[dict[str, float]], **always: float) -> list[int]:
    """Micro-steps decided on each snapshot of a script."""
    return [policy.decide(snapshot(**{**always, **seen})).num_steps for seen in script]
