"""What serves where a trainer elsewhere learns: rollbacks, what is told while learning is off, troubles."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest
import torch
from torch import nn

from cosched.errors import PublicationError
from cosched.loop.checksum import checksum
from cosched.loop.publish import InPlacePublisher
from cosched.records import IDLE_TICK, ServedBlock, VerifyRound
from cosched.sidecar.follower import Follower
from cosched.sidecar.link import Arrival
from cosched.sidecar.messages import Taken, Version
from tests.helpers.guarded_runs import Events


class FakeLink:
    """A link to a trainer that is what the test says."""

    def __init__(self, there: bool = True) -> None:
        self.there, self.lost = there, False
        self.trouble: str | None = None
        self.dropped = self.received = 0
        self.taken: Taken | None = None
        self.waiting: Arrival | None = None
        self.asked: list[int] = []
        self.offered: list[tuple[Any, int]] = []
        self.serving: Any = None
        self.greetings, self.takes_s = 0, 0.0

    def offer(self, round_: Any, version: int) -> None:
        time.sleep(self.takes_s)
        self.offered.append((round_, version))

    def arrived(self) -> Arrival | None:
        arrival, self.waiting = self.waiting, None
        return arrival

    def now_serves(self, serving: Any) -> None:
        self.serving = serving

    def greet_anew(self) -> None:
        self.greetings += 1

    def ask_for(self, version: int) -> None:
        self.asked.append(version)

    def comes(self, version: int, weights: dict[str, torch.Tensor] | None, parent: int) -> None:
        """That version has come; without weights it is the draft as loaded."""
        served = LOADED if weights is None else weights
        message = Version(
            version=version,
            parent=parent,
            checksum=checksum(served),
            as_loaded=weights is None,
            parts=(),
        )
        self.received, self.waiting = version, Arrival(message, weights)


LOADED = {"weight": torch.zeros(2, 3)}
LEARNT = {"weight": torch.ones(2, 3)}


def following(there: bool = True, version: int = 0) -> tuple[Follower, FakeLink]:
    """One that serves the draft as loaded, or what was learnt as ``version``."""
    draft = nn.Linear(3, 2, bias=False)
    draft.load_state_dict(LOADED)
    link = FakeLink(there)
    publisher = InPlacePublisher.of_modules(draft, nn.Linear(1, 1))
    follower = Follower(cast("Any", link), publisher, Events())
    if version:
        link.comes(version, LEARNT, version - 1)
        follower.on_round(IDLE_TICK)
        assert served(follower) == 1
    return follower, link


def served(follower: Follower) -> float:
    return float(follower.publisher.served["weight"].detach().mean())


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("learning", [True, False])
def test_the_draft_as_loaded_serves_at_once_when_it_is_asked_for(
    there: bool, learning: bool
) -> None:
    """Off, failed, or without a trainer, "rollback 0" said that it was done and did nothing."""
    follower, link = following(version=3)
    link.there, follower.learning = there, learning
    assert follower.roll_back(0) == 3
    assert served(follower) == 0
    assert follower.counters.serves_loaded
    assert (link.serving.version, link.serving.as_loaded) == (3, True)
    assert link.serving.checksum == checksum(LOADED)
    assert link.asked == ([0] if there else [])


def test_what_is_served_as_loaded_is_no_evidence_for_the_version_of_that_number() -> None:
    """A trainer has other weights under it; what serves as 0 it knows for the draft as loaded."""
    follower, link = following(version=3)
    follower.roll_back(0)
    round_ = VerifyRound((), (), ("one",), 0.0, 0.0, 1)
    follower.on_round(round_)
    link.comes(4, None, parent=0)
    follower.on_round(IDLE_TICK)
    follower.on_round(round_)
    assert [version for _, version in link.offered] == [0, 4]


def test_without_a_trainer_no_other_version_can_be_had() -> None:
    """It was left for whichever trainer came next, to which that number may be another draft."""
    follower, link = following(there=False)
    with pytest.raises(PublicationError, match="none is there"):
        follower.roll_back(2)
    assert link.asked == []


def test_a_version_that_the_trainer_has_not_kept_is_refused_here() -> None:
    """Only the trainer's log said so."""
    follower, link = following(version=3)
    link.taken = Taken(number=0, version=3, updates=3, skipped_steps=0, loss=None, kept=(2, 3))
    with pytest.raises(PublicationError, match="there are 0, 2, 3"):
        follower.roll_back(1)
    follower.roll_back(2)
    assert link.asked == [2]


