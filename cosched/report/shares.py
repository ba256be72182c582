"""How surely a share is known: tokens a round, drafted tokens that stood, seconds a token.

A share is a sum over a sum, ``R = Σa / Σb``, and its unit a part of the rounds (``telemetry.parts``) or
of the text (``report.intervals``). Statistic: the delete-one jackknife of R with Student's t, as
there; on R itself and not its logarithm, because a stage may have taken no time at all, and no
drafted token of a place may have stood. Of two runs that have the same requests the ratio of their
shares is taken with the same requests left out in both, on its logarithm: what makes a text easy
cancels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cosched.report.intervals import MIN_PARTS, Ratio, reach_of

if TYPE_CHECKING:
    from collections.abc import Sequence

Interval = tuple[float, float]


def interval(
    pairs: Sequence[tuple[float, float]], least: float = 0.0, most: float = math.inf
) -> Interval | None:
    """The ends of the interval of ``Σa / Σb``; None where the parts are too few, or one is all.

    No end is beyond ``least`` and ``most``, which the share itself cannot be.
    """
    if len(pairs) < MIN_PARTS:
        return None
    tops, bottoms = sum(a for a, _ in pairs), sum(b for _, b in pairs)
    if any(bottoms <= b for _, b in pairs):
        return None
    without = [(tops - a) / (bottoms - b) for a, b in pairs]
    middle, reach = tops / bottoms, reach_of(without)
    return max(least, middle - reach), min(most, middle + reach)


def ratio_of_shares(
    ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]
) -> Ratio:
    """``(Σa / Σb) / (Σa' / Σb')`` over the same units, in the same order, with its interval.

    There must be a unit, and each must count for something in both.
    """
    value = math.exp(_log_share(ours) - _log_share(theirs))
    number = len(ours)
    if number < MIN_PARTS:
        return Ratio(value)
    without = [
        _log_share([*ours[:i], *ours[i + 1 :]]) - _log_share([*theirs[:i], *theirs[i + 1 :]])
        for i in range(number)
    ]
    reach = reach_of(without)
    return Ratio(
        value,
        math.floor(100 * value * math.exp(-reach)) / 100,
        math.ceil(100 * value * math.exp(reach)) / 100,
    )


def _log_share(pairs: Sequence[tuple[float, float]]) -> float:
    return math.log(sum(a for a, _ in pairs) / sum(b for _, b in pairs))
