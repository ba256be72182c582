"""Paired differences of scores, added up: how much better one draft is than another, and how surely."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MEMORY = 256  # rows that evidence is made of: text moves on
EVIDENCE_ROWS = 128  # below which there is no evidence
PIECE = 16  # rows that are one observation: neighbours in a text are alike


@dataclass(slots=True)
class Evidence:
    """Paired differences, one of each piece of ``PIECE`` rows, weighed by how many it had.

    The mean m = sum w d / sum w. A piece's variance goes with 1 / w, so that of the mean is
    sum w (d - m)^2 / ((n - 1) sum w), with n = (sum w)^2 / sum w^2, Kish's effective number. Beyond
    ``MEMORY`` rows older ones are forgotten exponentially.
    """

    mean: float = 0.0
    weight: float = 0.0
    squared_weights: float = 0.0
    squares: float = 0.0  # sum of w (d - m)^2

    def add(self, ones: Sequence[float], others: Sequence[float]) -> None:
        """What one draft scored above another, row by row."""
        rows = [one - other for one, other in zip(ones, others, strict=True)]
        for start in range(0, len(rows), PIECE):
            piece = rows[start : start + PIECE]
            self._add(mean(piece), len(piece))

    def _add(self, difference: float, num_rows: int) -> None:
        """Welford's update, weighted (West, Communications of the ACM 22, 1979)."""
        self.weight += num_rows
        self.squared_weights += num_rows**2
        off = difference - self.mean
        self.mean += num_rows / self.weight * off
        self.squares += num_rows * off * (difference - self.mean)
        kept = min(1.0, MEMORY / self.weight)
        self.weight *= kept
        self.squared_weights *= kept**2
        self.squares *= kept

    @property
    def z(self) -> float:
        """The mean in standard errors; 0 while there is too little to say."""
        return self.errors_ahead() if self.weight >= EVIDENCE_ROWS else 0.0

    def errors_ahead(self) -> float:
        """The mean in standard errors, however few rows there are; endless doubt where it is none."""
        if not math.isfinite(self.mean):
            return -math.inf
        if self.mean == 0 or self.weight**2 == self.squared_weights:  # nothing, or of one piece
            return 0.0
        number = self.weight**2 / self.squared_weights
        error = math.sqrt(max(0.0, self.squares) / ((number - 1) * self.weight))
        return self.mean / error if error else math.copysign(math.inf, self.mean)


def mean(scores: Sequence[float]) -> float:
    """Of at least one."""
    return sum(scores) / len(scores)
