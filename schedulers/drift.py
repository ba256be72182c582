"""A cadence for text that moves: train when acceptance has fallen, until it is back."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from cosched.protocols import Policy, PolicySettings
from cosched.records import Decision, Snapshot
from cosched.registry import POLICIES


class DriftSettings(PolicySettings, frozen=True, kw_only=True):
    """``threshold_tokens`` a request has lost before training begins; ``rounds`` between updates.

    Each update takes ``num_steps`` micro-steps.
    With four drafts a round, one request, and one draft in two accepted, 30 tokens are lost by
    chance once in more than 4,000 rounds; when it becomes one in five, within 100
    (``tests/test_policies.py``). A batch has less noise and can do with less.
    """

    threshold_tokens: Annotated[float, Meta(gt=0)] = 30.0
    rounds: Annotated[int, Meta(ge=1)] = 16
    num_steps: Annotated[int, Meta(ge=1)] = 1


@POLICIES.register("drift")
class Drift(Policy):
    """Trains while the acceptance length has fallen and not yet recovered.

    It trains while g >= h, h being ``threshold_tokens`` and g the shortfall: the sum over rounds of
    (reference - acceptance length - tolerance), never below zero, and zero again once the recent
    length is within the tolerance of the reference (E. S. Page, Continuous inspection schemes,
    Biometrika 41, 1954; the Page-Hinkley test). Why a sum: a round alone says little, and a fall
    that lasts must show however small it is. The reference is a mean over 5,000 rounds that drafted
    as many tokens: slow enough to show the decay of one long answer, and where training does not help
    it follows in the end, and training stops. A draft that was poor from the first round on has not fallen: take another
    policy for it.
    """

    Settings = DriftSettings

    def __init__(self, settings: DriftSettings) -> None:
        self.settings = settings

    def decide(self, snapshot: Snapshot) -> Decision:
        fallen = snapshot.acceptance_shortfall >= self.settings.threshold_tokens
        if not fallen or snapshot.rounds_since_update < self.settings.rounds:
            return Decision(num_steps=0)
        lost = snapshot.acceptance_shortfall
        return Decision(self.settings.num_steps, reason=f"acceptance fell, {lost:.0f} tokens lost")
