"""What updates cost and bring: the statistics of it, and the policy that goes by them."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import groupby
from typing import Any

import msgspec
import pytest

from cosched.guard.monitor import Monitor, Scores
from cosched.guard.settings import ShadowSettings
from cosched.guard.statistics import BLOCK, Lead
from cosched.loop.counters import Counters, Ledger
from cosched.records import Standing, Verdict
from schedulers.earned import KNOWN_ROWS
from tests.helpers.policies import policy
from tests.helpers.rounds import round_of

# --- earned --------------------------------------------------------------------------------


def served(
    counters: Counters, seconds: float, gain: float, every: Any, update_seconds: float
) -> tuple[int, int]:
    """Serve one request for so long; updates and rounds. Each update is scored, with noise."""
    updates, rounds, noise, lead = 0, 0, random.Random(0), Lead()
    while seconds > 0:
        known = Standing(lead.proven, level_rows=KNOWN_ROWS)
        counters.observe(round_of([2], seconds=0.02), known)
        seconds, rounds = seconds - 0.02, rounds + 1
        steps = every.decide(counters.snapshot(1, 0, 0, known)).num_steps
        if steps:
            counters.begin_update(steps)
            counters.updates += 1
            updates += 1
            counters.update_seconds_total += update_seconds
            counters.published()
            # Of 16 rows the mean has a noise of 0.05.
            lead.add([2 - 2 / gain + noise.gauss(0, 0.1) for _ in range(16 // BLOCK)], 16)
    return updates, rounds


def updates_in(
    counters: Counters,
    every: Any,
    known: Standing,
    rounds: int,
    seconds: float,
    committed: int = 2,
    forgets: bool = False,
) -> int:
    """How many updates, each of so many seconds, are made in so many rounds of 20 ms."""
    before = counters.updates
    for _ in range(rounds):
        counters.observe(round_of([committed], seconds=0.02), known)
        if every.decide(counters.snapshot(1, 0, 0, known, forgets)).num_steps:
            counters.begin_update(1)
            counters.updates += 1
            counters.update_seconds_total += seconds
    return counters.updates - before


def test_what_earns_nothing_is_let_be() -> None:
    """A trial, however dear, and then a share of the time that nobody misses."""
    for update_seconds, more in ((0.1, 3), (0.3, 1), (0.4, 0)):
        every, counters = policy("earned", rounds=8, explore_share=0.005), Counters()
        assert served(counters, 4.0, 1.0, every, update_seconds)[0] == 6
        updates, _ = served(counters, 400.0, 1.0, every, update_seconds)
        assert updates == 6 * more  # trials of 0.6, 1.8 and 2.4 seconds out of 2.02


def test_what_earns_goes_on_at_full_cadence() -> None:
    every, counters = policy("earned", rounds=8, trial_updates=16), Counters()
    served(counters, 10.0, 1.5, every, 0.01)
    updates, rounds = served(counters, 20.0, 1.5, every, 0.01)
    assert updates == rounds // 8


@pytest.mark.parametrize("gain", [0.8, 1.0, 1.02, 1.1, 1.5])
@pytest.mark.parametrize("cost", [0.01, 0.1, 1.0])
def test_learning_costs_no_more_than_it_brings(gain: float, cost: float) -> None:
    """Beyond a trial and the small share, however dear updates are and whatever they bring."""
    every, counters = policy("earned", rounds=8, explore_share=0.005), Counters()
    served(counters, 60.0, gain, every, cost)
    saved = max(0.0, gain - 1) * 60
    assert counters.update_seconds_total <= 6.5 * 1.05 * cost + 0.005 * 61 + 0.5 * saved * 1.05


def test_each_kind_of_text_has_a_trial_and_earnings_of_its_own() -> None:
    """What was saved elsewhere buys nothing, and what elsewhere was spent for nothing is not missing:
    one kind after the other, each has its trial, and then an update for every hundred times its seconds."""
    every = policy("earned", rounds=8, explore_share=0.01)
    counters = Counters(ledgers=[Ledger(), Ledger(), Ledger(), Ledger(earned=1000.0)])
    updates = [
        updates_in(counters, every, Standing(level=level, level_rows=KNOWN_ROWS), 2000, 0.04)
        for level in range(4)
    ]
    assert updates[0] == 6 + 6  # a hundredth of 40 seconds is one more trial of 0.24
    assert updates[1] == updates[2] == 6  # no trial in advance where there is less to gain
    assert updates[3] == 2000 // 8


@pytest.mark.parametrize(("level", "rows", "updates"), [(0, 32, 6), (0, 31, 0), (1, 32, 0)])
def test_a_trial_in_advance_is_for_text_that_is_known_to_be_hard(
    level: int, rows: int, updates: int
) -> None:
    """By a few rows a draft that is at home looks lost now and then: it paid for a trial there."""
    every, counters = policy("earned", rounds=8), Counters()
    known = Standing(level=level, level_rows=rows)
    assert updates_in(counters, every, known, 80, 0.04, committed=1) == updates


@pytest.mark.parametrize(
    ("tokens", "seconds", "forgets", "updates"),
    [
        (400, 0.04, True, 6),
        (400, 0.4, True, 1),  # what one costs is known then: six of 8 seconds are too many
        (400, 0.4, False, 6),  # what is learnt stays
        (90, 0.04, True, 0),  # 48 rounds of trial would leave hardly any to be served
        (90, 0.04, False, 6),
    ],
)
def test_a_trial_in_advance_has_to_pay_in_its_request(
    tokens: int, seconds: float, forgets: bool, updates: int
) -> None:
    """A dear draft's trial took a sixth of two answers, and what it taught ended with them."""
    every = policy("earned", rounds=8)
    counters, known = (
        Counters(committed=100 * tokens, finished=100),
        Standing(level_rows=KNOWN_ROWS),
    )
    assert updates_in(counters, every, known, 90, seconds, 1, forgets) == updates


