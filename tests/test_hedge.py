"""Hedge: which expert makes an update, from trials made up or drawn."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosched.loop.counters import TRIALS_KEPT, Counters
from cosched.protocols import Expert
from cosched.records import Snapshot
from cosched.registry import OBJECTIVES
from tests.helpers.rounds import snapshot

Gains = tuple[float, ...]


def hedge(num_experts: int = 2, **fields: Any) -> Any:
    cls = OBJECTIVES.get("hedge")
    experts = tuple(Expert() for _ in range(num_experts))
    return cls(cls.Settings(kind="hedge", experts=experts, **fields))


def after(trials: list[Gains], since: int = 0) -> Snapshot:
    """What is known behind these trials, and updates since the last."""
    kept = tuple(trials[-TRIALS_KEPT:])
    return snapshot(num_trials=len(trials), trials=kept, updates_since_trial=since)


def turns(objective: Any, trials: list[Gains]) -> list[int]:
    """The expert that makes the updates behind each of these trials."""
    counts = range(1, len(trials) + 1)
    return [objective.choose(after(trials[:count])).objective for count in counts]


def test_trials_come_first_and_every_so_many_updates() -> None:
    """One before anything is known, then every fifth update; one that found no rows is made up for."""
    objective, counters, seen = hedge(every_updates=5), Counters(), []
    for update in range(16):
        choice = objective.choose(counters.snapshot(1, 0, 0))
        seen.append(choice.trial)
        counters.updates += 1
        if choice.trial and update not in {0, 6}:
            counters.note_trial((0.0, 0.0))
    assert [i for i, trial in enumerate(seen) if trial] == [0, 1, 6, 7, 12]


@pytest.mark.parametrize("better", [0, 1, 2])
def test_the_better_expert_wins(better: int) -> None:
    """One is better by 0.1 tokens a trial: with eta 64 the others weigh exp(-6.4 n) behind n trials,
    less than any turn of the golden ratio leaves open (1 / (3 n) or more), so it takes every turn."""
    gain = tuple(0.1 * (i == better) for i in range(3))
    objective = hedge(3, discount=1.0)
    assert turns(objective, [gain] * 60) == [better] * 60
    weight = objective.weights(after([gain] * 2))[better]
    assert weight == pytest.approx(1 / (1 + 2 * math.exp(-12.8)))


def test_a_change_is_followed() -> None:
    """The first is better by 0.1 for 50 trials, then the second: the discounted difference is
    2 * 0.9^m - 1 after m more (times 1 - 0.9^50 at first), below zero from the 7th on."""
    objective = hedge(2, discount=0.9)
    trials = [(0.1, 0.0)] * 50 + [(0.0, 0.1)] * 40
    for more in (0, 6, 7, 12):
        ahead = (1 - 0.9**50) * 0.9**more - (1 - 0.9**more)
        expected = 1 / (1 + math.exp(-64 * ahead))
        assert objective.weights(after(trials[: 50 + more]))[0] == pytest.approx(expected)
    chosen = turns(objective, trials)
    assert set(chosen[:50]) == {0}
    assert set(chosen[50 + 10 :]) == {1}


def test_equal_experts_take_turns() -> None:
    """As often as one another, in any stretch: no third of 90 turns has a third more or less."""
    chosen = turns(hedge(3), [(0.2, 0.2, 0.2)] * 90)
    for begin in range(0, 90, 30):
        counts = [chosen[begin : begin + 30].count(i) for i in range(3)]
        assert all(8 <= count <= 12 for count in counts)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 0.08), min_size=2, max_size=5), st.integers(1, 10_000))
def test_turns_are_in_proportion_to_the_weights(sums: list[float], first: int) -> None:
    """200 turns in a row are within 5 of 200 times the weight (the golden ratio's discrepancy grows
    with the logarithm of their number: an interval's count is off by less than 2.5 at each end)."""
    objective, gains = hedge(len(sums)), tuple(sums)
    known = snapshot(num_trials=1, trials=(gains,))
    chosen = [
        objective.choose(msgspec.structs.replace(known, num_trials=n)).objective
        for n in range(first, first + 200)
    ]
    for expert, weight in enumerate(objective.weights(known)):
        assert abs(chosen.count(expert) - 200 * weight) <= 5


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 5),
    st.floats(0.1, 8),
    st.sampled_from(["random", "turning", "against"]),
    st.integers(1, TRIALS_KEPT),
    st.integers(0, 1000),
)
def test_regret_is_within_the_bound(n: int, eta: float, text: str, count: int, seed: int) -> None:
    """What the weights bring is at most ln(N) / eta + eta T B^2 / 8 behind the best expert, B = 1:
    by chance, when the best one turns at every trial, and when the heaviest is always the worst."""
    draw, objective = random.Random(seed), hedge(n, eta=eta, discount=1.0)
    trials: list[Gains] = []
    brought = 0.0
    for number in range(count):
        weights = objective.weights(after(trials))
        gains = {
            "random": [draw.random() for _ in range(n)],
            "turning": [float(number % n == i) for i in range(n)],
            "against": [float(weight < max(weights)) for weight in weights],
        }[text]
        brought += sum(w * g for w, g in zip(weights, gains, strict=True))
        trials.append(tuple(gains))
    best = max(map(sum, zip(*trials, strict=True)))
    assert best - brought <= math.log(n) / eta + eta * count / 8 + 1e-9


def test_totals_keep_the_newest_trials_and_a_reset_forgets_none() -> None:
    """Bounded however long a server runs; a new request knows what was good; it can be written."""
    counters = Counters()
    for number in range(TRIALS_KEPT + 9):
        counters.note_trial((float(number), -1.0))
    counters.start_anew()
    again = msgspec.json.decode(msgspec.json.encode(counters), type=Counters)
    known = again.snapshot(1, 0, 0)
    assert known == counters.snapshot(1, 0, 0)
    assert (known.num_trials, len(known.trials)) == (TRIALS_KEPT + 9, TRIALS_KEPT)
    assert known.trials[-1] == (TRIALS_KEPT + 8, -1.0)
