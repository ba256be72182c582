"""The cap on the time that updates take, whatever the policy."""

from __future__ import annotations

from typing import Any

import pytest

from cosched.build.coscheduler import build_coscheduler
from cosched.coscheduler import Coscheduler
from cosched.engines.embedded.target import Target
from cosched.guard.guard import FiniteGuard
from cosched.loop.budget import WithinTimeShare
from cosched.records import Decision, Snapshot
from cosched.settings.load import load_config
from cosched.testing.harness import NoEvents
from tests.helpers.costly import Costly
from tests.helpers.drafts import make_drafter
from tests.helpers.paths import QUICKSTART
from tests.helpers.policies import PAYS, TRAINING, policy, steps
from tests.helpers.rounds import round_of


class Always:
    def decide(self, seen: Snapshot) -> Decision:
        return Decision(1, reason="always")


def coscheduler(costly: Any, inner: Any, share: float) -> Coscheduler:
    return Coscheduler(
        costly, WithinTimeShare(inner, share), costly, FiniteGuard(), costly, NoEvents(), False,
        clock=lambda: costly.now,
    )  # fmt: skip


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_updates_stay_within_their_share(share: float) -> None:
    """From the beginning of any update to that of any later one; and all of the share is used."""
    costly = Costly()
    subject = coscheduler(costly, Always(), share)
    for _ in range(5000):
        subject.on_round(round_of([2], seconds=0.05))
    assert len(costly.begun) > 2
    for begun, ended in zip(costly.begun, costly.begun[1:], strict=False):
        # A second for each; a round of 0.05 s more at most, and rounding.
        assert 1 / share - 1e-6 <= ended - begun <= max(1 / share, 1) + 0.05 + 1e-6


def test_a_quiet_time_saves_nothing_up() -> None:
    """After a thousand rounds without one, updates come no closer together than ever."""
    costly = Costly()
    subject = coscheduler(costly, policy("every_n_rounds", rounds=1000), 0.1)
    for _ in range(1000):
        subject.on_round(round_of([2], seconds=0.1))
    subject.policy = WithinTimeShare(Always(), 0.1)
    for _ in range(200):
        subject.on_round(round_of([2], seconds=0.1))
    assert 2 <= len(costly.begun) <= 4


@pytest.mark.parametrize("kind", TRAINING)
def test_the_cap_holds_for_every_policy_that_is_built(kind: str, target: Target) -> None:
    """A state in which each would train: not before the last update is paid for."""
    config = load_config(
        QUICKSTART,
        [
            f"adapt.policy.kind={kind}",
            "adapt.policy.max_time_share=0.25",
            "adapt.guard.kind=shadow",
            "adapt.replay.keep_finished=true",
        ],
    )
    built = build_coscheduler(config, target, make_drafter(target), None, None, NoEvents())
    would = {**PAYS, "rounds_since_update": 100, "tokens_since_update": 1000}
    would |= {
        "acceptance_shortfall": 1000,
        "last_update_seconds": 1.0,
        "requests_since_update": 100,
    }
    would |= {"seconds_earned_here": 1000.0}
    script = [{"serving_seconds_since_update": s} for s in (0.0, 2.9, 3.1)]
    decided = steps(built.policy, script, **would)
    assert decided[:2] == [0, 0]
    assert decided[2] > 0
