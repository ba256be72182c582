"""Intervals of ratios of speeds: what they cover, what they claim, and where they are shown."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from scipy import stats

from cosched.report.events import read_events
from cosched.report.findings import NO_INTERVAL, headline
from cosched.report.html import write_report
from cosched.report.intervals import Ratio, cut, paired_ratio, student_t
from cosched.report.remarks import interval_line
from cosched.report.table import arm_cells, speed_ratio, times
from cosched.telemetry.metrics import Part, RunSummary, Turn
from tests.helpers.made_up_runs import make_run

RUNS = 400  # simulated ones of each machine: 95 % comes out between 92 and 98 % in 99 of 100 tests


def interval_of(ours: list[Turn], theirs: list[Turn]) -> Ratio:
    parts, _ = cut({"ours": ours, "theirs": theirs})
    return paired_ratio(parts["ours"], parts["theirs"])


# --- the mathematics -------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [5, 7, 11, 40])
def test_students_quantile(degrees: int) -> None:
    """The expansion, whose first omitted term is below 0.001 from five degrees on."""
    assert student_t(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=1e-3)


def test_the_ratio_is_that_of_the_totals() -> None:
    """Tokens over seconds of everything, not a mean of ratios: as the table has it."""
    ours = [Part(30, 1.0), Part(30, 5.0)] * 3
    theirs = [Part(30, 2.0), Part(32, 1.0)] * 3
    found = paired_ratio(ours, theirs)
    assert found.value == pytest.approx((180 / 18) / (186 / 9))
    back = paired_ratio(theirs, ours)
    assert back.value == pytest.approx(1 / found.value)
    assert back.high is not None
    assert 1 / back.high == pytest.approx(found.low, abs=0.02)  # both ends are rounded outward


def test_the_interval_is_the_jackknife_s() -> None:
    """By hand: equal tokens, so log R without a part is that of the other parts' seconds."""
    seconds = [1.0, 1.2, 0.9, 1.1, 1.3, 1.0]
    found = paired_ratio([Part(32, s) for s in seconds], [Part(32, 1.0)] * 6)
    without = [math.log(5 / (sum(seconds) - s)) for s in seconds]
    spread = 5 / 6 * sum((one - sum(without) / 6) ** 2 for one in without)
    reach = stats.t.ppf(0.975, 5) * math.sqrt(spread)
    assert found.low == math.floor(100 * 6 / sum(seconds) * math.exp(-reach)) / 100
    assert found.high == math.ceil(100 * 6 / sum(seconds) * math.exp(reach)) / 100


def test_ends_are_rounded_outward() -> None:
    """An interval that is shown as (1.00 to 1.02) must not be behind a claim."""
    close = paired_ratio([Part(32, 0.996)] * 6, [Part(32, 1.0)] * 6)
    assert (close.low, close.high) == (1.0, 1.01)
    assert not close.above
    assert not close.below


# --- what is a part --------------------------------------------------------------------------


def turns_of(*groups: list[int], rate: float = 32.0, first: int = 1) -> list[Turn]:
    return [
        Turn(group, tokens, tokens / rate)
        for group, some in enumerate(groups, first)
        for tokens in some
    ]


def test_parts_of_requests() -> None:
    """Whole groups, neighbours together beyond the most parts; all that was done is in one."""
    own = turns_of(*([32, 16 + group] for group in range(30)))
    parts, of = cut({"a": own, "b": own})
    assert of == "requests"
    assert len(parts["a"]) == 12
    assert parts["a"][0].tokens == sum(turn.tokens for turn in own if turn.group <= 3)
    assert sum(part.tokens for part in parts["a"]) == sum(turn.tokens for turn in own)
    assert sum(p.seconds for p in parts["a"]) == pytest.approx(sum(t.seconds for t in own))


