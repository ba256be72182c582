"""Intervals of shares: what they cover, and what they are over."""

from __future__ import annotations

import random

import pytest

from cosched.report.shares import interval, ratio_of_shares
from cosched.telemetry.parts import MAX_PARTS, NO_PARTS, parts_of_rounds


def requests(draw: random.Random, number: int, rounds: int) -> dict[str, list[tuple[int, int]]]:
    """Requests that differ, whose rounds commit 1 to 4 tokens; the mean of all of them is 2."""
    found = {}
    for name in range(number):
        chance = 1 / 3 + draw.choice((-0.1, 0.1))
        found[str(name)] = [
            (1 + sum(draw.random() < chance for _ in range(3)), 1) for _ in range(rounds)
        ]
    return found


def test_interval_covers_what_is_true_of_texts_like_these() -> None:
    """Of 400 samples of 12 requests whose texts differ at least 92 % have the true mean inside, and not
    all: 95 % are meant, and fewer than 92 % have a chance of 0.6 % then."""
    draw, inside = random.Random(0), 0
    for _ in range(400):
        low, high = interval(parts_of_rounds(requests(draw, 12, 40)).pairs) or (0.0, 0.0)
        inside += low <= 2 <= high
    assert 368 <= inside < 400


@pytest.mark.parametrize(
    ("number", "rounds", "of", "parts"),
    [
        (30, 5, "requests", MAX_PARTS),
        (7, 1, "requests", 7),
        (3, 40, "text", MAX_PARTS),
        (1, 50, "text", 6),
        (5, 9, None, 0),
    ],
)
def test_parts_are_requests_or_stretches_and_lose_nothing(
    number: int, rounds: int, of: str | None, parts: int
) -> None:
    """Six requests are parts, fewer are cut into stretches of eight rounds or more, and too few not at
    all; however it is cut, the sums stay."""
    some = requests(random.Random(1), number, rounds)
    found = parts_of_rounds(some)
    assert (found.of, len(found.pairs)) == (of, parts)
    if of is None:
        assert found == NO_PARTS
        assert interval(found.pairs) is None
        return
    everything = [pair for pairs in some.values() for pair in pairs]
    assert sum(a for a, _ in found.pairs) == sum(a for a, _ in everything)
    assert sum(b for _, b in found.pairs) == len(everything)


def test_all_of_it_in_one_part_says_nothing() -> None:
    """Without the part that has every round there would be nothing to divide by."""
    assert interval([(3, 2), *[(0, 0)] * 5]) is None


def test_what_makes_a_text_easy_cancels() -> None:
    """Two arms of which one commits a tenth more in every request: the ratio is sure, though the
    requests differ much and neither arm's own share is."""
    theirs = [(10 * n, 10) for n in range(1, 9)]
    ours = [(11 * n, 10) for n in range(1, 9)]
    ratio = ratio_of_shares(ours, theirs)
    assert ratio.value == pytest.approx(1.1)
    assert (ratio.low, ratio.high) == (1.1, 1.1) or (ratio.low, ratio.high) == (1.09, 1.11)
    low, high = interval(ours) or (0.0, 0.0)
    assert high - low > 2
    assert not ratio_of_shares(ours[:5], theirs[:5]).known
