"""How many tokens a round drafts."""

from __future__ import annotations

from itertools import accumulate
from operator import mul
from typing import Annotated

from msgspec import Meta

from cosched.protocols import DraftLength, LengthSettings, LengthSnapshot
from cosched.registry import LENGTHS


@LENGTHS.register("fixed")
class Fixed(DraftLength):
    """Always ``drafter.num_draft_tokens``."""

    Settings = LengthSettings

    def __init__(self, settings: LengthSettings) -> None:
        self.settings = settings

    def choices(self, max_tokens: int) -> tuple[int, ...]:
        return (max_tokens,)

    def choose(self, snapshot: LengthSnapshot) -> int:
        return snapshot.max_tokens


class GoodputSettings(LengthSettings, frozen=True, kw_only=True):
    """``explore_share`` of the time, at most, is expected to be lost by lengths that seem worse.

    They are tried because they may have become better, each after ``explore_rounds`` at the earliest.
    ``among`` are the numbers of tokens to choose among, 0 for none; left empty, all up to the most. On
    a GPU SGLang captures CUDA graphs for each of them, which takes time and memory when it starts.
    """

    among: tuple[Annotated[int, Meta(ge=0)], ...] = ()

    explore_share: Annotated[float, Meta(ge=0, le=1)] = 0.005
    explore_rounds: Annotated[int, Meta(ge=1)] = 16


@LENGTHS.register("goodput")
class Goodput(DraftLength):
    """Drafts as many tokens, none included, as commit most tokens a second.

    A round that drafts K tokens is expected to commit, and to last,

        1 + sum_{k <= K} prod_{j <= k} a_j    tokens a request, and C_K seconds

    with a_j the share of drafted tokens at place j that were accepted where all before them were, and
    C_K as measured at this batch size; it takes the K whose quotient is largest (SmartSpec, arXiv
    2406.14066, which has the a_j of all places alike and a cost model fitted beforehand). The lengths
    that have to be tried first are, the longest first. Then it looks beside the best one, where the
    next place and the cost of one more or less are, and at both ends: each of the four is tried again
    once a quarter of the share of the rounds since its last trial comes to what the trial is expected
    to lose. Where nothing drafted pays, that is how it notices when it does.
    """

    Settings = GoodputSettings
    needs_seconds = True

    def __init__(self, settings: GoodputSettings) -> None:
        self.settings = settings

    def choices(self, max_tokens: int) -> tuple[int, ...]:
        return tuple(sorted(set(self.settings.among))) or super().choices(max_tokens)

    def choose(self, snapshot: LengthSnapshot) -> int:
        seconds, among = snapshot.seconds, self.choices(snapshot.max_tokens)
        if untried := [k for k in among if not seconds[k]]:
            return untried[-1]
        tokens = list(accumulate(accumulate(snapshot.acceptance, mul), initial=1.0))
        best = max(among, key=lambda k: tokens[k] / seconds[k])
        at = among.index(best)
        beside = {among[0], among[max(0, at - 1)], among[min(at + 1, len(among) - 1)], among[-1]}
        due = [k for k in beside - {best} if self._is_due(k, best, tokens, snapshot)]
        return max(due, key=lambda k: (snapshot.ages[k], k), default=best)

    def _is_due(self, k: int, best: int, tokens: list[float], snapshot: LengthSnapshot) -> bool:
        seconds, age = snapshot.seconds, snapshot.ages[k]
        lost = seconds[k] / seconds[best] - tokens[k] / tokens[best]  # in rounds of the best length
        return age >= self.settings.explore_rounds and age * self.settings.explore_share / 4 >= lost


class ThresholdSettings(LengthSettings, frozen=True, kw_only=True):
    """``bound`` is the chance that all of a request's drafted tokens are accepted, below which it stops.

    In one of ``explore_rounds`` rounds it does not, to learn what its prediction is worth there.
    """

    bound: Annotated[float, Meta(gt=0, lt=1)] = 0.4
    explore_rounds: Annotated[int, Meta(ge=1)] = 64


@LENGTHS.register("threshold")
class Threshold(DraftLength):
    """Stops the draft of each request where it is not likely any more that all of it is accepted.

    Of the tokens drafted it keeps the longest prefix with prod_j p_j >= ``bound``, p_j the chance that
    token j is accepted where all before it are. After SpecDec++ (arXiv 2405.19715), which is optimal in
    stopping at such a bound; there a head trained for it predicts the p_j, here the draft's own top
    probability does, held against what was accepted (``cosched.loop.lengths``).
    """

    Settings = ThresholdSettings
    by_request = True

    def __init__(self, settings: ThresholdSettings) -> None:
        self.settings = settings

    def choose(self, snapshot: LengthSnapshot) -> int:
        if snapshot.chances is None:
            return snapshot.max_tokens
        if snapshot.round_index % self.settings.explore_rounds == 0:
            return len(snapshot.chances)
        kept = accumulate(snapshot.chances, mul)
        return sum(all_stand >= self.settings.bound for all_stand in kept)
