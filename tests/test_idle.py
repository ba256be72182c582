"""What a server is charged for while nobody asks it for anything."""

from __future__ import annotations

from typing import Any

import pytest

from cosched.coscheduler import Coscheduler
from cosched.guard import FiniteGuard
from cosched.records import Decision, Snapshot, UpdateResult
from cosched.testing.harness import NoEvents
from tests.test_policies import Costly, policy, round_of

DECIDING = 0.01  # seconds


class Thinking:
    """Another policy, which takes its time."""

    def __init__(self, costly: Costly, inner: Any) -> None:
        self._costly = costly
        self._inner = inner

    def decide(self, seen: Snapshot) -> Decision:
        self._costly.now += DECIDING
        return self._inner.decide(seen)


class Beside(Costly):
    """Its updates are done in the background, after three looks at each; a look takes 1 ms."""

    looks = 3

    @property
    def busy(self) -> bool:
        return bool(self.begun)

    def update(self, batch: Any, decision: Decision) -> None:
        self.begun.append(self.now)
        self.now += 0.05  # to hand it over

    def finished(self) -> UpdateResult | None:
        self.now += 0.001
        self.looks -= 1
        if self.looks:
            return None
        self.begun.clear()
        return UpdateResult(1, 0, (1.0,), 1, 0.7)


def coscheduler(costly: Any, inner: Any) -> Coscheduler:
    return Coscheduler(
        costly, Thinking(costly, inner), costly, FiniteGuard(), costly, NoEvents(), False,
        clock=lambda: costly.now,
    )  # fmt: skip


def test_only_updates_are_charged_as_learning() -> None:
    """To be asked and to decline is free, with requests or without: a scheduler asks twenty times a
    second for as long as it idles."""
    costly = Costly()
    subject = coscheduler(costly, policy("every_n_rounds", rounds=20))
    for _ in range(10):
        subject.on_round(round_of([2]))
    for _ in range(1000):
        subject.learn(num_running=0)
    assert subject.totals.update_seconds == 0
    for _ in range(10):
        subject.on_round(round_of([2]))
    assert len(costly.begun) == 1
    assert subject.totals.update_seconds == pytest.approx(DECIDING + 0.7)


def test_an_update_beside_the_engine_costs_what_the_engine_waited() -> None:
    """To hand it over and to take it back; looks that find it under way are free."""
    beside = Beside()
    subject = coscheduler(beside, policy("every_n_rounds", rounds=1))
    subject.on_round(round_of([2]))
    assert subject.totals.update_seconds == pytest.approx(DECIDING + 0.05)
    for _ in range(2):
        subject.learn(num_running=0)
    assert subject.totals.update_seconds == pytest.approx(DECIDING + 0.05)
    subject.learn(num_running=0)
    assert subject.totals.updates == 1
    assert subject.totals.update_seconds == pytest.approx(DECIDING + 0.051)
    assert subject.totals.background_seconds == 0.7


@pytest.mark.parametrize("ticks", [0, 10_000])
def test_who_has_idled_learns_as_if_it_had_not(ticks: int) -> None:
    """``earned`` has a credit of 48 rounds: a few minutes of idle ticks, charged as training, would
    spend it, and the draft would never learn again."""
    costly = Costly()
    subject = coscheduler(costly, policy("earned", rounds=4))
    for _ in range(4):
        subject.on_round(round_of([2], seconds=0.1))
    for _ in range(ticks):
        subject.learn(num_running=0)
    for _ in range(400):
        subject.on_round(round_of([2], seconds=0.1))
    assert len(costly.begun) == 4  # a credit of 4.8 s, of which each takes 1.01 s
