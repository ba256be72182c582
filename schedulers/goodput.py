"""A cadence that asks whether an update will pay."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from cosched.protocols import Policy
from cosched.records import Decision, Snapshot
from cosched.registry import POLICIES
from schedulers.costs import CostAwareSettings, expected_rounds_left, expected_update_seconds


class GoodputSettings(CostAwareSettings, frozen=True, kw_only=True):
    """At most one update in ``rounds``, of ``num_steps`` micro-steps.

    The first ``exploratory_updates`` are made to learn what updates bring; later, one that does not
    seem to pay is tried all the same after ``retry_rounds``. ``horizon_rounds`` is how long a gain
    is counted at most, because text moves on.
    """

    rounds: Annotated[int, Meta(ge=1)] = 16
    exploratory_updates: Annotated[int, Meta(ge=1)] = 8
    retry_rounds: Annotated[int, Meta(ge=1)] = 1024
    horizon_rounds: Annotated[int, Meta(ge=1)] = 256
    max_time_share: Annotated[float, Meta(gt=0, le=1)] = 0.2


@POLICIES.register("goodput")
class Goodput(Policy):
    """Trains while the tokens to be gained outweigh what an update costs.

    With rounds of C0 seconds that commit t0 tokens a request, and updates of U seconds each of which
    serves S rounds at t1 tokens, adapting commits more per second if

        t1 / t0 > 1 + (delta + U / S) / C0

    (the break-even of test-time speculation: t1 / (C0 + delta + U / S) > t0 / C0). Here t1 / t0 is
    the moving mean of what recent updates brought, by the guard's scores where it has them; C0 the
    recent seconds drafting and verifying; U the measured cost of micro-steps and publication; S the
    rounds that running requests have left, expected tokens / t1, up to ``horizon_rounds``. delta,
    which watching adds to a round, is paid whether or not this update is made and is inside C0.
    Nothing is counted for requests to come, and an update is supposed to bring nothing until
    updates have shown otherwise.
    """

    Settings = GoodputSettings

    def __init__(self, settings: GoodputSettings) -> None:
        self.settings = settings

    def decide(self, snapshot: Snapshot) -> Decision:
        settings, gain = self.settings, snapshot.update_gain
        rounds_left = expected_rounds_left(snapshot, gain)
        if min(snapshot.rounds_since_update, rounds_left) < settings.rounds:
            return Decision(num_steps=0)
        if snapshot.num_updates < settings.exploratory_updates:
            return Decision(settings.num_steps, reason="to learn what an update brings")
        cost = expected_update_seconds(snapshot, settings)
        served = min(rounds_left, settings.horizon_rounds) * snapshot.recent_round_seconds
        if (gain - 1) * served > cost:
            return Decision(settings.num_steps, reason=f"a gain of {gain - 1:.2%} pays")
        if snapshot.rounds_since_update >= settings.retry_rounds:
            return Decision(settings.num_steps, reason="to see whether updates pay by now")
        return Decision(num_steps=0)
