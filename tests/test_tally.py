"""What is counted of rounds: right against a slow reference, bounded, and cheap."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosched.records import RoundRow
from cosched.telemetry.metrics import RequestLog, round_figures
from cosched.telemetry.tally import BLOCK, MEMORY_BLOCKS, MOST_PLACES, VERSIONS_KEPT, Tally

MICROSECONDS = 10.0  # of a request round: a thousandth of the shortest round that we know of


def row(drafted: int, accepted: int, position: int = 0, version: int = 0) -> RoundRow:
    return RoundRow("r", position, version, drafted, accepted, accepted + 1)


def counted(rows: list[RoundRow]) -> Tally:
    tally = Tally(lambda: 0.0)
    for one in rows:
        tally.observe(one)
    return tally


OUTCOME = st.integers(1, 6).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, k)))


@given(st.lists(st.tuples(OUTCOME, st.integers(0, 40_000)), min_size=1, max_size=700))
def test_places_and_depths_are_those_of_the_report(seen) -> None:
    """The table of outcomes gives the figures that a run's summary has, made there row by row."""
    rows = [row(k, n, position) for (k, n), position in seen]
    tokens = range(1 + max(one.position for one in rows))
    log = RequestLog("r", [], tokens, rows)
    expected = round_figures([log])
    found = counted(rows).figures()
    shares = [place.share for place in found.total.places]
    reference = expected.position_acceptance
    assert shares == pytest.approx(reference[: len(shares)])
    assert not any(reference[len(shares) :]), "places that no round has reached"
    inside = [one for one in found.depths if one.end is not None]
    buckets = {(b.start, b.end): (b.rounds, b.tau) for b in expected.tau_by_position}
    assert buckets == {
        (one.start, one.end): (one.rounds, pytest.approx(one.committed / one.rounds))
        for one in inside
    }
    assert sum(one.rounds for one in found.depths) == found.total.rounds == len(rows)


def test_recent_is_the_newest_and_before_is_all_else() -> None:
    """A fall shows in the newest stretch alone, and leaves it again when it is over."""
    good, bad = [row(3, 3)] * (4 * BLOCK), [row(3, 0)] * (BLOCK + 10)
    figures = counted(good + bad).figures()
    assert figures.recent.acceptance_length == 1.0
    assert figures.before.acceptance_length == 4.0
    assert BLOCK <= figures.recent.rounds <= 2 * BLOCK
    figures = counted(good + bad + good).figures()
    assert figures.recent.acceptance_length == 4.0
    assert 1.0 < (figures.before.acceptance_length or 0) < 4.0


def test_what_was_long_ago_is_forgotten() -> None:
    """Text of last week is not what is usual today: after 200 blocks hardly any of the first 40 is left."""
    figures = counted([row(3, 3)] * (40 * BLOCK) + [row(3, 0)] * (200 * BLOCK)).figures()
    assert figures.before.acceptance_length == pytest.approx(1.0, abs=0.05)
    assert figures.before.rounds == pytest.approx(MEMORY_BLOCKS * BLOCK, rel=0.01)
    assert figures.total.acceptance_length == pytest.approx(1 + 3 / 6)


def test_rounds_without_a_draft_say_nothing_of_the_draft() -> None:
    """A server under load drafts nothing: that is no fall of acceptance."""
    figures = counted([row(0, 0), row(3, 2)] * BLOCK).figures()
    assert figures.recent.acceptance_length == 3.0
    assert sum(depth.rounds for depth in figures.depths) == 2 * BLOCK


def test_nothing_grows_with_time() -> None:
    """A server runs for months and publishes every minute: versions, places and depths stay few."""
    clock = itertools.count()
    tally = Tally(lambda: float(next(clock)))
    for version in range(1000):
        tally.observe(row(200, 150, position=version * 100, version=version))
    figures = tally.figures()
    assert [one.version for one in figures.versions] == [0, *range(1000 - VERSIONS_KEPT, 1000)]
    assert len(figures.total.places) == MOST_PLACES
    assert figures.depths[-1].label == "32768+"
    assert figures.versions[-1].since == 999


def test_rows_of_a_version_before_are_counted_as_its_own() -> None:
    """A round that was under way at the publication was drafted by the version before."""
    rows = [row(3, 1, version=v) for v in (0, 1, 0, 1, 1, 2, 1)]
    versions = counted(rows).figures().versions
    assert [(one.version, one.rounds) for one in versions] == [(0, 2), (1, 4), (2, 1)]


def test_counting_costs_microseconds() -> None:
    """Metrics may cost a hundredth of a round. The best of ten, because the machine does other things."""
    draw = random.Random(0)
    rows = [row(3, draw.randrange(4), n, n // 100) for n in range(2000)]
    best = float("inf")
    for _ in range(10):
        tally, started = Tally(time.time), time.perf_counter()
        for one in rows:
            tally.observe(one)
        best = min(best, time.perf_counter() - started)
    assert 1e6 * best / len(rows) < MICROSECONDS
