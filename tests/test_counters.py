"""What is counted of the first rounds."""

from __future__ import annotations

import pytest

from cosched.loop.counters import RECENT_WEIGHT, Counters
from tests.helpers.rounds import round_of


def test_the_first_rounds_count_alike() -> None:
    """The first alone said what was usual: after one without an accepted draft the length stayed near 1
    for dozens of rounds, and a server of five rounds looked as if it had got worse."""
    counters = Counters()
    for length in (1, 3, 4, 4, 3):
        counters.observe(round_of([length]))
    assert counters.recent == pytest.approx(3.0)
    for _ in range(15):
        counters.observe(round_of([3]))
    counters.observe(round_of([4]))
    assert counters.recent == pytest.approx(3.0 + RECENT_WEIGHT)
