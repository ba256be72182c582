"""What rounds brought: by place in the draft, by depth of the answer, by draft version. All bounded.

A *request round* is one request in one verification round; everything here counts those. A request
round is one addition into a table of outcomes and two into sums, and the figures are made of them when
somebody asks, because a server has thousands of them a second.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec

from cosched.telemetry.metrics import POSITION_EDGES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cosched.records import RoundRow

BLOCK = 256  # request rounds; the newest stretch has between one and two of them
MEMORY_BLOCKS = 32  # that the stretch before it remembers
VERSIONS_KEPT = 8  # the newest; the draft as loaded is kept beside them
MOST_PLACES = 32  # drafts deeper than that are counted in the last place

_BITS = 16  # of each number in an outcome
_MASK = (1 << _BITS) - 1


class Place(msgspec.Struct, frozen=True):
    """``reached`` drafts were judged at this place, all before them accepted; ``accepted`` stayed."""

    reached: float
    accepted: float

    @property
    def share(self) -> float | None:
        """P(accepted | all before it were); None where no draft was judged."""
        return self.accepted / self.reached if self.reached else None


class Depth(msgspec.Struct, frozen=True):
    """Request rounds that began at generated positions ``[start, end)``; ``end`` None is open."""

    start: int
    end: int | None
    rounds: int
    committed: int

    @property
    def label(self) -> str:
        """``64-127``, as the metrics' label has it."""
        return f"{self.start}+" if self.end is None else f"{self.start}-{self.end - 1}"


class Served(msgspec.Struct, frozen=True):
    """A draft version: when its first round was counted, in seconds since 1970, and what came of it."""

    version: int
    since: float
    rounds: int
    committed: int


class Stretch(msgspec.Struct, frozen=True):
    """Request rounds that drafted something: tokens committed and, place by place, what was accepted."""

    rounds: float = 0
    committed: float = 0
    places: tuple[Place, ...] = ()

    @property
    def acceptance_length(self) -> float | None:
        return self.committed / self.rounds if self.rounds else None

    @property
    def judged(self) -> Place:
        """All places together."""
        return Place(
            sum(place.reached for place in self.places),
            sum(place.accepted for place in self.places),
        )


class Figures(msgspec.Struct, frozen=True):
    """All that a ``Tally`` knows. ``recent`` is the newest stretch, ``before`` what came before it."""

    total: Stretch = Stretch()
    depths: tuple[Depth, ...] = ()
    versions: tuple[Served, ...] = ()
    recent: Stretch = Stretch()
    before: Stretch = Stretch()


class Tally:
    """Counts request rounds; ``clock`` gives seconds since 1970, asked once a version.

    The newest ``BLOCK`` to twice as many are ``recent``; those before are forgotten exponentially, in
    ``MEMORY_BLOCKS`` blocks, so that what is recent is compared with what was usual.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._block: dict[int, float] = {}
        self._in_block = 0
        self._last: Mapping[int, float] = {}  # the block before it
        self._older: dict[int, float] = {}  # all blocks before those
        self._before: dict[int, float] = {}  # the same, forgotten exponentially
        self._depth_rounds = [0] * len(POSITION_EDGES)
        self._depth_committed = [0] * len(POSITION_EDGES)
        self._versions: dict[int, list[float]] = {}  # since, rounds, committed

    def observe(self, row: RoundRow) -> None:
        """Count one request in one round."""
        committed = row.num_committed
        outcome = outcome_of(row.num_drafted, row.num_accepted, committed)
        block = self._block
        block[outcome] = block.get(outcome, 0) + 1
        self._in_block += 1
        depth = bisect_right(POSITION_EDGES, row.position) - 1
        self._depth_rounds[depth] += 1
        self._depth_committed[depth] += committed
        served = self._versions.get(row.draft_version)
        if served is None:
            served = self._begin_version(row.draft_version)
        served[1] += 1
        served[2] += committed
        if self._in_block == BLOCK:
            self._end_block()

    def _begin_version(self, version: int) -> list[float]:
        self._versions[version] = served = [self._clock(), 0, 0]
        trained = sorted(self._versions.keys() - {0, version})
        for old in trained[: max(0, len(trained) + 1 - VERSIONS_KEPT)]:
            del self._versions[old]
        return served

    def _end_block(self) -> None:
        kept = 1 - 1 / MEMORY_BLOCKS
        self._before = {outcome: kept * number for outcome, number in self._before.items()}
        _add(self._before, self._last)
        _add(self._older, self._last)
        self._last, self._block, self._in_block = self._block, {}, 0

    def figures(self) -> Figures:
        """All of it, as it stands."""
        recent: dict[int, float] = dict(self._block)
        _add(recent, self._last)
        total = dict(recent)
        _add(total, self._older)
        ends = (*(end for _, end in pairwise(POSITION_EDGES)), None)
        sums = zip(
            POSITION_EDGES, ends, self._depth_rounds, self._depth_committed, strict=True
        )  # fmt: skip
        versions = sorted(self._versions.items())
        return Figures(
            total=stretch_of(total),
            depths=tuple(Depth(*one) for one in sums if one[2]),
            versions=tuple(Served(v, s[0], int(s[1]), int(s[2])) for v, s in versions),
            recent=stretch_of(recent),
            before=stretch_of(self._before),
        )


def outcome_of(drafted: int, accepted: int, committed: int) -> int:
    """What came of a request round, as one number."""
    return (drafted << _BITS | accepted) << _BITS | committed


def _add(sums: dict[int, float], more: Mapping[int, float]) -> None:
    for outcome, number in more.items():
        sums[outcome] = sums.get(outcome, 0) + number


def stretch_of(outcomes: Mapping[int, float]) -> Stretch:
    """What so many request rounds of each outcome come to.

    Outcomes of rounds without a draft are left out: nothing was accepted or refused in them.
    """
    rounds = committed = 0.0
    reached, accepted = [0.0] * MOST_PLACES, [0.0] * MOST_PLACES
    for outcome, number in outcomes.items():
        drafted, stayed = outcome >> 2 * _BITS, outcome >> _BITS & _MASK
        if not drafted:
            continue
        rounds += number
        committed += number * (outcome & _MASK)
        for place in range(min(drafted, stayed + 1)):
            reached[min(place, MOST_PLACES - 1)] += number
        for place in range(stayed):
            accepted[min(place, MOST_PLACES - 1)] += number
    places = zip(reached, accepted, strict=True)
    return Stretch(rounds, committed, tuple(Place(*one) for one in places if one[0]))
