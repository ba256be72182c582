"""How far drafts are accepted, by where an answer stands and by what the draft has learnt.

Of a frozen draft the acceptance length goes by the position in the answer. What learning adds is a factor on
it: as the same text was decoded by both arms, a round of the one that learns stands for so many rounds of
the frozen one, whatever the text is there,

    ratio(x) = rounds the frozen arm took for the text / rounds the learning arm took for it

over the rounds whose draft had seen x updates. A saturating curve 1 + g (1 - exp(-x / s)) is drawn through
it by least squares; beyond the last x that was seen it is held, because nobody knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cosched.telemetry.metrics import POSITION_EDGES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

SCALES = 40  # of the curve that are tried
FEW = 20  # rounds of a stretch of positions that say something by themselves
GRID = 512  # chances of acceptance between which is interpolated


@dataclass(frozen=True, slots=True)
class Behaviour:
    """``tau_at`` are frozen acceptance lengths by ``POSITION_EDGES``; ``gain`` is reached after some ``scale`` updates.

    More than ``most_updates`` add nothing; a round commits ``most_tokens`` at most. ``lengths`` are answers.
    """

    tau_at: Floats
    gain: float
    scale: float
    most_updates: float
    most_tokens: int
    lengths: Ints

    def factor(self, learnt: Floats) -> Floats:
        """What learning multiplies the acceptance length by after so many updates."""
        seen = np.minimum(learnt, self.most_updates)
        return 1.0 + self.gain * -np.expm1(-seen / self.scale)

    def tau(self, positions: Ints, learnt: Floats) -> Floats:
        """Acceptance lengths of rounds that begin there, of drafts that have seen so many updates."""
        place = np.searchsorted(_EDGES, positions, side="right") - 1
        return np.clip(self.tau_at[place] * self.factor(learnt), 1.0, self.most_tokens)


_EDGES = np.array(POSITION_EDGES)


class Acceptance:
    """How many tokens a round commits, drawn so that they are as many as its acceptance length on the mean.

    Each draft is taken to be accepted with one chance a, independently, so that the mean of at most K + 1
    tokens is 1 + a + … + a^K (Leviathan et al. 2023, arXiv 2211.17192, equation 1), from which a follows.
    """

    def __init__(self, most_tokens: int) -> None:
        self._most = most_tokens
        self._chances = np.linspace(0.0, 1.0, GRID)
        self._taus = (self._chances[:, None] ** np.arange(most_tokens)).sum(axis=1)

    def draw(self, tau: Floats, random: np.random.Generator) -> Ints:
        """Committed tokens, the bonus token included."""
        chance = np.clip(np.interp(tau, self._taus, self._chances), 1e-12, 1 - 1e-12)
        accepted = np.floor(np.log1p(-random.random(tau.shape)) / np.log(chance))
        return 1 + np.minimum(accepted, self._most - 1).astype(np.int64)


class Observed:
    """Rounds of a frozen arm and of one that learns, request by request; ``fit`` makes a behaviour of them."""

    def __init__(
        self, frozen: Mapping[str, Ints], learning: Mapping[str, Ints], most_tokens: int
    ) -> None:
        self._most = most_tokens
        names = [name for name in frozen if name in learning]
        self.num_requests = len(names)
        self._sums = np.array([_by_position(frozen[name]) for name in names])
        self._lengths = np.array([1 + frozen[name][:, 1].sum() for name in names])
        rows = [_paired(frozen[name], learning[name]) for name in names]
        self._request = np.repeat(np.arange(len(names)), [len(one) for one in rows])
        pairs = np.concatenate(rows) if rows else np.zeros((0, 2))
        self._learnt, self._ratio = pairs[:, 0], pairs[:, 1]

    def fit(self, chosen: Sequence[int] | Ints | None = None) -> Behaviour:
        """Of all requests, or of those that are chosen, some of them more than once."""
        number = self.num_requests
        times = np.bincount(np.arange(number) if chosen is None else chosen, minlength=number)
        rounds, committed = np.tensordot(times, self._sums, axes=1)
        gain, scale, most = _curve(
            self._learnt, self._ratio, times[self._request].astype(np.float64)
        )
        return Behaviour(
            _filled(rounds, committed),
            gain,
            scale,
            most,
            self._most,
            np.repeat(self._lengths, times),
        )


def given(
    frozen_tau: float, learnt_tau: float, updates: float, most_tokens: int, lengths: Ints
) -> Behaviour:
    """A behaviour by hand: alike at all positions."""
    flat = np.full(len(POSITION_EDGES), frozen_tau)
    return Behaviour(flat, learnt_tau / frozen_tau - 1, updates, np.inf, most_tokens, lengths)


def _by_position(rounds: Ints) -> Floats:
    """How many rounds began in each stretch of positions, and what they committed ``[2, P]``."""
    place = np.searchsorted(_EDGES, rounds[:, 0], side="right") - 1
    sums = np.zeros((2, len(_EDGES)))
    np.add.at(sums[0], place, 1)
    np.add.at(sums[1], place, rounds[:, 1])
    return sums


def _filled(rounds: Floats, committed: Floats) -> Floats:
    """Mean lengths; a stretch with few rounds is as the one before it, the first as all are."""
    found, last = np.empty(len(rounds)), committed.sum() / max(1.0, rounds.sum())
    for place, number in enumerate(rounds):
        if number >= FEW:
            last = committed[place] / number
        found[place] = last
    return np.maximum(found, 1.0)


def _paired(frozen: Ints, learning: Ints) -> Floats:
    """Of each round that learnt: updates seen, and rounds that the frozen arm took for its text ``[N, 2]``."""
    ends = frozen[:, 0] + frozen[:, 1]
    share = np.zeros(int(ends.max()) + 1)
    for start, committed in frozen[:, :2]:
        share[start : start + committed] = 1.0 / committed
    until = np.concatenate(([0.0], np.cumsum(share)))
    inside = learning[learning[:, 0] + learning[:, 1] <= ends.max()]
    took = until[inside[:, 0] + inside[:, 1]] - until[inside[:, 0]]
    return np.column_stack((inside[:, 2].astype(np.float64), took))


def _curve(learnt: Floats, ratio: Floats, weights: Floats) -> tuple[float, float, float]:
    """G and s of 1 + g (1 - exp(-x / s)) by weighted least squares, and the largest x that was seen."""
    seen = learnt[weights > 0]
    most = float(seen.max()) if len(seen) else 0.0
    if most <= 0:
        return 0.0, 1.0, 0.0
    values, place = np.unique(learnt, return_inverse=True)
    weight = np.bincount(place, weights, len(values))
    mean = np.bincount(place, weights * ratio, len(values)) / np.maximum(weight, 1e-300) - 1.0
    best = (np.inf, 0.0, 1.0)
    for scale in np.geomspace(0.25, max(most, 0.5), SCALES):
        basis = -np.expm1(-values / scale)
        square = float((weight * basis * basis).sum())
        gain = float((weight * basis * mean).sum()) / square if square else 0.0
        error = float((weight * (mean - gain * basis) ** 2).sum())
        if error < best[0]:
            best = (error, gain, float(scale))
    return best[1], best[2], most
