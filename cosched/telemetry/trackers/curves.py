"""What is drawn of an arm, a server or a trainer: its scalars, by request rounds."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from cosched.telemetry.tally import outcome_of, stretch_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cosched.records import RoundRow, VerifyRound
    from cosched.telemetry.metrics import Turn
    from cosched.telemetry.trackers.writing import Trackers

Record = TypeVar("Record", bound=msgspec.Struct)

EVERY = 32  # request rounds of a point, at least
SHARE = 0.005  # of the time that writing points may take

SCALARS = {
    "acceptance/length": "Tokens that a request commits in a round, bonus token included.",
    "acceptance/place_K": "Share of drafts at place K that are accepted, all before them accepted.",
    "draft/version": "The draft version of the newest round.",
    "speed/tokens_per_s": "Tokens a second, all costs included.",
    "speed/exposed_s": "Seconds since the start that requests waited for updates and publications.",
    "update/loss": "Loss of an update's first step, before it has learnt from its own rows.",
    "update/learning_rate": "AdamW's, of that update.",
    "guard/better": "Evidence that learning is better than nothing; at 1 the guard acts.",
    "guard/worse": "The same that it is worse.",
}


class Costs(Protocol):
    """Seconds that requests have waited."""

    @property
    def update_seconds_total(self) -> float: ...

    @property
    def publish_seconds(self) -> float: ...


class Learner(Protocol):
    """What learns; its counters say what that has cost."""

    @property
    def counters(self) -> Costs: ...


class _Decision(msgspec.Struct):
    learning_rate: float | None = None
    rate_share: float = 1.0


class _Losses(msgspec.Struct):
    losses: list[float | None]


class _Evidence(msgspec.Struct):
    evidence_better: float | None = None
    evidence_worse: float | None = None


class Curves:
    """A sink that makes points of what it is told, and has trackers draw them (``SCALARS``).

    The step is the number of request rounds so far. Acceptance and speed are of those since the point before:
    ``EVERY``, and more where writing would take more than ``SHARE`` of the time. An update and a look of the
    guard are points of their own. With ``by_turns`` turns say what tokens took, else the ``clock`` does.
    ``lr`` is the learning rate where a decision names none. Until it is opened it keeps nothing.
    """

    def __init__(
        self, lr: float, by_turns: bool, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.learner: Learner | None = None
        self._lr = self._rate = lr
        self._by_turns = by_turns
        self._clock = clock
        self._trackers: Trackers | None = None
        self._step = self._step_due = 0
        self._version = 0
        self._began = self._due = 0.0
        self._outcomes: dict[int, float] = {}
        self._tokens, self._seconds = 0, 0.0

    def open(self, trackers: Trackers, step: int = 0) -> None:
        """Begin to draw, behind so many request rounds."""
        self._trackers = trackers
        self._step, self._step_due = step, step + EVERY
        self._began = self._clock()

    def observe(self, row: RoundRow) -> None:
        """One request in one round."""
        self._count(row.draft_version, row.num_drafted, row.num_accepted, row.num_committed)

    def observe_round(self, round_: VerifyRound, version: int) -> None:
        """All requests of a round that was drafted by ``version``."""
        for block in round_.blocks:
            self._count(version, len(block.path_K), block.num_accepted, block.num_committed)

    def emit(self, kind: str, **fields: Any) -> None:
        """Events of an arm, as records or as JSON has them."""
        match kind:
            case "decision":
                decision = _as(_Decision, fields["decision"])
                self._rate = decision.rate_share * (decision.learning_rate or self._lr)
            case "update":
                losses = _as(_Losses, fields["result"]).losses
                self._write(
                    {
                        "update/loss": losses[0] if losses else None,
                        "update/learning_rate": self._rate,
                    }
                )
            case "verdict":
                evidence = _as(_Evidence, fields["verdict"])
                self._write(
                    {
                        "guard/better": evidence.evidence_better,
                        "guard/worse": evidence.evidence_worse,
                    }
                )
            case "turn":
                turn: Turn = fields["turn"]
                self._tokens += turn.tokens
                self._seconds += turn.seconds
            case _:
                pass

    def close(self) -> None:
        """Draw what is left, and end."""
        if self._trackers is not None:
            if self._step > self._step_due - EVERY:
                self._point()
            self._trackers.close()
            self._trackers = None

    def _count(self, version: int, drafted: int, accepted: int, committed: int) -> None:
        if self._trackers is None:
            return
        outcome = outcome_of(drafted, accepted, committed)
        self._outcomes[outcome] = self._outcomes.get(outcome, 0) + 1
        self._step += 1
        self._version = version
        if not self._by_turns:
            self._tokens += committed
        if self._step >= self._step_due and self._clock() >= self._due:
            self._point()

    def _point(self) -> None:
        assert self._trackers is not None
        now = self._clock()
        if not self._by_turns:
            self._seconds = now - self._began
        self._write(dict(self._figures()))
        self._outcomes, self._tokens, self._seconds = {}, 0, 0.0
        self._began, self._step_due = now, self._step + EVERY
        self._due = now + self._trackers.write_seconds / SHARE

    def _figures(self) -> Iterator[tuple[str, float | None]]:
        stretch = stretch_of(self._outcomes)
        yield "acceptance/length", stretch.acceptance_length
        for number, place in enumerate(stretch.places, 1):
            yield f"acceptance/place_{number}", place.share
        yield "draft/version", self._version
        if self._seconds:
            yield "speed/tokens_per_s", self._tokens / self._seconds
        if self.learner is not None:
            counters = self.learner.counters
            exposed = counters.update_seconds_total + counters.publish_seconds
            yield "speed/exposed_s", exposed

    def _write(self, scalars: dict[str, float | None]) -> None:
        """What is not known, or no number, is left out."""
        known = {name: value for name, value in scalars.items() if value is not None}
        finite = {name: value for name, value in known.items() if math.isfinite(value)}
        if self._trackers is not None and finite:
            self._trackers.write(self._step, finite)


def _as(kind: type[Record], event: Any) -> Record:
    return msgspec.convert(event, kind, from_attributes=True)
