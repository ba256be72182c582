"""What is counted of the first rounds."""

from __future__ import annotations

import pytest

from cosched.loop.counters import RECENT_WEIGHT, Counters


def test_the_first_rounds_count_alike() -> None:
    """The first alone said what was usual: after one without an accepted draft the length stayed near 1
    for dozens of rounds, and a server of five rounds looked as if it had got worse."""
    counters = Counters()
    for length in (1.0, 3.0, 4.0, 4.0, 3.0):
        counters._observe_length(length)
    assert counters.recent == pytest.approx(3.0)
    for _ in range(15):
        counters._observe_length(3.0)
    counters._observe_length(4.0)
    assert counters.recent == pytest.approx(3.0 + RECENT_WEIGHT)