def test_while_off_what_was_asked_for_serves_and_nothing_after_it() -> None:
    """A rollback was never taken in while learning was off; other versions still are not."""
    follower, link = following(version=3)
    follower.learning = False
    link.comes(4, LEARNT, parent=3)
    follower.on_round(IDLE_TICK)
    assert follower.version == 3
    follower.roll_back(0)
    follower.on_round(IDLE_TICK)
    link.comes(6, None, parent=0)
    follower.on_round(IDLE_TICK)
    assert (follower.version, served(follower)) == (6, 0)
    link.comes(7, LEARNT, parent=6)
    follower.on_round(IDLE_TICK)
    assert (follower.version, served(follower)) == (6, 0)


def test_what_a_lost_trainer_was_asked_for_is_not_waited_for() -> None:
    """Another trainer's versions are none that anybody has asked for."""
    follower, link = following(version=3)
    follower.learning = False
    follower.roll_back(0)
    link.there = False
    follower.on_round(IDLE_TICK)
    link.there = True
    link.comes(9, LEARNT, parent=8)
    follower.on_round(IDLE_TICK)
    assert served(follower) == 0


@pytest.mark.parametrize("tells", [True, False])
def test_a_trouble_is_told_once_or_by_who_asks_for_it(tells: bool) -> None:
    """A server wrote two events of one loss."""
    follower, link = following()
    follower.tells = tells
    link.lost, link.trouble = True, "nobody is there"
    for _ in range(3):
        follower.on_round(IDLE_TICK)
    assert follower.trouble == "nobody is there"
    told = cast("Events", follower.sink).of("warning")
    assert told == ([{"reason": "nobody is there"}] if tells else [])


def test_who_has_finished_is_told_while_learning_is_off() -> None:
    """The trainer kept their rows, and counted them among those that run."""
    follower, link = following()
    follower.learning = False
    block = ServedBlock("two", 7, torch.tensor([1]), None, 1, 2)
    follower.on_round(VerifyRound((), (block,), (), 0.5, 0.5, 2))
    assert link.offered == []
    follower.on_round(VerifyRound((), (block,), ("one",), 0.5, 0.5, 1))
    ((round_, _),) = link.offered
    assert (round_.finished, round_.blocks, round_.num_running) == (("one",), (), 1)


def test_a_run_that_goes_on_says_what_it_serves() -> None:
    """It served version 3 and said hello as 0, so the trainer's version 1 would never have come."""
    was, _ = following(version=3)
    follower, link = following()
    follower.restore(*was.state())
    assert (follower.version, served(follower)) == (3, 1)
    assert (link.serving.version, link.serving.as_loaded) == (3, False)
    assert link.serving.checksum == checksum(LEARNT)
    assert torch.equal(link.serving.weights()["weight"], LEARNT["weight"])
    assert link.greetings == 1


def test_the_copy_that_decoding_waits_for_is_learnings_time() -> None:
    """It was nobody's, so that an arm that hands rows over looked slower for no reason."""
    follower, link = following()
    link.takes_s = 0.02
    follower.on_round(VerifyRound((), (), ("one",), 0.0, 0.0, 1))
    follower.on_round(IDLE_TICK)  # nothing goes
    assert follower.counters.update_seconds_total >= 0.02
