"""How surely one arm is faster than another: parts of a run's text, and an interval over them.

Hypothesis: two arms commit as many tokens per second, ``R = (ΣT / ΣS) / (ΣT' / ΣS') = 1``, summed over
everything that both decoded, so that R is the ratio of the two speeds that the table shows. Means
over turns, or trimmed ones, would be less noisy, but would leave out what learning costs, which
falls on few turns.

Unit: a *part* of the text, the same for all arms. Arms take turns, so a part passes in all of them at
nearly the same time, and a machine that is slow for a while is slow in all. Turns are not paired
one by one: a turn ends with a round, so an arm whose draft is better commits more in each and is
further on in the text by the tenth, where the context is longer. What is paired is the place: a
whole turn counts to the part in which its middle lies. (Cut at the borders it would be in two
parts, which then vary together.) Parts are

- whole groups of requests, neighbours together, where there are ``MIN_PARTS`` groups: texts differ,
  and so the interval speaks of texts like these;
- else stretches of equal length of all texts, one behind the other, of ``MIN_TURNS`` turns or more:
  neighbouring turns are alike, long stretches hardly. This interval speaks of these texts only.

With less than that there are no parts, and nothing is claimed.

Statistic: with ``r_i`` the logarithm of R without part i and n parts,
``log R ± t sqrt((n - 1) / n Σ (r_i - mean r)²)``, the delete-one jackknife (Tukey, Annals of
Mathematical Statistics 29, 1958) with Student's t of n - 1 degrees of freedom. Few long parts instead of
many turns are the batch means of simulation (Schmeiser, Operations Research 30, 1982: beyond some 10
to 30 more of them gain nothing). What the machine does to both arms cancels in ``r_i``; one turn that it
held up in one arm alone moves R and widens the interval as much; a draft that gets better from part to
part widens it too. It has no randomness. Tests by simulation: tests/test_intervals.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING

from cosched.telemetry.metrics import Part
from cosched.telemetry.parts import MAX_PARTS, MIN_PARTS, PartsOf

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cosched.telemetry.metrics import Turn

COVERAGE = 0.95
MIN_TURNS = 4  # of a part that is no whole group
GOOD_TURNS = 8  # the same, where there are more than are needed


@dataclass(frozen=True, slots=True)
class Ratio:
    """The speed of an arm over that of another, with the ends of its interval if it has one.

    The ends are hundredths, rounded outward: no more is claimed than is shown.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def known(self) -> bool:
        """Whether it has an interval."""
        return self.low is not None

    @property
    def above(self) -> bool:
        """Whether the first arm is the faster one, as far as this run can tell."""
        return self.low is not None and self.low > 1

    @property
    def below(self) -> bool:
        """Whether it is the slower one."""
        return self.high is not None and self.high < 1


def cut(turns: Mapping[str, Sequence[Turn]]) -> tuple[dict[str, list[Part]], PartsOf | None]:
    """Parts of what all arms decoded, and what they are; no parts and None where it is too little.

    An arm without turns has no parts. A group of requests that one of the others did not get to,
    as in an interrupted run, is in none.
    """
    parts: dict[str, list[Part]] = {arm: [] for arm in turns}
    ran = {arm: _by_group(some) for arm, some in turns.items() if some}
    groups = sorted(set.intersection(*map(set, ran.values()))) if ran else []
    shared = {arm: [t for group in groups for t in own[group]] for arm, own in ran.items()}
    fewest = min((len(some) for some in shared.values()), default=0)
    if len(groups) >= MIN_PARTS:
        number = min(MAX_PARTS, len(groups))
        index = {group: place * number // len(groups) for place, group in enumerate(groups)}
        of_turns = {arm: [index[turn.group] for turn in some] for arm, some in shared.items()}
    elif fewest >= MIN_PARTS * MIN_TURNS:
        number = max(MIN_PARTS, min(MAX_PARTS, fewest // GOOD_TURNS))
        of_turns = _stretches(shared, number)
    else:
        return parts, None
    parts |= {arm: _sums(some, of_turns[arm], number) for arm, some in shared.items()}
    return parts, "requests" if len(groups) >= MIN_PARTS else "text"


def _stretches(turns: Mapping[str, Sequence[Turn]], number: int) -> dict[str, list[int]]:
    """Which of so many stretches of all text each turn's middle lies in.

    Arms that say different texts are as far in a group as the share of it that they have committed.
    """
    texts = {arm: _by_group(some) for arm, some in turns.items()}
    totals = {
        arm: {group: sum(turn.tokens for turn in some) for group, some in own.items()}
        for arm, own in texts.items()
    }
    groups = list(next(iter(totals.values())))
    lengths = {group: fmean(total[group] for total in totals.values()) for group in groups}
    whole = sum(lengths.values())
    found: dict[str, list[int]] = {}
    for arm, own in texts.items():
        found[arm], start = [], 0.0
        for group, some in own.items():
            scale, done = lengths[group] / totals[arm][group], 0
            for turn in some:
                middle = start + scale * (done + turn.tokens / 2)
                found[arm].append(int(number * middle / whole))
                done += turn.tokens
            start += lengths[group]
    return found


def _by_group(turns: Iterable[Turn]) -> dict[int, list[Turn]]:
    """Turns of each group of requests, in the order of time."""
    found: dict[int, list[Turn]] = {}
    for turn in turns:
        found.setdefault(turn.group, []).append(turn)
    return found


def _sums(turns: Sequence[Turn], of_turns: Sequence[int], number: int) -> list[Part]:
    tokens, seconds = [0] * number, [0.0] * number
    for turn, part in zip(turns, of_turns, strict=True):
        tokens[part] += turn.tokens
        seconds[part] += turn.seconds
    return [Part(*both) for both in zip(tokens, seconds, strict=True)]


def paired_ratio(ours: Sequence[Part], theirs: Sequence[Part]) -> Ratio:
    """Tokens per second of one arm over those of another, with the interval over their parts."""
    number = len(ours)
    log_ratio = _log_speed(ours) - _log_speed(theirs)
    without = [
        _log_speed([*ours[:i], *ours[i + 1 :]]) - _log_speed([*theirs[:i], *theirs[i + 1 :]])
        for i in range(number)
    ]
    reach = reach_of(without)
    return Ratio(
        math.exp(log_ratio),
        math.floor(100 * math.exp(log_ratio - reach)) / 100,
        math.ceil(100 * math.exp(log_ratio + reach)) / 100,
    )


def reach_of(without: Sequence[float]) -> float:
    """Half the width of a jackknife interval, of what the statistic is without each unit."""
    number, mean = len(without), fmean(without)
    variance = (number - 1) / number * sum((one - mean) ** 2 for one in without)
    return student_t((1 + COVERAGE) / 2, number - 1) * math.sqrt(variance)


def _log_speed(parts: Sequence[Part]) -> float:
    return math.log(sum(part.tokens for part in parts) / sum(part.seconds for part in parts))


def student_t(probability: float, degrees: int) -> float:
    """The quantile of Student's t, within 0.001 from five degrees of freedom on.

    Its expansion around the normal quantile x in 1 / degrees (Abramowitz and Stegun, Handbook of
    Mathematical Functions, 26.7.5).
    """
    x = NormalDist().inv_cdf(probability)
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))
