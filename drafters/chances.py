"""How likely the places of a draft are accepted, from what was seen of them; numbers only."""

from __future__ import annotations

from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Chances:
    """Of each place, how often it was accepted where all before it were.

    What is supposed of a place counts for ``prior`` drafts; with ``fade`` what was seen counts less, 1 / e
    of it after ``memory`` times.
    """

    def __init__(self, num_places: int, prior: float, memory: int) -> None:
        self._true = [0.0] * num_places
        self._tried = [0.0] * num_places
        self._prior = prior
        self._kept = 1 - 1 / memory

    def fade(self) -> None:
        for counts in (self._true, self._tried):
            counts[:] = [count * self._kept for count in counts]

    def note(self, place: int, came_true: bool) -> None:
        self._true[place] += came_true
        self._tried[place] += 1

    def by_place(self, supposed: Sequence[float]) -> list[float]:
        """The mean of what was seen, and a little of what is supposed of the place."""
        return [self._mean(place, before) for place, before in enumerate(supposed)]

    def after(self, first: float) -> list[float]:
        """The same where only the first place is supposed, and each other to be like the one before."""
        places = range(len(self._tried))
        return list(accumulate(places, lambda before, at: self._mean(at, before), initial=first))[
            1:
        ]

    def _mean(self, place: int, supposed: float) -> float:
        true, tried = self._true[place], self._tried[place]
        return (true + self._prior * supposed) / (tried + self._prior)


def expected_tokens(chances: Sequence[float]) -> float:
    """How many drafted tokens are accepted, if these are the chances of their places."""
    return sum(accumulate(chances, mul))