def test_parts_of_a_text_are_at_the_same_place() -> None:
    """Turns of a better draft are longer: its tenth is further on in the text than the control's."""
    short, long = turns_of([32] * 48), turns_of([48] * 32)
    parts, of = cut({"short": short, "long": long})
    assert of == "text"
    assert len(parts["short"]) == len(parts["long"]) == 6
    assert [part.tokens for part in parts["short"]] == [256] * 6
    assert all(abs(part.tokens - 256) <= 48 for part in parts["long"])


def test_answers_of_different_length_are_paired_by_their_shares() -> None:
    """Sampled answers differ: half of the one goes with half of the other, request by request."""
    parts, _ = cut({"a": turns_of([32] * 30, [32] * 10), "b": turns_of([32] * 10, [32] * 30)})
    tokens = {arm: [part.tokens for part in some] for arm, some in parts.items()}
    assert sum(tokens["a"][:3]) == 30 * 32, "the first request is the first half of both"
    assert sum(tokens["b"][:3]) == 10 * 32


@pytest.mark.parametrize(
    "turns",
    [
        {},
        {"a": []},
        {"a": turns_of([32] * 23), "b": turns_of([32] * 40)},
        {"a": turns_of(*[[512]] * 5), "b": turns_of(*[[512]] * 5)},  # one turn a group, as SGLang
        {"a": turns_of([32] * 30), "b": turns_of([32] * 30, first=2)},  # nothing in common
    ],
)
def test_too_little_has_no_parts(turns: dict[str, list[Turn]]) -> None:
    """Five groups, or 23 turns: an interval over so little would be a guess."""
    parts, of = cut(turns)
    assert of is None
    assert parts == {arm: [] for arm in turns}


def test_groups_that_an_arm_did_not_reach_are_left_out() -> None:
    """An interrupted run compares what all arms did; one that did nothing takes nothing away."""
    own = turns_of(*[[32]] * 8)
    parts, of = cut({"a": own, "b": own[:7], "c": []})
    assert of == "requests"
    assert sum(part.tokens for part in parts["a"]) == 7 * 32
    assert parts["c"] == []


# --- whether it holds, by simulation ---------------------------------------------------------


