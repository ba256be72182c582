"""The guard's decisions on scripted numbers: no model, no clock."""

from __future__ import annotations

import copy
import math
import random
import statistics

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosched.guard.monitor import (
    BEGINNING,
    FALL_TOLERANCE,
    LEAST_ROWS,
    LONGEST_PAUSE,
    Scores,
    Watch,
)
from cosched.guard.monitor import ShadowSettings as Settings
from cosched.guard.statistics import EVIDENCE_ROWS, MEMORY, PIECE, Evidence
from cosched.loop.counters import Totals
from cosched.records import Verdict

SETTINGS = Settings(
    anchors=PIECE,
    tolerance=0.05,
    patience=3,
    check_every=4,
    cooldown_rounds=100,
    trials=12,
    prospect_rows=1_000_000,  # all trials are made, but where a test is about giving up
    prove_first=False,
)
PROVE_FIRST = msgspec.structs.replace(SETTINGS, prove_first=True)
LENGTHS = st.floats(1, 4)
ROWS = PIECE  # of each comparison
LEAST = EVIDENCE_ROWS // ROWS  # comparisons that may be evidence


def judged(
    watch: Watch, ahead: float = 0.0, loaded: float | None = None, round_: int = 0, version: int = 1
) -> Verdict:
    """Judge a candidate that scores ``ahead`` of 2.0; the loaded draft scores ``loaded`` of it."""
    scores = Scores(
        serving=lengths(0.0),
        candidate=lengths(ahead),
        loaded=None if loaded is None else lengths(loaded),
    )
    return watch.judge(scores, SETTINGS, round_, version)


def lengths(ahead: float) -> list[float]:
    return [1.0 + ahead, 3.0 + ahead] * (ROWS // 2)


def adapted(**changes: object) -> Watch:
    return Watch(at_loaded=False, **changes)


# --- evidence ------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=LEAST, max_size=MEMORY // ROWS))
def test_evidence_is_the_mean_in_standard_errors(differences: list[float]) -> None:
    """Up to its memory it is the textbook's t statistic."""
    evidence = Evidence()
    for difference in differences:
        evidence.add(lengths(difference), lengths(0.0))
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    assert evidence.mean == pytest.approx(mean, abs=1e-12)
    if error > 1e-6:  # below, the moving variance is rounding noise
        assert evidence.z == pytest.approx(mean / error, rel=1e-6, abs=1e-9)


def test_a_piece_counts_by_its_rows() -> None:
    """As the weighted mean and its standard error from their definitions."""
    draw, evidence = random.Random(4), Evidence()
    pairs = [(draw.gauss(0.1, 1 / rows**0.5), rows) for rows in [16, 8, 16, 4, 16, 12, 16, 16] * 2]
    for difference, rows in pairs:
        evidence.add([1.5 + difference] * rows, [1.5] * rows)
    weight = sum(rows for _, rows in pairs)
    mean = sum(difference * rows for difference, rows in pairs) / weight
    squares = sum(rows * (difference - mean) ** 2 for difference, rows in pairs)
    assert evidence.mean == pytest.approx(mean)
    number = weight**2 / sum(rows**2 for _, rows in pairs)
    assert EVIDENCE_ROWS <= weight < MEMORY  # nothing is forgotten yet
    assert evidence.z == pytest.approx(mean / math.sqrt(squares / (number - 1) / weight))


@settings(deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=EVIDENCE_ROWS, max_size=MEMORY))
def test_many_rows_at_once_are_many_pieces(differences: list[float]) -> None:
    at_once, apart = Evidence(), Evidence()
    at_once.add(differences, [0.0] * len(differences))
    for start in range(0, len(differences), PIECE):
        piece = differences[start : start + PIECE]
        apart.add(piece, [0.0] * len(piece))
    assert at_once == apart
    assert at_once.mean == pytest.approx(statistics.fmean(differences), abs=1e-12)


