"""A server between requests: what it is charged for, and whom it takes to be running."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cosched.coscheduler import Coscheduler
from cosched.engines.sglang import compat
from cosched.engines.sglang.worker.adaptation import Adaptation
from cosched.engines.sglang.worker.collector import RoundCollector
from cosched.engines.sglang.worker.operator import NullOperator
from cosched.guard.guard import FiniteGuard
from cosched.loop.replay import ReplayBuffer, ReplayLimits
from cosched.records import Decision, Snapshot, UpdateResult
from cosched.telemetry.tally import Tally
from cosched.testing.harness import Every, NoEvents
from cosched.training.ranks import Ranks
from tests.helpers.costly import Costly
from tests.helpers.policies import policy
from tests.helpers.rounds import round_of
from tests.helpers.verified import K, prompt, verified

DECIDING = 0.01  # seconds
IDLE = round_of([], seconds=0)  # a tick in which nothing runs

# --- what is charged ------------------------------------------------------------------------


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
        subject.on_round(IDLE)
    assert subject.counters.update_seconds_total == 0
    for _ in range(10):
        subject.on_round(round_of([2]))
    assert len(costly.begun) == 1
    assert subject.counters.update_seconds_total == pytest.approx(DECIDING + 0.7)


def test_an_update_beside_the_engine_costs_what_the_engine_waited() -> None:
    """To hand it over and to take it back; looks that find it under way are free."""
    beside = Beside()
    subject = coscheduler(beside, policy("every_n_rounds", rounds=1))
    subject.on_round(round_of([2]))
    assert subject.counters.update_seconds_total == pytest.approx(DECIDING + 0.05)
    for _ in range(2):
        subject.on_round(IDLE)
    assert subject.counters.update_seconds_total == pytest.approx(DECIDING + 0.05)
    subject.on_round(IDLE)
    assert subject.counters.updates == 1
    assert subject.counters.update_seconds_total == pytest.approx(DECIDING + 0.051)
    assert subject.counters.background_seconds == 0.7


@pytest.mark.parametrize("ticks", [0, 10_000])
def test_who_has_idled_learns_as_if_it_had_not(ticks: int) -> None:
    """``earned`` makes a trial when there is time for it: a few minutes of idle ticks, charged as training, would
    have spent it, and the draft would never learn again."""
    costly = Costly()
    subject = coscheduler(costly, policy("earned", rounds=4, explore_share=0.2))
    for _ in range(4):
        subject.on_round(round_of([2], seconds=0.1))
    for _ in range(ticks):
        subject.on_round(IDLE)
    for _ in range(400):
        subject.on_round(round_of([2], seconds=0.1))
    assert len(costly.begun) == 6


# --- who runs -------------------------------------------------------------------------------

ANCHORS = 32


class Scheduler:
    """SGLang's scheduler as far as ``compat.gone`` looks at it, one request at a time.

    It says of a request that has finished what SGLang says: nothing where the prompt was its end.
    """

    def __init__(self, policy: Any) -> None:
        self.chunked_req = None
        self.waiting_queue: list[Any] = []
        self.anchors = 0  # of the newest update
        self.buffer = ReplayBuffer(
            ReplayLimits(64, ANCHORS, K, 64 * 100, 1 << 30, 0, 8), "delayed", None
        )
        costly: Any = Costly()
        costly.update = self._update
        self.coscheduler = Coscheduler(
            self.buffer, policy, costly, FiniteGuard(), costly, NoEvents(), False
        )
        self.adaptation = Adaptation(
            algorithm="COSCHED_EAGLE3",
            coscheduler=self.coscheduler,
            collector=RoundCollector(),
            ranks=Ranks(0, [0], torch.device("cpu")),
            watches=True,
            window=64,
            save=lambda _path: None,
            operator=NullOperator(),
            sink=NoEvents(),
            tally=Tally(lambda: 0.0),
        )

    def _update(self, batch: Any, _decision: Decision) -> UpdateResult:
        self.anchors = int((batch.weights_RNK[..., 0] > 0).sum())
        return UpdateResult(1, 0, (1.0,), 1, 0.0)

    def plan(self, *running: str) -> None:
        reqs = [SimpleNamespace(rid=name) for name in running]
        batch = SimpleNamespace(reqs=reqs) if reqs else None
        plan = SimpleNamespace(running_batch=SimpleNamespace(reqs=[]), batch_to_run=batch)
        self.adaptation.chose(0, lambda known: compat.gone(known, plan, self))

    def serve(self, name: str, num_rounds: int) -> None:
        self.plan(name)
        self.adaptation.step()
        self.adaptation.prefilled(lambda: (prompt(name, 0, 8, 8),))
        for number in range(num_rounds):
            self.plan(name)
            self.adaptation.step()
            self.adaptation.verified(lambda n=number: verified(name, anchor=8 + 2 * n))
            self.adaptation.counted([1])
        if num_rounds:
            self.adaptation.finished(name)

    def idle(self) -> None:
        self.plan()
        self.adaptation.idle()
        assert self.adaptation.status().failure is None


@pytest.mark.parametrize("idle_between", [True, False])
def test_requests_that_end_with_their_prompt_take_no_anchors(idle_between: bool) -> None:
    """``max_tokens: 1``, and SGLang's health checks. Of their end SGLang tells no worker: taken to
    run for ever, forty of them left one anchor of 32 to the requests that did run."""
    scheduler = Scheduler(Every(4))
    scheduler.serve("before", 40)
    assert scheduler.anchors == ANCHORS
    for number in range(40):
        scheduler.serve(f"one-{number}", 0)
        if idle_between:
            scheduler.idle()
    scheduler.serve("after", 40)
    assert scheduler.anchors == ANCHORS
    scheduler.idle()
    assert scheduler.buffer.num_tokens == 0


def test_the_last_requests_are_over_when_nothing_runs() -> None:
    """Not only with the next round: until then nothing would be known of their end, and their rows
    would be kept."""
    scheduler = Scheduler(Every(1000))
    scheduler.serve("a", 4)
    assert scheduler.buffer.num_tokens > 0
    scheduler.idle()
    assert scheduler.coscheduler.counters.finished == 1
    assert scheduler.buffer.num_tokens == 0
    scheduler.idle()
    assert scheduler.coscheduler.counters.finished == 1


def test_a_prompt_without_a_round_holds_no_memory() -> None:
    """Its rows wait for the counts of a verification, which for some traffic never comes."""
    scheduler = Scheduler(Every(1000))
    collector = scheduler.adaptation._collector
    for number in range(40):
        scheduler.serve(f"one-{number}", 0)
    assert collector.requests == {"one-39"}
    scheduler.idle()
    assert not collector._waiting


def test_whom_a_scheduler_still_has() -> None:
    """In the batch, running beside it, in pieces, or waiting: none of them has finished. What its
    own fields say of running requests is one round old when it plans."""
    named = {
        name: SimpleNamespace(rid=name) for name in ("batch", "runs", "pieces", "waits", "old")
    }
    plan = SimpleNamespace(
        running_batch=SimpleNamespace(reqs=[named["runs"]]),
        batch_to_run=SimpleNamespace(reqs=[named["batch"]]),
    )
    scheduler = SimpleNamespace(
        chunked_req=named["pieces"],
        waiting_queue=[named["waits"]],
        running_batch=SimpleNamespace(reqs=[named["old"]]),
    )
    assert compat.gone({*named, "over"}, plan, scheduler) == {"old", "over"}
    assert compat.gone({"batch", "waits"}, plan, scheduler) == set()
    assert compat.gone(set(), plan, scheduler) == set()


def test_who_ends_while_learning_is_off_has_ended() -> None:
    """Switched on again, the learner must not go on sharing its anchors with them."""
    scheduler = Scheduler(Every(4))
    for number in range(8):
        scheduler.serve(f"a-{number}", 4)
        scheduler.coscheduler.learning = False
        scheduler.idle()
        scheduler.coscheduler.learning = True
    assert scheduler.buffer.num_tokens == 0
    scheduler.serve("after", 40)
    assert scheduler.anchors == ANCHORS


@pytest.mark.parametrize(("max_tokens", "evicted"), [(64, 3), (128, 0)])
def test_the_status_counts_requests_without_room_in_the_buffer(
    max_tokens: int, evicted: int
) -> None:
    """Two that take turns in the room of one learn nothing, and nothing else would say so: each is
    dropped for the other, in the prompt and in the round behind it."""
    scheduler = Scheduler(Every(1000))
    scheduler.buffer.limits = replace(scheduler.buffer.limits, max_tokens=max_tokens)
    scheduler.plan("a", "b")
    scheduler.adaptation.prefilled(lambda: (prompt("a", 0, 8, 8), prompt("b", 0, 8, 8)))
    scheduler.adaptation.verified(lambda: verified("a", "b", anchor=8))
    scheduler.adaptation.counted([1, 1])
    scheduler.adaptation.step()
    assert scheduler.adaptation.status().evicted_requests == evicted
