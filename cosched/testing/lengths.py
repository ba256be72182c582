"""What every draft length owes: a pure choice among what can be drafted."""

from __future__ import annotations

import random
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from cosched.loop.lengths import DraftLengths
from cosched.protocols import DraftLength, LengthSnapshot
from cosched.registry import LENGTHS
from cosched.testing.choosing import ChoosingContract

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.registry import Plugin

MOST = 5
UNSURE = 0.05  # top probability of a random draft, which is lower now and then


class LengthContract(ChoosingContract):
    """Every registered draft length, or those in ``names``."""

    registry = LENGTHS

    def snapshot(self, seed: int) -> LengthSnapshot:
        return random_length_snapshot(seed)

    def test_numbers_are_among_what_can_be_drafted(self, case: tuple[Plugin, Any]) -> None:
        """None at all up to the drafter's most; what it says of itself is so."""
        plugin, settings = case
        length: DraftLength = plugin.cls(settings)
        choices = length.choices(MOST)
        assert choices
        assert list(choices) == sorted(set(choices))
        assert isinstance(length.needs_seconds, bool)
        assert isinstance(length.by_request, bool)
        for seed in range(1000):
            snapshot = self.snapshot(seed)
            assert 0 <= length.choose(snapshot) <= snapshot.max_tokens
            if not length.by_request:
                assert length.choose(snapshot) in length.choices(snapshot.max_tokens)
                asked = msgspec.structs.replace(snapshot, chances=None)
                assert length.choose(asked) == length.choose(snapshot)
            if not length.needs_seconds:
                asked = msgspec.structs.replace(snapshot, seconds=())
                assert length.choose(asked) == length.choose(snapshot)


def random_length_snapshot(seed: int) -> LengthSnapshot:
    """What a run might have measured; nothing, or not all, at its start."""
    draw = random.Random(seed)
    rounds = draw.choice([1, draw.randrange(1, 20), draw.randrange(1, 100_000)])
    seconds = sorted(draw.uniform(0.01, 1) for _ in range(MOST + 1))
    if draw.random() < 0.2:
        seconds[draw.randrange(MOST + 1)] = 0.0
    return LengthSnapshot(
        max_tokens=MOST,
        num_running=draw.randint(1, 64),
        round_index=rounds,
        acceptance=tuple(draw.random() for _ in range(MOST)),
        ages=tuple(draw.randint(0, rounds) for _ in range(MOST + 1)),
        seconds=tuple(seconds),
        chances=draw.choice([None, tuple(draw.random() for _ in range(draw.randint(1, MOST)))]),
    )


class ByOwnCertainty(DraftLengths):
    """As many tokens as the draft is about as sure of as of the first, none where it is hardly sure.

    What was seen of other requests, which brings requests together otherwise, has no part in it.
    """

    def __init__(self, max_tokens: int) -> None:
        super().__init__(_All(), max_tokens)

    def of_request(self, num_drafted: int, tops: Sequence[float] | None) -> int:
        if tops is None:
            return num_drafted
        sure = takewhile(lambda top: top >= 0.9 * tops[0], tops)
        return len(list(sure)) if tops[0] > UNSURE else 0


class _All(DraftLength):
    by_request = True

    def choose(self, snapshot: LengthSnapshot) -> int:
        return snapshot.max_tokens


def changing_lengths() -> list[Any]:
    """All lengths there are that change while they serve, made to change often in a small world.

    Those that go by request are quick to test, and make requests of a round differ as well; the others
    are marked slow.
    """
    often: dict[str, dict[str, Any]] = {
        "goodput": {"explore_share": 1.0, "explore_rounds": 2},
        "threshold": {"bound": 0.05, "explore_rounds": 5},
    }
    return [
        pytest.param(
            _make(plugin, often.get(plugin.name, {})),
            id=plugin.name,
            marks=() if plugin.cls.by_request else (pytest.mark.slow,),
        )
        for plugin in LENGTHS.plugins()
        if plugin.name != "fixed"
    ]


def _make(plugin: Plugin, changed: dict[str, Any]) -> DraftLength:
    return plugin.cls(msgspec.convert({"kind": plugin.name, **changed}, plugin.cls.Settings))