@pytest.mark.parametrize(
    ("lead", "forgets", "updates"), [(0.5, True, 6), (0.02, True, 0), (0.5, False, 0)]
)
def test_where_learning_ends_with_a_request_each_is_an_investment(
    lead: float, forgets: bool, updates: int
) -> None:
    """Code had spent what it earned, and German, as hard for the draft, was learnt nothing of."""
    every = policy("earned", rounds=8)
    counters = Counters(
        committed=40_000, finished=100, updates=10, updates_at_reset=10,
        update_seconds_total=1.0, ledgers=[Ledger(learning=1.0)],
    )  # fmt: skip
    known = Standing(lead, level_rows=KNOWN_ROWS)
    assert updates_in(counters, every, known, 90, 0.1, forgets=forgets) == updates


@pytest.mark.parametrize(("tokens", "updates"), [(4000, 6), (1000, 0)])
def test_a_long_answer_has_its_trial_at_its_beginning(tokens: int, updates: int) -> None:
    """The share that may be explored is of what is left, too: at 20 ms a round a fiftieth of 80 seconds."""
    every = policy("earned", rounds=8, step_ms=200)
    counters = Counters(committed=100 * tokens, finished=100)
    known = Standing(level=2, level_rows=KNOWN_ROWS)
    assert updates_in(counters, every, known, 90, 0.2, 1, forgets=True) == updates


def test_a_trial_is_made_at_once() -> None:
    """Where a request's learning ends with it, updates come together, in a few requests, and not one in each."""
    every, counters = policy("earned", rounds=8, explore_share=0.05, step_ms=100), Counters()
    known, by_request = Standing(level=1, level_rows=KNOWN_ROWS), []
    for _ in range(60):
        by_request.append(updates_in(counters, every, known, 100, 0.1, forgets=True))
        counters.start_anew()
        counters.finished += 1
    trials = [sum(group) for some, group in groupby(by_request, bool) if some]
    assert sum(trials) * 0.1 <= 0.05 * 120 + 0.6 + 0.1
    assert trials == [6] * len(trials)
    assert len(trials) >= 8


def test_what_goes_on_beside_rounds_is_charged_for_all_that_it_slowed() -> None:
    """From the round in which it was begun to the one in which it ended, that one included."""
    counters, updates = Counters(), [False] * 20 + [True] * 3 + [False] * 20
    for beside in updates:
        counters.beside = beside
        counters.observe(round_of([2], seconds=0.03 if beside else 0.02))
    assert counters.snapshot(1, 0, 0).seconds_updating == pytest.approx(0.03)


