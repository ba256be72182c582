"""Figures of an arm from its finished requests.

Acceptance length is tokens committed per request and round, the bonus token included, pooled:
sum of committed over sum of rounds. A position is *novel* if the eight tokens before it have not
occurred before in the request; small models fall into loops, and a draft that learns a loop
looks brilliant, so every headline is shown on all and on novel positions.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from cosched.records import RoundRow
from cosched.telemetry.parts import NO_PARTS, Parts, parts_of_rounds

NOVEL_NGRAM = 8
POSITION_EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Bucket(msgspec.Struct, frozen=True):
    """Acceptance length of the rounds that began at generated positions ``[start, end)``."""

    start: int
    end: int
    rounds: int
    tau: float
    tau_novel: float | None
    rounds_novel: int = 0
    parts: Parts = NO_PARTS
    parts_novel: Parts = NO_PARTS


class RoundFigures(msgspec.Struct, kw_only=True):
    """The part of an arm's figures that follows from its rounds alone."""

    tokens: int
    rounds: int
    requests: int
    tau: float
    tau_novel: float | None
    tau_mean_of_requests: float
    tau_by_position: list[Bucket]
    position_acceptance: list[float]
    repeat_fraction: float
    drafted_per_round: float = 0.0  # tokens of a request that were verified, the bonus left out
    rounds_by_drafted: list[int] = []  # how many rounds drafted 0, 1, … tokens
    position_parts: list[Parts] = []  # of each of ``position_acceptance``


class Turn(msgspec.Struct, frozen=True):
    """What an arm committed before it was the next one's turn, in its ``group``-th of requests.

    ``stages`` are seconds by what they were spent on; what is missing is bookkeeping.
    """

    group: int
    tokens: int
    seconds: float
    stages: dict[str, float] = {}


class Part(msgspec.Struct, frozen=True):
    """What an arm committed in a part of the run's text, which is the same for all arms."""

    tokens: int
    seconds: float


class TextFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What an arm did on one of several files; ``parts`` are of that text alone."""

    tokens: int
    rounds: int
    requests: int
    tau: float
    tau_novel: float | None
    tokens_per_s: float
    parts: list[Part] = []


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Rounds that began at generated positions from ``start`` to the next edge, and what they committed."""

    start: int
    rounds: int
    tokens: int
    rounds_novel: int
    tokens_novel: int


class GroupFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What an arm did on one group of requests; ``source`` is their file, where there are several.

    ``tokens`` were generated in ``seconds``, ``repeated`` of them at positions that are not novel;
    ``drafted`` were verified. ``places`` says what the rounds committed.
    """

    source: str | None
    tokens: int
    repeated: int
    drafted: int
    seconds: float
    places: list[Place]


class ArmSummary(RoundFigures, kw_only=True):
    """One arm in ``summary.json``; fields are added, never renamed."""

    tokens_per_s: float
    seconds: dict[str, float]
    lossless_mismatches: int | None
    versions: int
    updates: int
    skipped_steps: int
    losses: list[float | None]  # one an update; None where it was not finite
    peak_bytes: int
    refused_updates: int = 0
    rollbacks: int = 0
    guard_seconds: float = 0.0  # of those updating
    parts: list[Part] = []  # in the order of time; none where the run is too short for an interval
    cut_conversations: int = 0  # ended early: their next turn did not fit
    evicted_requests: int = 0  # whose rows the replay buffer dropped for want of room
    by_text: dict[str, TextFigures] = {}  # by the name of the file, where there are several
    by_group: list[GroupFigures] = []  # in the order of time


class RunSummary(msgspec.Struct, kw_only=True):
    """``summary.json``."""

    run: dict[str, Any]
    arms: dict[str, ArmSummary]


class RequestLog(msgspec.Struct, frozen=True):
    """What the figures need of a finished request; ``cut`` ended its conversation early.

    ``source`` is the file it comes from, where there are several.
    """

    request_id: str
    prompt: Sequence[int]
    generated: Sequence[int]
    rounds: Sequence[RoundRow]
    finished: bool = True
    cut: bool = False
    source: str | None = None


def novel_positions(tokens: Sequence[int], ngram: int = NOVEL_NGRAM) -> list[bool]:
    """For each position, whether the ``ngram`` tokens before it occur there for the first time.

    Positions with fewer tokens before them are novel.
    """
    seen: set[tuple[int, ...]] = set()
    novel = [True] * min(ngram, len(tokens))
    for end in range(ngram, len(tokens)):
        gram = tuple(tokens[end - ngram : end])
        novel.append(gram not in seen)
        seen.add(gram)
    return novel


def round_figures(logs: Iterable[RequestLog]) -> RoundFigures:
    """Pool the rounds of all requests of an arm."""
    logs = list(logs)
    rows: list[tuple[RoundRow, bool]] = []
    repeated = generated = 0
    for log in logs:
        novel = novel_positions([*log.prompt, *log.generated])
        first = len(log.prompt)
        repeated += novel[first:].count(False)
        generated += len(log.generated)
        rows += [(row, novel[first + row.position]) for row in log.rounds]
    by_request = [_tau(log.rounds) for log in logs if log.rounds]
    everything = [row for row, _ in rows]
    drafted = Counter(row.num_drafted for row in everything)
    reached = _by_place(everything)
    return RoundFigures(
        tokens=generated,
        rounds=len(rows),
        requests=len(logs),
        tau=_tau(everything) or 0.0,
        tau_novel=_tau([row for row, is_novel in rows if is_novel]),
        tau_mean_of_requests=sum(t or 0.0 for t in by_request) / max(1, len(by_request)),
        tau_by_position=_by_position(rows),
        position_acceptance=[_share(pairs) for pairs in reached],
        repeat_fraction=repeated / max(1, generated),
        drafted_per_round=sum(k * n for k, n in drafted.items()) / max(1, len(rows)),
        rounds_by_drafted=[drafted[k] for k in range(max(drafted, default=0) + 1)],
        position_parts=[parts_of_rounds(pairs) for pairs in reached],
    )


def _tau(rows: Sequence[RoundRow]) -> float | None:
    return sum(row.num_committed for row in rows) / len(rows) if rows else None


def _by_position(rows: Sequence[tuple[RoundRow, bool]]) -> list[Bucket]:
    buckets = []
    for start, end in itertools.pairwise(POSITION_EDGES):
        inside = [(row, novel) for row, novel in rows if start <= row.position < end]
        if inside:
            tau = _tau([row for row, _ in inside]) or 0.0
            novel = [row for row, is_novel in inside if is_novel]
            everything = [row for row, _ in inside]
            buckets.append(
                Bucket(
                    start,
                    end,
                    len(inside),
                    tau,
                    _tau(novel),
                    len(novel),
                    _tau_parts(everything),
                    _tau_parts(novel),
                )
            )
    return buckets


def _tau_parts(rows: Sequence[RoundRow]) -> Parts:
    by_request: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        by_request.setdefault(row.request_id, []).append((row.num_committed, 1))
    return parts_of_rounds(by_request)


def _by_place(rows: Sequence[RoundRow]) -> list[dict[str, list[tuple[int, int]]]]:
    """Of each place k and request: was draft k accepted, in each round that accepted those before it."""
    drafted = max((row.num_drafted for row in rows), default=0)
    places: list[dict[str, list[tuple[int, int]]]] = [{} for _ in range(drafted)]
    for row in rows:
        for k in range(min(row.num_accepted + 1, row.num_drafted)):
            places[k].setdefault(row.request_id, []).append((int(row.num_accepted > k), 1))
    return places


def _share(by_request: dict[str, list[tuple[int, int]]]) -> float:
    reached = [accepted for pairs in by_request.values() for accepted, _ in pairs]
    return sum(reached) / len(reached) if reached else 0.0


def lossless_mismatches(reference: Iterable[RequestLog], arm: Iterable[RequestLog]) -> int:
    """Requests that both arms finished and whose tokens differ."""
    expected = {log.request_id: list(log.generated) for log in reference if log.finished}
    found = {log.request_id: list(log.generated) for log in arm if log.finished}
    return sum(expected[name] != found[name] for name in expected.keys() & found.keys())
