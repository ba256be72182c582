"""How long the steps of a round take: one context for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Meter:
    """A stopwatch that adds up: ``with meter:`` around what is to be timed, ``take`` for the sum.

    What was timed and turns out to be nobody's expense is taken and dropped. Spans do not nest.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started = 0.0
        self._seconds = 0.0

    def __enter__(self) -> None:
        self._started = self._clock()

    def __exit__(self, *_: object) -> None:
        self._seconds += self._clock() - self._started

    def take(self) -> float:
        """Seconds since it was last asked; from now on it begins anew."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
