"""Every test and estimate of the guard, with its mathematics; numbers only.

**Unit.** A held-out block: up to ``BLOCK`` neighbouring rows of text that no update has seen, each
row used once. **Statistic.** d, the mean over a block's rows of what one draft scores above another,
in tokens a round; a score is the engine's own expected acceptance length (``scorer``). Both drafts
are scored on the same rows, so the text's difficulty drops out.

**Hypothesis.** The one draft is no better than the other: given the blocks before, d is expected to
be at most 0. ``Evidence`` rejects it. The one is the learner: the newest weights, trained on earlier
text only, so that at every block they are fixed before it is seen, though they differ from block to
block. The other is the draft as loaded. The guard asks it twice, and a third time of a candidate and
what serves, each with evidence of its own:

    learning is better than nothing          false_publish    then what is learnt serves as it comes
    learning is worse than nothing           false_rollback   then the loaded draft serves
    the candidate is worse than what serves  false_rollback   then training starts again from there

**Looks.** After every block, for as long as anybody likes. **Error rates.** The chance that the
hypothesis is ever rejected though it is true is at most the setting, from one time that the loaded
draft was left alone to the next, for the third from one publication to the next.
``tests/test_statistics.py`` simulates 10,000 streams: what the rates come to, and after how many rows
a true gain is seen.

A candidate of a trusted learner does not serve while it ``falls_short`` of what serves on the newest
rows: that keeps a single bad update out, and is no test, because the next look asks again.

``Leads`` and ``Fall`` decide nothing. The first estimates by how much what was learnt is better, for a
policy that spends what has been earned; the second says when a look cannot wait.
"""

from __future__ import annotations

import math
from bisect import bisect
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

BLOCK = 4  # rows
GAINS = tuple(0.0125 * 2**n for n in range(9))  # tokens above which a bet counts no more
LOSSES = 1.5  # times as much below which it counts no less
STAKE = 0.6  # of a bet's wealth that a whole gain adds to it
NEW = 0.55  # of a block is no repetition of its neighbours
RESERVE = 0.25  # of the wealth that is not bet at first

MEMORY = 256  # rows that a lead is estimated from: text moves on
LEAD_ROWS = 64  # below which nothing is said of it
LEVELS = (
    0.25,
    0.5,
    1.0,
    2.0,
)  # drafted tokens that stand a round, between which leads are kept apart
LEVEL_ROWS = 64  # that say how well the draft as loaded does on this text: it moves on

LEVEL_WEIGHT = 1 / 256  # of the newest round in the level that a fall is measured from
FALL_TOLERANCE = 0.25  # tokens a round below the level that are no fall, at most
FALL_TOKENS = 12.0  # lost in all, after which a look cannot wait


