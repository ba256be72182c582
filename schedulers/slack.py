"""A cadence for a server with clients: train where there is room."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from cosched.protocols import Policy
from cosched.records import Decision, Snapshot
from cosched.registry import POLICIES
from schedulers.costs import CostAwareSettings, expected_update_seconds
from schedulers.idle import when_idle


class SlackSettings(CostAwareSettings, frozen=True, kw_only=True):
    """There is room while no more than ``max_running`` requests run and ``max_queued`` wait.

    ``budget_ms`` is what training may add to a round, on the average since the last update; a
    single update stops the engine for longer, by ``num_steps`` micro-steps. ``max_queued`` means
    something where the engine reports its queue. ``idle_steps`` are taken once when the last request
    has finished.
    """

    max_running: Annotated[int, Meta(ge=1)] = 4
    max_queued: Annotated[int, Meta(ge=0)] = 0
    budget_ms: Annotated[float, Meta(gt=0)] = 2.0
    idle_steps: Annotated[int, Meta(ge=0)] = 0
    max_time_share: Annotated[float, Meta(gt=0, le=1)] = 0.2


@POLICIES.register("slack")
class Slack(Policy):
    """Trains when few requests run, none waits, and the latency budget pays for it.

    It trains when U <= n b: U seconds for an update of ``num_steps`` as measured, n rounds since the
    last one, b the budget of a round. So a dear update comes seldom rather than never, and what a
    spike of load puts off is made up for by one update, not by many: n starts again with each.
    """

    Settings = SlackSettings

    def __init__(self, settings: SlackSettings) -> None:
        self.settings = settings
        self.idle_steps = settings.idle_steps

    def decide(self, snapshot: Snapshot) -> Decision:
        settings = self.settings
        if snapshot.num_running == 0:
            return when_idle(snapshot, self.idle_steps)
        busy = (
            snapshot.num_running > settings.max_running or snapshot.num_queued > settings.max_queued
        )
        saved = snapshot.rounds_since_update * settings.budget_ms / 1000
        cost = expected_update_seconds(snapshot, settings)
        if busy or cost > saved:
            return Decision(num_steps=0)
        return Decision(settings.num_steps, reason=f"{1000 * cost:.0f} ms, within the budget")
