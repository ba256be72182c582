"""What stands in a server for the co-scheduler where a trainer elsewhere does the learning."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cosched.errors import PublicationError
from cosched.loop.counters import Counters
from cosched.sidecar.versions import Serving

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from cosched.loop.publish import InPlacePublisher
    from cosched.loop.roles import Sink
    from cosched.records import VerifyRound
    from cosched.sidecar.link import Link
    from cosched.sidecar.together import Together
    from cosched.sidecar.versions import Arrival


@dataclass(frozen=True, slots=True)
class _Asked:
    """An operator wants to go back ``to`` a version; ``newest`` had come by then."""

    to: int
    newest: int


@dataclass(eq=False)
class Follower:
    """Hands rounds over, counts them, and publishes what comes: each of it at the end of a round.

    It waits for nobody. Without a trainer the last good draft goes on serving; ``trouble`` says so, and
    the sink is told of it where ``tells``: otherwise whoever asks for it does that. Ranks of a server go
    ``together``.
    """

    link: Link
    publisher: InPlacePublisher
    sink: Sink
    tells: bool = True
    together: Together | None = None
    counters: Counters = field(default_factory=Counters, init=False)
    learning: bool = field(default=True, init=False)  # off: rounds are counted, and nothing else
    busy: bool = field(default=False, init=False)  # with nothing that anybody would wait for
    _alone: bool = field(default=False, init=False)  # as loaded, under a number that is another's
    _asked: _Asked | None = field(default=None, init=False)
    _told: str | None = field(default=None, init=False)

    def on_round(self, round_: VerifyRound) -> None:
        """One walk, after a round, a prefill, or a tick in which nothing ran."""
        self.counters.observe(round_)
        if self.learning:
            self._hand_over(round_)
        elif round_.finished:  # the trainer has their rows, and a place for each
            self._offer(replace(round_, segments=(), blocks=()))
        if not self.link.there:
            self._asked = None
        self._take_in(wanted=self.learning or self._asked is not None)
        if self.tells:
            self._note_trouble()

    def roll_back(self, version: int) -> int:
        """Ask the trainer to have an earlier version served, everywhere; the version that serves now.

        The draft as loaded, 0, serves here at once, under the number that serves now; without a
        trainer it serves here alone, until one publishes something.

        Raises:
            PublicationError: no trainer is there that could be asked, or it has not kept that version.
        """
        if version:
            self._check_kept(version)
        elif self.version and not self.counters.serves_loaded:
            self._serve_loaded()
        if self.link.there:
            if self._speaks:
                self.link.ask_for(version)
            self._asked = _Asked(version, max(self.version, self.link.received))
        self.counters.rolled_back += 1
        return self.version

    def _check_kept(self, version: int) -> None:
        if not self.link.there:
            raise PublicationError(
                f"version {version} is a trainer's, and none is there; only 0, the draft as loaded, is here"
            )
        kept = self.link.taken.kept if self.link.taken else ()
        if version not in kept:
            known = ", ".join(map(str, [0, *kept]))
            raise PublicationError(f"version {version} is not kept; there are {known}")

    def _serve_loaded(self) -> None:
        done = self.publisher.publish(self.publisher.weights_of(0), self.version)
        self.counters.serves_loaded = self._alone = True
        self._say_serving(done.version, done.draft_checksum)
        self.sink.emit("publication", round=self.counters.rounds, version=done, parent=0)

    @property
    def version(self) -> int:
        return self.publisher.version

    @property
    def trouble(self) -> str | None:
        """Why nothing is learnt just now; None where something is, or a start still may be."""
        return self.link.trouble if self.link.lost else None

    def state(self, with_rows: bool = False) -> tuple[Counters, int, Mapping[str, Tensor]]:  # noqa: ARG002
        """What a later run serves from; what is learnt, and the rows, are the trainer's."""
        return self.counters, self.version, self.publisher.state()

    def restore(self, counters: Counters, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Go on from an earlier run's ``state()``."""
        self.counters = counters
        self.publisher.restore(tensors, version)
        if version:
            self._say_serving(version, self.publisher.draft_checksum())
            self.link.greet_anew()

    def _hand_over(self, round_: VerifyRound) -> None:
        if round_.segments or round_.blocks or round_.finished:
            self._offer(round_)
        counters, taken = self.counters, self.link.taken
        counters.dropped = self.link.dropped
        if taken is not None and taken.updates != counters.updates:
            counters.updates, counters.skipped_steps = taken.updates, taken.skipped_steps
            counters.losses[:] = [taken.loss]

    @property
    def _speaks(self) -> bool:
        """Whether the trainer hears of rounds from here."""
        return self.together is None or self.together.first

    def _offer(self, round_: VerifyRound) -> None:
        if not self._speaks:
            return
        version = 0 if self._alone else self.version  # 0: the draft as loaded, for every trainer
        started = time.perf_counter()
        self.link.offer(round_, version)
        self.counters.update_seconds_total += time.perf_counter() - started

    def _take_in(self, wanted: bool) -> None:
        """Publish what has come; what was asked for is in it, or in what it was learnt from."""
        if self.together is not None:
            arrival = self.together.agreed(self.link.arrived(), wanted)
        else:
            arrival = self.link.arrived() if wanted else None
        if arrival is None:
            return
        parent = arrival.version.parent
        if self._asked is not None and (parent == self._asked.to or parent > self._asked.newest):
            self._asked = None
        self._publish(arrival)

    def _publish(self, arrival: Arrival) -> None:
        """Between two rounds; proven by the trainer's checksum, or undone.

        Raises:
            PublicationError: what serves then is not what the trainer has.
        """
        message, weights = arrival.version, arrival.weights
        own = self.publisher.weights_of(0) if weights is None else weights
        done = self.publisher.publish(own, message.version)
        if done.draft_checksum != message.checksum:
            self.publisher.publish(self.publisher.weights_of(0), message.version)
            raise PublicationError(
                f"version {message.version} has the checksum {done.draft_checksum} here and "
                f"{message.checksum} at the trainer; the draft as loaded serves"
            )
        self.counters.publish_seconds += done.seconds
        self.counters.serves_loaded, self._alone = message.as_loaded, False
        self._say_serving(done.version, done.draft_checksum)
        self.sink.emit(
            "publication", round=self.counters.rounds, version=done, parent=message.parent
        )

    def _say_serving(self, version: int, draft_checksum: str) -> None:
        publisher = self.publisher
        self.link.now_serves(
            Serving(
                version,
                draft_checksum,
                self.counters.serves_loaded,
                lambda: publisher.weights_of(version),
            )
        )

    def _note_trouble(self) -> None:
        """Say it once, and that it is over."""
        trouble = self.trouble
        if (trouble is None) == (self._told is None):
            return
        self._told = trouble
        self.sink.emit("warning", reason=trouble or "a trainer is there again")
