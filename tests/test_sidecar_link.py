"""A server's link: what it says to a trainer that answers, answers wrongly, or does not answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from cosched.records import VerifyRound
from cosched.sidecar.link import CREDIT, Link, Serving
from cosched.sidecar.messages import (
    Alive,
    FromServer,
    Hello,
    Message,
    RollBack,
    Rounds,
    RowForm,
    Taken,
    Version,
    Welcome,
)
from cosched.sidecar.queue import RoundQueue
from cosched.sidecar.rows import Packer, size_of
from cosched.sidecar.sockets import listening
from cosched.sidecar.wire import Codec

FORM = RowForm(6, 4, "float32", "float32")
LIMIT_S = 15.0
PATIENCE_S = 10.0
M = TypeVar("M", bound=Message)


class Clock:
    """Stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Peer:
    """A trainer that says what the test has it say."""

    def __init__(self, address: str) -> None:
        self._codec: Codec[Any] = Codec(None, FromServer)
        self.socket = listening(address, 1 << 20)
        self.identity = b""
        self.name = ""

    def hears(self, kind: type[M]) -> M:
        """The next message of that kind; others are passed over."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            if self.socket.poll(100):
                self.identity, *frames = self.socket.recv_multipart()
                message, _ = self._codec.decode(frames)
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__}")

    def says(self, message: Message) -> None:
        self.socket.send_multipart([self.identity, *self._codec.encode(message)])

    def welcomes(self) -> Hello:
        """Answer a hello, as a trainer of its own name each time."""
        hello = self.hears(Hello)
        self.name = hello.server
        self.says(Welcome(to=hello.server, trainer="t", shared=False))
        return hello


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    made = Peer(f"ipc://{tmp_path}/s")
    yield made
    made.socket.close(linger=0)


@pytest.fixture
def link(tmp_path: Path, peer: Peer, clock: Clock) -> Iterator[Link]:
    hello = Hello(
        server="",
        draft="d",
        settings={},
        window=None,
        acceptance="a",
        num_draft_tokens=3,
        form=FORM,
        version=0,
        checksum="",
        as_loaded=True,
    )
    made = Link(
        f"ipc://{tmp_path}/s",
        None,
        hello,
        RoundQueue(Packer(FORM, 8, with_blocks=True), 16, size_of(16, FORM)),
        {"w": torch.zeros(2)},
        Serving(0, "", as_loaded=True, weights=dict),
        LIMIT_S,
        clock,
    )
    yield made
    made.close()


def ended(name: str = "one") -> VerifyRound:
    return VerifyRound((), (), (name,), 0.0, 0.0, 1)


def settled(done: Any) -> None:
    until = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < until
        time.sleep(0.01)


def alive_taken(peer: Peer, number: int) -> Taken:
    return Taken(to=peer.name, number=number, version=0, updates=0, skipped_steps=0, loss=None)


def test_what_a_lost_trainer_was_to_do_its_successor_is_not_asked_for(
    link: Link, peer: Peer, clock: Clock
) -> None:
    """Another trainer has other versions under the same numbers."""
    peer.welcomes()
    settled(lambda: link.there)
    link._asked.append(RollBack(version=7))  # as if it came just when the trainer was lost
    clock.now = LIMIT_S + 1
    link._rouse()
    peer.welcomes()
    settled(lambda: link.there)
    clock.now += 1
    link._rouse()
    assert peer.hears(Message).__class__ is Alive


def test_a_trainer_that_answers_all_but_rounds_is_met_anew(
    link: Link, peer: Peer, clock: Clock
) -> None:
    """With as many rounds unanswered as there may be nothing was sent any more, and nothing said so."""
    first = peer.welcomes()
    settled(lambda: link.there)
    for _ in range(CREDIT + 2):
        link.offer(ended(), 0)
    for _ in range(CREDIT):
        assert peer.hears(Rounds)
    for _ in range(4):
        clock.now += LIMIT_S / 3
        peer.says(alive_taken(peer, 0))  # it is there, and has taken nothing
        settled(lambda: link._heard_at == clock.now or not link.there)
        link._rouse()
    second = peer.welcomes()
    assert second.server != first.server
    settled(lambda: link.there)
    link.offer(ended("two"), 0)
    assert peer.hears(Rounds).finished == ("two",)


def test_a_trouble_has_the_same_words_while_it_lasts(link: Link, clock: Clock) -> None:
    """The seconds in it made another line of the log, and another event, of every second."""
    clock.now = LIMIT_S + 1
    first = link.trouble
    clock.now += 100
    assert link.lost
    assert first == link.trouble
    assert "no trainer at ipc://" in str(first)


def version(peer: Peer, number: int) -> Version:
    return Version(
        to=peer.name, version=number, parent=number - 1, checksum="c", as_loaded=True, parts=()
    )


def test_a_version_that_has_come_is_told_of_though_it_does_not_serve(
    link: Link, peer: Peer, clock: Clock
) -> None:
    """A server that was off got the whole draft again every few seconds; so it is also while rounds go."""
    peer.welcomes()
    settled(lambda: link.there)
    peer.says(version(peer, 4))
    settled(lambda: link.received == 4)
    clock.now += 1
    link.offer(ended(), 0)
    alive = peer.hears(Alive)
    while alive.received != 4:
        alive = peer.hears(Alive)
    assert alive.version == 0


def test_who_goes_on_from_an_earlier_run_is_met_as_what_it_serves(link: Link, peer: Peer) -> None:
    """A hello as version 0 had gone out before; what came upon it is older than what serves."""
    first = peer.welcomes()
    settled(lambda: link.there)
    peer.says(version(peer, 5))
    settled(lambda: link.received == 5)
    link.now_serves(Serving(7, "seven", as_loaded=False, weights=dict))
    link.greet_anew()
    hello = peer.welcomes()
    assert (hello.version, hello.checksum, hello.as_loaded) == (7, "seven", False)
    assert hello.server != first.server
    assert link.arrived() is None
