"""How many tokens are drafted, in worlds whose acceptance and costs are known."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest

from cosched.loop.lengths import Acceptance, DraftLengths
from cosched.loop.round_seconds import RoundSeconds
from cosched.protocols import MOST_UNDRAFTED, DraftLength, LengthSnapshot
from cosched.registry import LENGTHS
from tests.helpers.lengths import Scripted, simulate, speed


def make(kind: str, **settings: Any) -> DraftLength:
    cls = LENGTHS.get(kind)
    return cls(cls.Settings(kind=kind, **settings))


# --- goodput -----------------------------------------------------------------------------------

CELLS = [  # acceptance of every place, cost of a drafted token in plain rounds, fixed cost of drafting
    (0.95, 0.1, 0.1),
    (0.8, 0.1, 0.2),
    (0.6, 0.15, 0.1),
    (0.5, 0.3, 0.2),
    (0.2, 0.2, 0.1),
    (0.05, 0.1, 0.3),
]


def busy_machine(rounds: int) -> list[float]:
    """By how much it is slower in each round: for some dozens of rounds in a row others use it."""
    draw, found = random.Random(1), list[float]()
    while len(found) < rounds:
        found += [draw.choice([1, 1.3, 1.6])] * int(draw.expovariate(1 / 40) + 1)
    return found


@pytest.mark.parametrize(("chance", "row", "draft"), CELLS)
@pytest.mark.parametrize(
    ("num_running", "busy", "share"),
    [
        (1, False, 0.98),
        pytest.param(8, False, 0.98, marks=pytest.mark.slow),
        pytest.param(4, True, 0.96, marks=pytest.mark.slow),
    ],
)
def test_goodput_is_as_fast_as_the_best_fixed_length(
    chance: float, row: float, draft: float, num_running: int, busy: bool, share: float
) -> None:
    """Whichever length is best, none included, over 3,000 rounds with what finding it out has cost.

    Seconds are noisy, one round in 50 takes three times as long. The same luck is met by all; one part
    in 50 is for what is tried, which falls on other rounds; twice that where others slow the machine down.
    """
    noise, machine = random.Random(1), busy_machine(3000)

    def seconds(now: int, tokens: int) -> float:
        slow = (3.0 if noise.random() < 0.02 else 1.0) * (machine[now] if busy else 1)
        return slow * noise.uniform(0.95, 1.05) * (1 + tokens * row + draft * (tokens > 0))

    def world(length: DraftLength) -> float:
        noise.seed(1)
        return speed(simulate(length, lambda *_: chance, seconds, 3000, 6, num_running=num_running))

    fixed = {tokens: world(Scripted(tokens)) for tokens in range(7)}
    assert world(make("goodput")) >= share * max(fixed.values())


def test_goodput_notices_that_drafting_pays_again() -> None:
    """While nothing is drafted, one probe now and then shows that acceptance has come back."""

    def acceptance(now: int, _place: int) -> float:
        return 0.02 if now < 1500 else 0.9

    played = simulate(make("goodput"), acceptance, lambda _n, k: 1 + 0.3 * k, 4000)
    drafted = [tokens for tokens, _, _ in played]
    assert sum(tokens > 0 for tokens in drafted[500:1500]) < 20
    assert drafted[-500:].count(0) < 5
    assert sum(drafted[-500:]) / 500 > 3.5


def test_goodput_follows_a_draft_that_learns_and_forgets() -> None:
    """Old evidence fades: behind a change the length is the new one's within some hundred rounds."""

    def acceptance(now: int, _place: int) -> float:
        return 0.9 if (now // 1500) % 2 else 0.4

    played = simulate(make("goodput"), acceptance, lambda _n, k: 1 + 0.25 * k, 6000)
    means = [
        sum(tokens for tokens, _, _ in played[start + 700 : start + 1500]) / 800
        for start in range(0, 6000, 1500)
    ]
    assert max(means[0], means[2]) < 1.5
    assert min(means[1], means[3]) > 3


def test_goodput_loses_no_more_than_its_share_to_probes() -> None:
    """Probes of lengths that seem worse are bounded in time, not only in number."""
    played = simulate(make("goodput"), lambda *_: 0.02, lambda _n, k: 1 + k, 20_000)
    lost = sum(seconds - tokens for _, tokens, seconds in played[100:])
    assert 0 < lost < 0.01 * sum(seconds for _, _, seconds in played)


def test_goodput_repeats_exactly() -> None:
    """Seconds are all that can differ from one run to the next."""
    runs = [
        simulate(make("goodput"), lambda *_: 0.7, lambda n, k: 1 + n % 7 / 50 + k / 9, 500)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("among", [(0, 1, 3, 6), (2, 4), (5,)])
def test_goodput_chooses_among_what_it_is_given(among: tuple[int, ...]) -> None:
    """SGLang prepares for a few numbers of tokens only; the best of them is found."""
    length = make("goodput", among=among)
    played = simulate(length, lambda *_: 0.9, lambda _n, k: 1 + k / 20, 600, max_tokens=6)
    drafted = [tokens for tokens, _, _ in played]
    assert set(drafted) <= set(among) == set(length.choices(6))
    assert drafted[200:].count(max(among)) > 380


# --- threshold ---------------------------------------------------------------------------------


def snapshot(chances: tuple[float, ...] | None, round_index: int = 1) -> LengthSnapshot:
    return LengthSnapshot(5, 1, round_index, (0.5,) * 5, (1,) * 6, chances=chances)


def test_threshold_stops_where_not_all_are_likely_to_stand() -> None:
    """The product of the chances so far is held against the bound; now and then nothing is cut."""
    length = make("threshold", bound=0.4, explore_rounds=64)
    assert length.choose(snapshot(None)) == 5
    assert length.choose(snapshot((0.9, 0.9, 0.4, 0.9))) == 2
    assert length.choose(snapshot((0.3, 0.9))) == 0
    assert length.choose(snapshot((0.9, 0.8))) == 2
    assert length.choose(snapshot((0.1, 0.1), round_index=128)) == 2


# --- what is measured --------------------------------------------------------------------------


def test_acceptance_is_that_of_places_that_were_reached() -> None:
    """Behind a rejection nothing is known; a place of which nothing is known is like the one before."""
    acceptance = Acceptance(4)
    for round_ in range(400):
        acceptance.observe([2], [2 if round_ % 2 else 0], None)
    first, second, third, fourth = acceptance.by_place()
    assert first == pytest.approx(0.5, abs=0.02)
    assert second > 0.98
    assert third == fourth == second


def test_a_mean_outlives_its_evidence() -> None:
    """A place that is not drafted any more keeps its mean, and some contradictions overturn it."""
    acceptance = Acceptance(1)
    for _ in range(300):
        acceptance.observe([1], [0], None)
    for _ in range(5000):
        acceptance.observe([0], [0], None)
    assert acceptance.by_place()[0] < 0.11
    for _ in range(8):
        acceptance.observe([1], [1], None)
    assert acceptance.by_place()[0] > 0.45


def test_certainty_is_believed_until_it_has_been_seen_to_be_wrong() -> None:
    """A draft that says 0.95 and is accepted half of the time comes to be taken at its deeds."""
    acceptance = Acceptance(1)
    assert acceptance.by_certainty([0.95, 0.15]) == (0.95, 0.15)
    for round_ in range(200):
        acceptance.observe([1], [round_ % 2], [[0.95]])
    sure, unsure = acceptance.by_certainty([0.95, 0.15])
    assert sure == pytest.approx(0.5, abs=0.03)
    assert unsure == 0.15


def test_seconds_are_those_of_the_rounds_and_do_not_fall_with_length() -> None:
    """One slow round tells nothing, lengths between others are on the line, and none is below less."""
    seconds = RoundSeconds(6)
    assert seconds.table(1)[:2] == (0.0, 0.0)  # to be tried first
    for _ in range(5):
        for tokens in (6, 3, 1, 0):
            seconds.observe(1, tokens, 1 + tokens / 10)
    seconds.observe(1, 3, 50.0)
    table = seconds.table(1)
    expected = [1 + tokens / 10 for tokens in range(7)]
    ratios = [found / true for found, true in zip(table, expected, strict=True)]
    assert max(ratios) / min(ratios) < 1.05
    assert all(one <= more for one, more in pairwise(table))


def test_a_slower_machine_is_slower_at_every_length() -> None:
    """A length is not to seem dear for having been tried while others used the machine."""
    seconds = RoundSeconds(2)
    for tokens in (2, 2, 1, 1, 0, 0):
        seconds.observe(1, tokens, 1 + tokens / 4)
    for _ in range(100):
        seconds.observe(1, 2, 2 * 1.5)
    table = seconds.table(1)
    assert table[2] == pytest.approx(3.0, rel=0.1)
    assert table[0] == pytest.approx(2.0, rel=0.15)


def test_what_drafting_costs_is_told_once_it_is_known() -> None:
    """A round without drafts as a share of one with them, as measured; nothing before both were tried."""
    lengths = DraftLengths(make("goodput"), 3)
    assert lengths.plain_share(3) is None
    for _ in range(3):
        for tokens in range(4):
            lengths.of_round(1)
            lengths.observe([tokens], [0], None, 0.5 if tokens == 0 else 1.0)
            lengths.observe([1], [0], None, 1.0)  # not the first behind one without drafts
    assert lengths.plain_share(3) == pytest.approx(0.5, rel=0.05)
    assert DraftLengths(Scripted(2), 3).plain_share(2) is None  # it does not ask what rounds take


def test_a_draft_is_never_left_behind_for_long() -> None:
    """What a draft has not taken in yet is bounded, whatever the policy says."""
    lengths = DraftLengths(Scripted(0), 3)
    drafted = []
    for _ in range(3 * MOST_UNDRAFTED):
        drafted.append(lengths.of_round(2))
        lengths.observe([drafted[-1]] * 2, [0, 0], None, 1.0)
    assert drafted.count(1) == 2
    assert drafted.index(1) == MOST_UNDRAFTED