def blocks(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    """What the one draft scores above the other, block by block, all of about ``BLOCK`` rows.

    Weights that have become NaN score nothing finite: none of their drafts would be accepted, which
    is an acceptance length of 1.
    """
    rows = [_finite(one) - _finite(other) for one, other in zip(ones, others, strict=True)]
    number = max(1, len(rows) // BLOCK)
    ends = [len(rows) * n // number for n in range(number + 1)]
    return [mean(rows[a:b]) for a, b in pairwise(ends)]


def bound(rate: float) -> float:
    """The logarithm of the wealth at which a test with this error rate rejects."""
    return -math.log(rate)


@dataclass(slots=True)
class Evidence:
    r"""A test by betting, valid at every look: wealth W that is at least 1 / rate rejects.

    Somebody starts with a wealth of 1 and bets, block after block, that d is above 0. Under the
    hypothesis no bet is favourable, so that wealth is a supermartingale, and by Ville's inequality
    it ever comes to 1 / rate with a chance of at most ``rate`` (Waudby-Smith and Ramdas, Estimating
    means of bounded random variables by betting, JRSS B 2023; Howard, Ramdas, McAuliffe and Sekhon,
    Time-uniform, nonparametric, nonasymptotic confidence sequences, Annals of Statistics 2021).

    A bet of gain limit c multiplies its wealth by

    .. math:: (1 + s \min(1, \max(-l, d / c)))^w, \quad s = 0.6, l = 1.5, w = 0.55

    Nobody knows beforehand how large d will be and how it will scatter, so the wealth is spread over
    limits c from 1/80 of a token to 3.2, each twice the last (a mixture, their section 4; Kelly's
    stake mean / variance is met within a factor). Limits: d is bounded by the drafted tokens, but a
    stake for such a bound wins next to nothing, so gains count up to c only, which is no favour to
    the bettor, and losses down to l c, further than gains: a draft that gains a little mostly and now
    and then loses much would else look good.

    **Neighbours are alike.** Where a block's d leans the way of the one before it, given the blocks
    before it is not expected to be 0 even if its mean is. With a correlation r that decays from block
    to block the variance of a sum is (1 + r) / (1 - r) times that of independent blocks; the power
    w = (1 - r) / (1 + r) on every factor takes the same off the exponent that a sum of n blocks has
    (as in the asymptotic confidence sequences of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas,
    2021). For independent blocks the test stays exact with it, by Jensen's inequality. w is that of
    r = 0.29; correlations of 0.2 to 0.36 are what text was seen to have, and are simulated.

    **Text moves on.** What is bet and lost is gone, and a draft that was better for long would have to
    be worse for as long until it shows. So a quarter of the wealth is held in reserve, of which, after
    n blocks, 1 / (2 (n + 1)) goes to the bets: a mixture also over when it begins. Moving wealth by a
    rule made beforehand is free.

    ``wealths`` are the logarithms of the reserve and of each bet.
    """

    num_blocks: int = 0
    wealths: list[float] = field(
        default_factory=lambda: [
            math.log(RESERVE),
            *[math.log((1 - RESERVE) / len(GAINS))] * len(GAINS),
        ]
    )

    def add(self, differences: Iterable[float]) -> None:
        """Bet on a block at a time."""
        for difference in differences:
            self.num_blocks += 1
            share = 1 / (2 * (self.num_blocks + 1))
            given = self.wealths[0] + math.log(share / len(GAINS))
            self.wealths[0] += math.log1p(-share)
            for number, gain in enumerate(GAINS, 1):
                counted = min(1.0, max(-LOSSES, difference / gain))
                won = self.wealths[number] + NEW * math.log1p(STAKE * counted)
                high, low = max(won, given), min(won, given)
                self.wealths[number] = high + math.log1p(math.exp(low - high))

    @property
    def log_wealth(self) -> float:
        return _log_sum(self.wealths)

    def share(self, rate: float) -> float:
        """The logarithm of the wealth as a share of that at which this error rate rejects."""
        return self.log_wealth / bound(rate)

    def rejects(self, rate: float) -> bool:
        """Whether there is evidence that the one draft is better, at this error rate."""
        return self.log_wealth >= bound(rate)


@dataclass(slots=True)
class Lead:
    """By how much one draft is better than another: a mean of blocks, weighed by their rows.

    m = sum w d / sum w. A block's variance goes with 1 / w, so that of the mean is
    sum w (d - m)^2 / ((n - 1) sum w), with n = (sum w)^2 / sum w^2, Kish's effective number. Beyond
    ``MEMORY`` rows older ones are forgotten exponentially.
    """

    mean: float = 0.0
    weight: float = 0.0
    squared_weights: float = 0.0
    squares: float = 0.0  # sum of w (d - m)^2

    def add(self, differences: Sequence[float], num_rows: int) -> None:
        """Blocks that have so many rows in all; Welford's update, weighted (West, CACM 22, 1979)."""
        weight = num_rows / len(differences)
        for difference in differences:
            self.weight += weight
            self.squared_weights += weight**2
            off = difference - self.mean
            self.mean += weight / self.weight * off
            self.squares += weight * off * (difference - self.mean)
            kept = min(1.0, MEMORY / self.weight)
            self.weight *= kept
            self.squared_weights *= kept**2
            self.squares *= kept

    @property
    def error(self) -> float:
        """The standard error of the mean, as of independent blocks; infinite of too few rows."""
        if self.weight < LEAD_ROWS:
            return math.inf
        number = self.weight**2 / self.squared_weights
        return math.sqrt(max(0.0, self.squares) / ((number - 1) * self.weight))

    @property
    def proven(self) -> float:
        """Tokens a round: the mean less its standard error, and never less than nothing.

        The error is that of blocks of which ``NEW`` is no repetition of their neighbours.
        """
        return max(0.0, self.mean - self.error / math.sqrt(NEW))


@dataclass(slots=True)
class Leads:
    """The lead on this text, and on others: it goes with how much there is to learn.

    A draft that does well on a text has little to learn there, one that hardly ever guesses right may
    gain much, so texts on which the draft as loaded has about the same acceptance length share a lead.
    What learning brought on foreign text then says nothing of text on which the draft is at home, and
    the next foreign text is known for one after a few rounds.

    ``level`` is the acceptance length that the draft as loaded has on this text, a mean of the newest
    ``LEVEL_ROWS`` rows: its own rounds while it serves, scored rows while another does.
    """

    level: float = 1.0
    rows: float = 0.0
    by_level: list[Lead] = field(default_factory=lambda: [Lead() for _ in range(len(LEVELS) + 1)])

    def loaded_draft(self, length: float, num_rows: int = 1) -> None:
        """So many more rows, on which the draft as loaded has this acceptance length in the mean."""
        self.rows = min(self.rows + num_rows, max(LEVEL_ROWS, num_rows))
        self.level += num_rows / self.rows * (length - self.level)

    def begin(self) -> None:
        """Another text: its level is not known yet."""
        self.rows = 0.0

    @property
    def level_here(self) -> int:
        """Where among ``LEVELS`` this text is."""
        return bisect(LEVELS, self.level - 1)

    @property
    def here(self) -> Lead:
        return self.by_level[self.level_here]


@dataclass(slots=True)
class Levels:
    """What the serving draft and the one as loaded score on the same rows: the newest ``LEVEL_ROWS``.

    For people and alarms; no test goes by it. Weights that have become NaN score an acceptance length
    of 1, as in ``blocks``.
    """

    serving: float = 1.0
    loaded: float = 1.0
    rows: float = 0.0

    def add(self, serving: Sequence[float], loaded: Sequence[float]) -> None:
        number = len(serving)
        self.rows = min(self.rows + number, max(LEVEL_ROWS, number))
        weight = number / self.rows
        self.serving += weight * (mean([_finite(one) for one in serving]) - self.serving)
        self.loaded += weight * (mean([_finite(one) for one in loaded]) - self.loaded)

    @property
    def known(self) -> bool:
        return self.rows >= LEVEL_ROWS


@dataclass(slots=True)
class Fall:
    """Whether the acceptance length has fallen, round by round, without scoring anything.

    Page's one-sided CUSUM (Biometrika 41, 1954): tokens <- max(0, tokens + level - length -
    tolerance), where the level is a slow mean of the lengths before. Text that has become harder
    makes it fall as a worse draft does, so it only says when to look. The tolerance is half of what
    the level has to lose, where that is less than usual: so a draft that is never right any more is
    noticed before it has lost four times ``FALL_TOKENS``, if it was right for an eighth of a token a
    round before.
    """

    level: float = 0.0
    lengths: int = 0
    tokens: float = 0.0

    def observe(self, length: float, counts: bool) -> None:
        """One more round; one that does not ``count`` moves the level only."""
        self.lengths += 1
        if self.lengths > 1 and counts:
            tolerance = min(FALL_TOLERANCE, max(0.0, self.level - 1) / 2)
            self.tokens = max(0.0, self.tokens + self.level - length - tolerance)
        self.level += max(LEVEL_WEIGHT, 1 / self.lengths) * (length - self.level)

    @property
    def alarmed(self) -> bool:
        return self.tokens > FALL_TOKENS

    def begin(self) -> None:
        """Drafts have been rescored: measure anew, from the level of what comes."""
        self.tokens, self.lengths = 0.0, 0


def falls_short(differences: Sequence[float]) -> bool:
    """Whether the mean of these blocks is more than a standard error below 0, which one has not."""
    middle, number = mean(differences), len(differences)
    squares = sum((difference - middle) ** 2 for difference in differences)
    return middle < -math.sqrt(squares / (max(1, number - 1) * number))


def mean(scores: Sequence[float]) -> float:
    """Of at least one."""
    return sum(scores) / len(scores)


def _finite(score: float) -> float:
    return score if math.isfinite(score) else 1.0


def _log_sum(logs: Sequence[float]) -> float:
    """The logarithm of the sum of what they are logarithms of."""
    top = max(logs)
    return top + math.log(sum(math.exp(log - top) for log in logs))