def test_nothing_is_earned_without_evidence() -> None:
    """A score that could be chance buys no update; nor does a draft that has gone back."""
    counters, monitor = Counters(serves_loaded=False), Monitor()
    settings, seen = ShadowSettings(), counters.snapshot(1, 7, 0)
    seen = msgspec.structs.replace(seen, serves_loaded=False)

    def look(score: float) -> Verdict:
        return monitor.look(Scores([1 + score] * 16, loaded=[1.0] * 16), settings, seen)

    for _ in range(3):
        look(1.0)
    counters.observe(round_of([3], seconds=1.0), monitor.standing)
    assert counters.earned_seconds == 0
    for score in (0.9, 1.1) * 8:
        look(score)
    counters.observe(round_of([3], seconds=1.0), monitor.standing)
    earned = counters.earned_seconds
    assert 0.45 < earned < 0.5  # a token of the three, which the draft as loaded would not have had
    while look(-1.0).to is None:
        pass
    counters.observe(round_of([2], seconds=1.0), monitor.standing)
    assert counters.earned_seconds == earned


@pytest.mark.parametrize(
    ("plain_share", "earned"),
    [
        (
            None,
            0.5,
        ),  # one of three tokens is what was learnt: the loaded draft takes half as long again
        (0.6, 0.5),  # no draft at all would take 3 * 0.6 - 1 = 0.8 longer
        (0.4, 0.2),  # no draft at all is faster than the draft as loaded
        (0.3, 0.0),  # drafting does not pay even now
    ],
)
def test_where_drafting_can_be_left_nothing_is_earned_that_leaving_it_would_have_saved(
    plain_share: float | None, earned: float
) -> None:
    """By a draft length that is chosen while serving the draft as loaded would not be used where none is
    faster: what was learnt is held against the faster of both."""
    counters = Counters(serves_loaded=False)
    round_ = replace(round_of([3], seconds=1.0), plain_share=plain_share)
    counters.observe(round_, Standing(lead_tokens=1.0))
    assert counters.earned_seconds == pytest.approx(earned)


# --- what they decide on -------------------------------------------------------------------


def test_what_is_left_of_a_text_is_estimated() -> None:
    """As much as has been seen; then committed over finished; never more than is allowed."""
    counters = Counters()

    def left(num_running: int = 2) -> float:
        return counters.snapshot(num_running, 0, 0).expected_tokens_left

    assert left() == 0
    counters.observe(round_of([3, 3]))
    assert left() == 6
    counters.observe(round_of([3, 3], finished=("0", "1", "2")))
    assert left() == 4
    counters.observe(round_of([3, 3], tokens_left=5))
    assert left() == 2.5
    assert left(num_running=0) == 0


def test_costs_and_gains_are_learnt_from_updates() -> None:
    """The first update warms up and is left out; later ones count by the micro-step."""
    counters = Counters()
    for number, (cost, length) in enumerate([(9.0, 2), (0.4, 2), (0.4, 3), (0.4, 3)]):
        for _ in range(200):
            counters.observe(round_of([length]))
        counters.begin_update(num_steps=2)
        counters.update_seconds_total += cost
        counters.publish_seconds += 0.1
        counters.updates += 1
        seen = counters.snapshot(1, 0, 0)
        assert seen.last_update_seconds == pytest.approx(cost + 0.1)
        assert seen.serving_seconds_since_update == 0
        assert seen.micro_step_seconds == pytest.approx(0.2 if number > 1 else 0.0)
        # From 2 to 3 tokens in one of the updates, with a weight of 0.1; then one without a gain.
        expected = [1.0, 1.0, 1.5**0.1, 1.5**0.09][number]
        assert seen.update_gain == pytest.approx(expected, rel=1e-4)


def test_a_reset_forgets_the_text_and_not_the_bill() -> None:
    """State per request: the next text is not compared with the last, its updates still cost."""
    counters = Counters(updates=3, step_seconds=0.2, shortfall=20.0, recent_at_update=2.0)
    counters.update_seconds_total = 4.0
    counters.start_anew()
    seen = counters.snapshot(1, 0, 0)
    assert (seen.acceptance_shortfall, seen.rounds_since_update) == (0, 0)
    assert (seen.last_update_seconds, seen.micro_step_seconds) == (4.0, 0.2)