def test_scores_that_are_no_numbers_speak_against_a_draft() -> None:
    """Weights that have become NaN score NaN: that is no proof that they are better."""
    for one in (math.nan, -math.nan, math.inf):
        evidence = Evidence()
        evidence.add([one] * EVIDENCE_ROWS, [2.0] * EVIDENCE_ROWS)
        assert evidence.z == -math.inf


def test_evidence_needs_rows_and_forgets() -> None:
    """A few rows say nothing; what was true long ago is outweighed."""
    evidence = Evidence()
    for _ in range(LEAST - 1):
        evidence.add(lengths(1.0), lengths(0.0))
        assert evidence.z == 0
    evidence.add(lengths(1.0), lengths(0.0))
    assert evidence.z == math.inf
    for number in range(6 * MEMORY // ROWS):
        evidence.add(lengths(-1.0 + 0.1 * (-1) ** number), lengths(0.0))
    assert evidence.mean == pytest.approx(-1, abs=0.02)
    assert evidence.z < -10


# --- the gate ------------------------------------------------------------------------------


@given(st.floats(-1, 1))
def test_a_candidate_serves_unless_it_scores_worse(ahead: float) -> None:
    """To the tolerance; the verdict carries the scores, and how many rows they are means of."""
    verdict = judged(Watch(), ahead)
    if abs(ahead + SETTINGS.tolerance) > 1e-9:
        assert verdict.publish == (ahead > -SETTINGS.tolerance)
    assert (verdict.serving_score, verdict.num_rows) == (2.0, ROWS)
    assert verdict.candidate_score == pytest.approx(2.0 + ahead)
    assert verdict.back_to is None


def test_refusals_in_a_row_start_training_again_from_what_serves() -> None:
    """Two refusals and a pass count from nothing; the third in a row goes back, and once."""
    watch = Watch()
    script = [-1, -1, 0, -1, -1, -1, -1, -1, -1]
    back = [judged(watch, ahead, version=7).back_to for ahead in script]
    assert back == [None, None, None, None, None, 7, None, None, 7]
    assert (watch.refused, watch.rolled_back) == (8, 0)
    assert not watch.at_loaded  # one of them was published


# --- the draft as loaded -------------------------------------------------------------------


def test_checks_are_due_after_some_publications() -> None:
    watch, due = Watch(), []
    for _ in range(9):
        due.append(watch.check_due(SETTINGS))
        judged(watch, loaded=0.0 if due[-1] else None)
    assert due == [False] * 4 + [True] + [False] * 3 + [True]
    for _ in range(LEAST):
        watch.evidence.add(lengths(0.3), lengths(0.0))
    due = []
    for _ in range(20):
        due.append(watch.check_due(SETTINGS))
        judged(watch, loaded=-0.3 if due[-1] else None)
    assert due == [n == 15 for n in range(20)]  # learning pays: a quarter as often


def test_a_draft_that_learning_made_worse_goes_back_and_cools_down() -> None:
    """Not at the first bad comparison; then to version 0, with a pause that doubles each time."""
    watch, draw = adapted(), random.Random(0)
    verdicts = [judged(watch, loaded=draw.gauss(0.2, 0.1), round_=50) for _ in range(LEAST)]
    assert [v.back_to for v in verdicts] == [None] * (LEAST - 1) + [0]
    assert not verdicts[-1].publish
    assert (watch.resumes_at, watch.at_loaded, watch.proving) == (150, True, True)
    # Trials that bring nothing serve nobody, and end in a longer pause each time.
    for round_, resumes in ((150, 350), (350, 750), (750, 1550)):
        found: list[Verdict] = []
        while not found or found[-1].back_to is None:
            ahead = draw.gauss(-0.05, 0.1)
            found.append(judged(watch, ahead, round_=round_, version=2))
        assert not any(v.publish for v in found)
        assert BEGINNING // ROWS <= len(found) <= SETTINGS.trials
        assert (found[-1].back_to, watch.resumes_at) == (2, resumes)


def test_a_trial_that_is_better_serves_again() -> None:
    """With the same confidence; from then on the gate is the usual one."""
    watch, draw = Watch(proving=True), random.Random(1)
    found = [judged(watch, draw.gauss(0.2, 0.05)).publish for _ in range(LEAST)]
    assert found == [False] * (LEAST - 1) + [True]
    assert judged(watch, 0.0).publish
    assert not judged(watch, -0.2).publish


def test_the_loaded_draft_serves_until_another_has_shown_that_it_is_better() -> None:
    """From the first update on; what was shown is remembered, and what is worse ends the trials."""

    def trial(watch: Watch, ahead: float) -> Verdict:
        scores = Scores(serving=lengths(0.0), candidate=lengths(ahead))
        return watch.judge(scores, PROVE_FIRST, 10, 0)

    better, worse, draw = Watch(), Watch(), random.Random(2)
    served = [trial(better, draw.gauss(0.2, 0.05)).publish for _ in range(LEAST + 1)]
    assert served == [False] * (LEAST - 1) + [True, True]
    assert better.evidence.mean == pytest.approx(0.2, abs=0.05)
    found = [trial(worse, draw.gauss(-0.2, 0.05)) for _ in range(BEGINNING // ROWS)]
    assert not any(verdict.publish for verdict in found)
    assert (worse.resumes_at, worse.evidence) == (10 + 100, Evidence())


def given_up(mean: float, prospect_rows: int, seed: int) -> int | None:
    """After how many judgements, of noise of 0.1 tokens; None if the candidate serves."""
    settings = msgspec.structs.replace(PROVE_FIRST, prospect_rows=prospect_rows)
    watch, draw = Watch(), random.Random(seed)
    for number in range(1, settings.trials + 1):
        scores = Scores(serving=lengths(0.0), candidate=lengths(draw.gauss(mean, 0.1)))
        verdict = watch.judge(scores, settings, 10, 0)
        if verdict.publish:
            return None
        if verdict.back_to is not None:
            assert watch.resumes_at == 10 + settings.cooldown_rounds
            return number
    raise AssertionError("neither served nor given up")


def test_what_promises_nothing_is_given_up_early() -> None:
    """Not before 64 rows; a candidate that brings nothing mostly then (200 seeds, fixed), while one
    that brings a standard deviation and a half mostly serves. Who has patience makes all trials."""
    first = BEGINNING // ROWS
    nothing = [given_up(0.0, 512, seed) for seed in range(200)]
    assert min(number or first for number in nothing) == first
    assert sum(number == first for number in nothing) > 150
    assert sum(number is None for number in nothing) < 10
    better = [given_up(0.15, 512, seed) for seed in range(200)]
    assert sum(number is None for number in better) > 160
    patient = [given_up(0.0, 10**9, seed) for seed in range(200)]
    assert max(number or 0 for number in patient) == SETTINGS.trials


def test_who_is_given_up_would_not_have_made_it() -> None:
    """A mean whose z is s after m rows has z = s sqrt(n / m) after n, if all goes on as it began."""
    settings, draw = Settings(anchors=ROWS, confidence=3.0, prospect_rows=512), random.Random(6)
    seen = set()
    for _ in range(300):
        watch, mean = Watch(), draw.choice([0.02, 0.05, 0.08])
        while True:
            scores = Scores(serving=lengths(0.0), candidate=lengths(draw.gauss(mean, 0.1)))
            evidence = copy.deepcopy(watch.evidence)
            evidence.add(scores.candidate, scores.serving)
            z, rows, trials = evidence.errors_ahead(), evidence.weight, watch.trials + 1
            verdict = watch.judge(scores, settings, 0, 0)
            if verdict.publish:
                break
            doomed = rows >= 64 and z * math.sqrt(512 / rows) < 3
            assert (verdict.back_to == 0) == (doomed or trials == settings.trials)
            if verdict.back_to == 0:
                seen.add((doomed, rows))
                break
    assert {rows for doomed, rows in seen if doomed} >= {64, 80, 96}


def test_pauses_do_not_grow_for_ever() -> None:
    """Text may change after months: what has been given up often is tried again all the same."""
    watch, pauses = Watch(), []
    settings = msgspec.structs.replace(PROVE_FIRST, prospect_rows=512)
    worse = Scores(serving=lengths(0.0), candidate=lengths(-0.1))
    for _ in range(8):
        while watch.judge(worse, settings, 0, 0).back_to is None:
            pass
        pauses.append(watch.resumes_at)
    assert pauses == [100 * min(2**n, LONGEST_PAUSE) for n in range(8)]


def test_trials_on_fewer_rows_count_for_less() -> None:
    """Twelve trials of 16 rows are 96 of 2: given up after as much evidence, not as many looks."""
    watch, draw = Watch(), random.Random(4)
    for number in range(1, 97):
        ahead = draw.gauss(0, 0.1)
        scores = Scores(serving=[2.0, 3.0], candidate=[2.0 + ahead, 3.0 - ahead])
        verdict = watch.judge(scores, PROVE_FIRST, 10, 0)
        assert not verdict.publish
        assert (watch.trials, verdict.back_to) == ((number / 8, None) if number < 96 else (0, 0))


def test_what_serves_is_looked_at_also_where_nothing_is_trained() -> None:
    """Once in so many rounds, until there is evidence; the loaded draft has nothing to fear."""
    settings = msgspec.structs.replace(SETTINGS, check_rounds=100)
    watch, draw, compared = adapted(), random.Random(3), []
    for round_ in range(2000):
        if watch.overdue(settings, round_):
            loaded = draw.gauss(0.1, 0.05)
            scores = Scores(serving=lengths(0.0), loaded=lengths(loaded))
            compared.append((round_, watch.look(scores, settings, round_, 5).back_to))
    assert compared == [(100 * n, None if n < LEAST else 0) for n in range(1, LEAST + 1)]
    assert watch.at_loaded


def test_a_candidate_that_waits_is_looked_at_on_all_that_comes() -> None:
    """A few updates, then none: it serves once that has shown it, or is given up; never unseen."""
    settings = msgspec.structs.replace(PROVE_FIRST, check_rounds=100)

    def outcome(mean: float) -> tuple[list[int], Watch]:
        watch, draw = Watch(), random.Random(5)
        assert not watch.overdue(settings, 1000)  # there is no candidate
        looked, served = [], []
        for round_ in range(1000, 3000):
            ahead, _rows = draw.gauss(mean, 0.1), 2
            if round_ < 1004:
                ahead, _rows = ahead * 3, 1
                scores = Scores(serving=[2.0], candidate=[2.0 + ahead])
                watch.judge(scores, settings, round_, 0)
            elif watch.overdue(settings, round_):
                scores = Scores(serving=lengths(0.0), candidate=lengths(ahead))
                looked.append(round_)
                if watch.look(scores, settings, round_, 0).publish:
                    served.append(round_)
                    break
        assert looked == [1000 + 100 * n for n in range(1, len(looked) + 1)]
        return served, watch

    served, watch = outcome(0.3)
    assert served == [1000 + 100 * LEAST]  # four rows of the 128 had come before
    assert not watch.at_loaded
    served, watch = outcome(0.0)
    assert not served
    assert (watch.at_loaded, watch.trials) == (True, 0)
    assert watch.cooldown


def test_who_goes_back_has_lost_little() -> None:
    """In 64 checks of 16 rows with noise of 0.1 tokens, 300 runs (seeds fixed): a draft that is 0.05
    worse always goes back, half of them at the first occasion; one that is 0.05 better seldom.
    Where there is nothing to win most go back, and lose nothing by it."""

    def checks(mean: float) -> list[int]:
        """How many each of those that went back had to pass."""
        found = []
        for seed in range(300):
            watch, draw = adapted(), random.Random(seed)
            back = (judged(watch, loaded=draw.gauss(mean, 0.1)).back_to == 0 for _ in range(64))
            found += [n for n, went in enumerate(back, 1) if went][:1]
        return found

    worse = checks(0.05)
    assert len(worse) == 300
    assert statistics.median(worse) == LEAST
    assert len(checks(-0.05)) < 0.06 * 300
    assert 0.5 * 300 < len(checks(0.0)) < 300


def test_a_version_that_is_not_worse_is_the_last_good_one() -> None:
    """Than the loaded draft and than the good one before it, by the tolerance."""
    watch = adapted()
    judged(watch, loaded=0.2, version=4)
    assert watch.good == 0
    judged(watch, loaded=0.0, version=8)
    assert watch.good == 8
    scores = Scores([2.0], candidate=[2.0], loaded=[1.0], good=[2.1])
    watch.judge(scores, SETTINGS, 0, 12)
    assert watch.good == 8
    watch.went_back(0)
    assert watch.good == 0


# --- a fall of the acceptance length -------------------------------------------------------


@settings(deadline=None)
@given(st.lists(LENGTHS, min_size=1, max_size=300), st.booleans())
def test_the_fall_is_pages_statistic(lengths: list[float], at_loaded: bool) -> None:
    """The largest sum over a suffix of (level before - length - tolerance); none for the loaded.

    The tolerance is a quarter of a token, or where that is less half of what the level has to lose.
    """
    watch, terms = Watch(at_loaded=at_loaded), []
    for number, length in enumerate(lengths):
        tolerance = min(FALL_TOLERANCE, 0.5 * (watch.level - 1))
        terms.append(watch.level - length - tolerance if number else 0.0)
        watch.observe(length)
    suffixes = [sum(terms[begin:]) for begin in range(1, len(terms))]
    expected = 0.0 if at_loaded else max([0.0, *suffixes])
    assert watch.fall == pytest.approx(expected, abs=1e-9)


def test_a_fall_by_one_token_is_noticed_within_32_rounds() -> None:
    """12 tokens at 0.75 a round, less what the level gives way; noise of 1.1 tokens a round. On text
    that stays as it is, less than one alarm in 1,000 rounds, and each costs a few scores only."""
    settings, false_alarms, delays = Settings(), 0, []
    for seed in range(100):
        watch, draw = adapted(), random.Random(seed)
        for _ in range(500):
            watch.observe(draw.gauss(2.3, 1.1))
            if watch.alarmed(settings):
                false_alarms += 1
                watch.fall, watch.lengths = 0.0, 0
        watch.fall = 0.0
        delay = 0
        while not watch.alarmed(settings):
            watch.observe(draw.gauss(1.3, 1.1))
            delay += 1
        delays.append(delay)
    assert false_alarms / (100 * 500) < 1 / 1000
    assert statistics.median(delays) <= 20
    assert sorted(delays)[90] <= 32


@pytest.mark.parametrize("level", [1.15, 1.25, 1.42, 2.0])
def test_a_draft_that_is_never_right_any_more_is_noticed(level: float) -> None:
    """Before it has lost four times ``alarm_tokens``: the level gives way in the meantime.

    Three drafts a round, each accepted with the same chance if the one before it was. On text that
    stays as it is, less than one alarm in 1,000 rounds.
    """
    settings, false_alarms, draw = Settings(), 0, random.Random(3)
    chance = _chance(level)
    watch = adapted()
    for _ in range(20_000):
        accepted = next((k for k in range(3) if draw.random() >= chance), 3)
        watch.observe(1.0 + accepted)
        if watch.alarmed(settings):
            false_alarms += 1
            watch.fall, watch.lengths = 0.0, 0
    assert false_alarms < 20
    before, lost = watch.level, 0.0
    assert before == pytest.approx(level, rel=0.1)
    while not watch.alarmed(settings):
        watch.observe(1.0)
        lost += before - 1
    assert lost < 4 * settings.alarm_tokens


def _chance(level: float) -> float:
    """The chance c of a draft for which 1 + c + c^2 + c^3 is the acceptance length."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**k for k in range(4)) < level else (low, middle)
    return low


def fallen() -> Watch:
    watch = adapted(good=3, level=2.5, lengths=100)
    while not watch.alarmed(SETTINGS):
        watch.observe(1.5)
    return watch


@pytest.mark.parametrize(
    ("loaded", "good", "back_to"),
    [
        (1.5, 1.5, None),  # harder text is harder for all
        (1.6, 1.7, None),  # a fifth of the fall does not explain it
        (2.4, 2.5, 3),  # the last good version does not have it
        (2.5, 2.4, 0),  # nor has the loaded draft, which is better
    ],
)
def test_who_is_to_blame_for_a_fall(loaded: float, good: float, back_to: int | None) -> None:
    """Acceptance fell from 2.5 to 1.5 tokens: the draft is, if an older one would have 0.5 more."""
    watch, draw = fallen(), random.Random(2)
    noise = [draw.gauss(0, 0.2) for _ in range(16)]
    scores = Scores(
        serving=[1.5 + n for n in noise],
        loaded=[loaded + n * n for n in noise],
        good=[good + n * n for n in noise],
    )
    verdict = watch.look_into(scores, SETTINGS, 40, 7, evidence=False)
    assert verdict is not None
    assert (verdict.publish, verdict.back_to) == (False, back_to)
    assert not watch.alarmed(SETTINGS)  # asked and answered
    assert (watch.resumes_at, watch.rolled_back) == ((0, 0) if back_to is None else (140, 1))


def test_what_is_asked_after_a_fall_is_evidence_too() -> None:
    """Harder text is no reason to go back; that the loaded draft does better on it, again and again,
    is, unless the same rows are shown each time. A look that has been had need not be had again."""

    def goes_back(evidence: bool) -> int | None:
        watch, draw = adapted(), random.Random(8)
        for number in range(1, LEAST + 1):
            watch.level, watch.lengths = 2.5, 100
            while not watch.alarmed(SETTINGS):
                watch.observe(1.5)
            scores = Scores(lengths(0.0), loaded=lengths(draw.gauss(0.1, 0.1)))
            verdict = watch.look_into(scores, SETTINGS, 300 * number, 7, evidence)
            assert verdict is not None
            assert watch.overdue(SETTINGS, 300 * number + 1) == (not evidence)
            if verdict.back_to is not None:
                return number
        return None

    assert goes_back(evidence=True) == LEAST
    assert goes_back(evidence=False) is None


def test_a_fall_waits_for_rows() -> None:
    """Too few to tell: the alarm stands until there are more."""
    watch = fallen()
    few = [1.0] * (LEAST_ROWS - 1)
    assert (
        watch.look_into(Scores(few, loaded=[4.0] * len(few)), SETTINGS, 0, 7, evidence=True) is None
    )
    assert watch.alarmed(SETTINGS)


# --- what is kept, and what policies see of it ---------------------------------------------


def test_the_memory_survives_a_file() -> None:
    """Encoded and decoded among the totals it is the same, so a resumed run decides the same."""
    totals = Totals(watch=fallen())
    totals.watch.evidence.add(lengths(0.5), lengths(0.0))
    again = msgspec.json.decode(msgspec.json.encode(totals), type=Totals)
    assert again == totals
    again.start_anew()  # state per request
    assert again.watch == Watch()


def test_gains_are_those_of_scores_where_there_are_scores() -> None:
    """A moving mean of candidate over serving; the noisy one is off."""
    before = Totals().gain
    totals = Totals(recent=2.0, recent_at_update=1.0, updates=5, updates_at_served=4)
    for _ in range(100):
        totals.note_scores(Verdict(True, "", None, 8, 2.2, 2.0, 1.6))
        totals.begin_update(1)
    seen = totals.snapshot(1, 0, 0)
    assert before == 1
    assert seen.update_gain == pytest.approx(1.1, rel=1e-4)
    for _ in range(200):  # each candidate two updates ahead of what serves
        totals.updates, totals.updates_at_served = 7, 5
        totals.note_scores(Verdict(False, "", None, 8, 2.42, 2.0, 1.6))
    assert totals.gain == pytest.approx(1.1, rel=1e-4)
    unscored = Totals(recent=2.0, recent_at_update=1.0, updates=5)
    unscored.note_scores(Verdict(True, "finite"))
    unscored.begin_update(1)
    assert unscored.snapshot(1, 0, 0).update_gain == pytest.approx(2**0.1)