@dataclass
class Machine:
    """A clock for two arms that take turns: time a unit of work takes, and what goes wrong.

    ``noise`` is the relative standard deviation of a turn, ``memory`` its correlation with the next
    turn of the same arm. ``drift`` is the logarithm of how much slower the machine becomes over the
    run. ``halts`` come every so many seconds in the mean and stretch time tenfold for ten seconds.
    """

    noise: float = 0.2
    memory: float = 0.0
    drift: float = 0.0
    halts: float = math.inf
    slow_turn: float = 1.0
    ratio: float = 1.25

    def run(self, rng: random.Random, groups: int, turns: int) -> tuple[list[Turn], list[Turn]]:
        """Two arms, the first ``ratio`` times as fast, whose cost grows along each text by a half."""
        self._left, self._halted = self._until_halt(rng), False
        outlier = rng.randrange(groups * turns), rng.randrange(2)
        states = [rng.gauss(0, 1), rng.gauss(0, 1)]
        found: tuple[list[Turn], list[Turn]] = ([], [])
        for number in range(groups * turns):
            for arm, speed in enumerate((self.ratio, 1.0)):
                fresh = math.sqrt(1 - self.memory**2) * rng.gauss(0, 1)
                states[arm] = self.memory * states[arm] + fresh
                tokens = 32 + rng.randrange(4)
                work = tokens / 32 / speed * (1 + 0.5 * (number % turns) / turns)
                work *= math.exp(self.noise * states[arm])
                work *= math.exp(self.drift * number / (groups * turns))
                if (number, arm) == outlier:
                    work *= self.slow_turn
                seconds = self._spend(rng, work)
                found[arm].append(Turn(number // turns, tokens, seconds))
        return found

    def _until_halt(self, rng: random.Random) -> float:
        return rng.expovariate(1 / self.halts) if self.halts < math.inf else math.inf

    def _spend(self, rng: random.Random, work: float) -> float:
        spent = 0.0
        while True:
            slower = 10.0 if self._halted else 1.0
            if work * slower <= self._left:
                self._left -= work * slower
                return spent + work * slower
            spent, work = spent + self._left, work - self._left / slower
            self._halted = not self._halted
            self._left = rng.expovariate(1 / 10) if self._halted else self._until_halt(rng)


def simulated(machine: Machine, groups: int, turns: int) -> Iterable[Ratio]:
    rng = random.Random(0)
    for _ in range(RUNS):
        yield interval_of(*machine.run(rng, groups, turns))


def coverage(found: Iterable[Ratio]) -> float:
    hits = [one.low <= 1.25 <= one.high for one in found if one.low and one.high]
    return sum(hits) / RUNS


@pytest.mark.parametrize(
    ("groups", "turns"),
    [
        (6, 8),
        (1, 24),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in ((20, 2), (1, 96), (3, 20))),
    ],
)
@pytest.mark.parametrize(
    ("machine", "least"),
    [
        (Machine(), 0.92),
        (Machine(drift=1.0), 0.92),
        (Machine(halts=30.0), 0.92),
        (Machine(slow_turn=30.0), 0.92),
        # A half of a turn's noise is still there in the next: parts of four turns hide not all of it.
        (Machine(memory=0.5), 0.87),
    ],
    ids=["steady", "drift", "halts", "one slow turn", "correlated"],
)
def test_coverage(machine: Machine, least: float, groups: int, turns: int) -> None:
    """The true ratio is in the interval as often as is said, whatever the machine does."""
    assert coverage(simulated(machine, groups, turns)) >= least


def test_a_difference_that_is_there_is_claimed() -> None:
    """An interval that covers everything would be of no use: here one arm is 1.25 times as fast."""
    claims = [one.above for one in simulated(Machine(), 1, 96)]
    assert sum(claims) / RUNS > 0.95


def test_parts_absorb_correlation() -> None:
    """Turns that go with their neighbours: an interval over single turns would be far too narrow."""
    rng, narrow = random.Random(0), []
    for _ in range(RUNS):
        ours, theirs = Machine(memory=0.7).run(rng, 1, 96)
        single = [[Part(turn.tokens, turn.seconds) for turn in some] for some in (ours, theirs)]
        narrow.append(paired_ratio(*single))
    assert coverage(narrow) < 0.8
    assert coverage(simulated(Machine(memory=0.7), 1, 96)) > 0.87


def test_drift_does_not_widen() -> None:
    """A machine that becomes three times slower is slow in both arms: pairs do not mind."""
    widths = [
        sorted(one.high - one.low for one in simulated(Machine(drift=drift), 1, 96))[RUNS // 2]
        for drift in (0.0, math.log(3))
    ]
    assert widths[1] < 1.3 * widths[0]


def test_one_slow_turn_is_no_difference() -> None:
    """Equal arms, and a turn that took thirty times as long because something else ran."""
    claims = 0
    for one in simulated(Machine(slow_turn=30.0, ratio=1.0), 1, 48):
        claims += one.above or one.below
    assert claims / RUNS < 0.05


# --- where it is shown -----------------------------------------------------------------------


def spread_out(summary: RunSummary, spread: float) -> RunSummary:
    """The same speeds, from parts that vary by so much: every other one slower, not in all arms."""
    for number, arm in enumerate(summary.arms.values()):
        parts = len(arm.parts)
        factors = [1 + spread * (-1) ** (part // 2**number) for part in range(parts)]
        scale = arm.seconds["wall"] / sum(factors)
        arm.parts = [
            Part(part.tokens, factor * scale)
            for part, factor in zip(arm.parts, factors, strict=True)
        ]
    return summary


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [
        (Ratio(1.12, 1.08, 1.16), "1.12\u00d7 (1.08\u20131.16)"),
        (Ratio(1.12), "1.12\u00d7"),
        (None, "\u2013"),
    ],
)
def test_how_a_ratio_is_shown(ratio: Ratio | None, shown: str) -> None:
    assert times(ratio) == shown


@pytest.mark.parametrize(
    ("speeds", "spread", "verdict", "words"),
    [
        ((150.0, 140.0, 180.0), 0.01, "paid", "Adaptation paid: "),
        ((150.0, 140.0, 180.0), 0.4, "even", "broke even: the difference is within what"),
        ((150.0, 140.0, 151.0), 0.01, "even", "broke even: the difference is within what"),
        ((150.0, 140.0, 120.0), 0.01, "lost", "did not pay: adapted"),
        ((150.0, 140.0, 120.0), 0.4, "even", "broke even: the difference is within what"),
        ((150.0, 181.0, 180.0), 0.01, "even", "broke even: beside frozen+window, which costs"),
        ((150.0, 200.0, 180.0), 0.01, "lost", "frozen+window, which costs nothing, is faster"),
    ],
)
def test_a_headline_claims_no_less_than_the_interval(
    tmp_path: Path, speeds: tuple[float, ...], spread: float, verdict: str, words: str
) -> None:
    """A fixed 2 % was taken for a difference: 20 % may be chance, and 3 % may be none."""
    arms = ("frozen", "frozen+window", "adapted")
    made = make_run(tmp_path / "run", arms, speeds=dict(zip(arms, speeds, strict=True)))
    found = headline(spread_out(made, spread), read_events(tmp_path / "run"))
    assert found.verdict == verdict
    assert words in found.sentence


def test_plain_is_faster_only_where_that_is_sure(tmp_path: Path) -> None:
    """The warning that no draft at all is faster is a claim as well."""
    arms = {"plain": 100.0, "frozen": 80.0, "adapted": 90.0}
    summary = make_run(tmp_path / "run", tuple(arms), speeds=arms)
    events = read_events(tmp_path / "run")
    warning = "no draft at all is faster"
    assert warning in " ".join(headline(spread_out(summary, 0.01), events).details)
    assert warning not in " ".join(headline(spread_out(summary, 0.4), events).details)


@pytest.mark.slow
def test_a_short_run_claims_nothing(tmp_path: Path) -> None:
    """No interval, no verdict: the page says why, and still shows the ratios."""
    summary = make_run(tmp_path / "run", num_requests=1)
    assert summary.run["parts_of"] is None
    found = headline(summary, read_events(tmp_path / "run"))
    assert found.verdict == "none"
    assert found.sentence.startswith("adapted committed")
    assert found.details[0] == NO_INTERVAL
    assert arm_cells(summary, "adapted")[6:8] == ["1.80\u00d7", "1.20\u00d7"]
    assert write_report(tmp_path / "run").read_text().count(NO_INTERVAL) == 2


def test_an_older_run_still_has_its_ratios(tmp_path: Path) -> None:
    """A summary without parts is one of an earlier version."""
    summary = make_run(tmp_path / "run")
    for arm in summary.arms.values():
        arm.parts = []
    found = speed_ratio(summary.arms, "adapted", "frozen")
    assert found == Ratio(pytest.approx(1.2))
    assert interval_line(summary) == NO_INTERVAL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_requests", "run", "words"),
    [
        (3, {}, ("6 parts", "at nearly the same time", "stretch of a request")),
        (8, {}, ("8 parts", "at nearly the same time", "whole groups")),
        (8, {"engine": "sglang"}, ("one after the other", "is not in the interval")),
    ],
)
def test_the_page_says_what_the_interval_covers(
    tmp_path: Path, num_requests: int, run: dict[str, object], words: tuple[str, ...]
) -> None:
    """Over which parts, whether other texts are meant, and whether the arms shared the clock."""
    summary = make_run(tmp_path / "run", num_requests=num_requests, **run)
    line = interval_line(summary)
    assert all(word in line for word in words)
    assert ("nearly the same time" in line) == (run == {})
    assert line in write_report(tmp_path / "run").read_text()


def test_one_arm_has_no_ratio_to_explain(tmp_path: Path) -> None:
    assert interval_line(make_run(tmp_path / "run", ("frozen",))) == ""
