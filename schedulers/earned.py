"""A cadence that lives on what it earns."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from cosched.protocols import Policy
from cosched.records import Decision, Snapshot
from cosched.registry import POLICIES
from schedulers.costs import CostAwareSettings, expected_update_seconds
from schedulers.idle import when_idle

Share = Annotated[float, Meta(ge=0, le=1)]


class EarnedSettings(CostAwareSettings, frozen=True, kw_only=True):
    """At most one update in ``rounds``, of ``num_steps`` micro-steps.

    What ``credit_rounds`` take to draft and verify may be spent in advance on each kind of text, and
    ``explore_share`` of the time on it; ``reinvested_share`` of what learning has earned there may go into more
    of it. ``idle_steps`` are taken once when the last request has finished.
    """

    rounds: Annotated[int, Meta(ge=1)] = 16
    credit_rounds: Annotated[int, Meta(ge=1)] = 48
    explore_share: Share = 0.005
    reinvested_share: Share = 0.5
    idle_steps: Annotated[int, Meta(ge=0)] = 0


@POLICIES.register("earned")
class Earned(Policy):
    """Trains as long as learning pays its own way, here.

    With U seconds spent on updates and their judgement so far, U' for one more, V seconds of drafting and
    verifying in rounds of C seconds, and E seconds that learning has saved, it trains while

        U + U' <= credit_rounds C + explore_share V + reinvested_share E

    In a second of serving, a draft whose acceptance length is g times that of the draft as loaded
    does what that one would have needed g seconds for: it saves g - 1. E is their sum, with g as a
    guard of kind ``shadow`` scores it on the same rows, less a standard error. So whatever the text,
    what learning costs in all is at most the credit and a small share more than what it brings: where
    there is nothing to learn it all but stops, and where there is, it earns the means to go on. The
    dearer updates are, the fewer are on credit. Without such a guard nothing is ever earned.

    U, V and E are of text like this, told apart by how well the draft as loaded does on it
    (``Standing.level``): what one kind of text has earned is not spent on another, and what one that
    has nothing to teach has cost leaves the next its own credit.
    """

    Settings = EarnedSettings
    needs_scores = True

    def __init__(self, settings: EarnedSettings) -> None:
        self.settings = settings
        self.idle_steps = settings.idle_steps

    def decide(self, snapshot: Snapshot) -> Decision:
        settings = self.settings
        if snapshot.num_running == 0:
            return when_idle(snapshot, self.idle_steps)
        if snapshot.rounds_since_update < settings.rounds:
            return Decision(num_steps=0)
        after = snapshot.seconds_learning_here + expected_update_seconds(snapshot, settings)
        served, earned = snapshot.seconds_serving_here, snapshot.seconds_earned_here
        round_seconds = (snapshot.seconds_drafting + snapshot.seconds_verifying) / max(
            1, snapshot.round_index
        )
        free = settings.credit_rounds * round_seconds + settings.explore_share * served
        if after > free + settings.reinvested_share * earned:
            return Decision(num_steps=0)
        return Decision(settings.num_steps, reason=f"{earned:.1f} s earned on such text so far")
