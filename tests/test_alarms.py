"""Alarms: each comes when it should, and none of a draft that does as it always did."""

from __future__ import annotations

import random

import pytest

from cosched.records import GuardFigures, RoundRow
from cosched.telemetry.alarms import ALARMS, FEWEST, alarms
from cosched.telemetry.tally import BLOCK, Tally

HEALTHY = (0.75, 0.7, 0.66, 0.62)
STREAMS, LENGTH, LOOK_EVERY = 40, 20 * BLOCK, 32


class Draft:
    """Rounds of four drafts with these chances; neighbours are alike, as in text: stretches of twenty
    rounds are easier or harder by up to a fifth."""

    def __init__(self, seed: int, chances: tuple[float, ...] = HEALTHY) -> None:
        self._draw = random.Random(seed)
        self.chances = chances
        self._ease, self._left = 1.0, 0

    def round(self) -> RoundRow:
        if not self._left:
            self._ease, self._left = self._draw.uniform(0.8, 1.2), 20
        self._left -= 1
        accepted = 0
        for chance in self.chances:
            if self._draw.random() >= chance * self._ease:
                break
            accepted += 1
        return RoundRow("r", 0, 0, len(self.chances), accepted, accepted + 1)


def guard(**changes: float | bool | None) -> GuardFigures:
    fields = {"better": 0.0, "better_bound": 2.0, "worse": 0.0, "worse_bound": 3.0, "trusted": True}
    return GuardFigures(**{**fields, "serves_loaded": False, **changes})


def rounds_until(name: str, tally: Tally, draft: Draft, scored: GuardFigures | None = None) -> int:
    """How many request rounds it takes until there is that alarm."""
    for number in range(1, LENGTH):
        tally.observe(draft.round())
        if name in alarms(tally.figures(), scored):
            return number
    raise AssertionError(f"{name} never came")


def healthy(seed: int = 0, rounds: int = 4 * BLOCK) -> tuple[Tally, Draft]:
    tally, draft = Tally(lambda: 0.0), Draft(seed)
    for _ in range(rounds):
        tally.observe(draft.round())
    return tally, draft


@pytest.mark.parametrize("chances", [HEALTHY, (0.3, 0.3, 0.3, 0.3)], ids=["strong", "weak"])
def test_a_healthy_draft_raises_none(chances: tuple[float, ...]) -> None:
    """40 streams of 5,120 rounds, looked at every 32: not one alarm of some 6,400 looks. The seeds are
    fixed; a share of one in a thousand would show with a chance of more than 99 %. A weak draft's last
    place is reached some ten times in a stretch: then chance alone leaves it without an acceptance."""
    for seed in range(STREAMS):
        tally, draft = Tally(lambda: 0.0), Draft(seed, chances)
        for number in range(LENGTH):
            tally.observe(draft.round())
            if number % LOOK_EVERY == 0:
                assert alarms(tally.figures(), guard(serving_score=1.5)) == {}


@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_place_that_is_shuffled_is_named(place: int) -> None:
    """Within 512 request rounds: the others keep their chances, this one has lost nearly all."""
    tally, draft = healthy()
    chances = list(HEALTHY)
    chances[place] = 0.02
    draft.chances = tuple(chances)
    assert rounds_until("place", tally, draft) <= 2 * BLOCK
    assert f"place {place + 1} " in alarms(tally.figures())["place"]


def test_other_traffic_is_a_fall() -> None:
    """Within 512 request rounds: all places do worse together, and none of them is broken."""
    tally, draft = healthy()
    draft.chances = tuple(0.5 * chance for chance in HEALTHY)
    assert rounds_until("fell", tally, draft) <= 2 * BLOCK
    assert set(alarms(tally.figures())) == {"fell"}


def test_a_fall_is_over_when_the_new_is_usual() -> None:
    """An alarm that stays for ever is turned off by hand, and is missing the next time."""
    tally, draft = healthy()
    draft.chances = tuple(0.5 * chance for chance in HEALTHY)
    for _ in range(40 * BLOCK):
        tally.observe(draft.round())
    assert "fell" not in alarms(tally.figures())


def test_a_draft_that_is_not_the_one_that_was_scored_is_told() -> None:
    """The guard scores weights that it keeps; those that serve may have been damaged."""
    tally, draft = healthy()
    draft.chances = tuple(0.2 * chance for chance in HEALTHY)
    scored = guard(serving_score=2.9)
    assert rounds_until("not_as_scored", tally, draft, scored) <= 2 * BLOCK
    figures = tally.figures()
    assert "not_as_scored" not in alarms(figures, guard(serving_score=1.3))
    assert "not_as_scored" not in alarms(figures, guard(serving_score=2.9, serves_loaded=True))
    assert "not_as_scored" not in alarms(figures, guard())
    assert "not_as_scored" not in alarms(figures)


def test_a_draft_that_is_never_right_is_useless() -> None:
    """From the start on, where there is nothing to compare with."""
    tally, draft = Tally(lambda: 0.0), Draft(0, (0.03, 0.03))
    assert rounds_until("useless", tally, draft) <= FEWEST


def test_what_an_adaptation_says_of_itself_is_an_alarm_at_once() -> None:
    """A publication that was undone stops training before any round has shown it."""
    nothing = Tally(lambda: 0.0).figures()
    assert alarms(nothing, failure="publication 2 undone") == {"failed": "publication 2 undone"}
    assert alarms(nothing, warning="the disk is full") == {"warned": "the disk is full"}
    assert set(alarms(nothing, failure="a", warning="b")) <= set(ALARMS)
