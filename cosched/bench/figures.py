"""A measured figure with its unit and interval, and how scripts hand theirs over."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from cosched.telemetry.run_folder import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

COVERAGE = 0.95
Unit = Literal["tokens", "tokens a round", "tokens/s", "times", "share", "ms", "count", "rows"]
"""``times``: over that of another arm; ``share``: of 1."""


class Figure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A value, and the ends of its 95 % interval where there is one."""

    value: float
    unit: Unit
    low: float | None = None
    high: float | None = None


class Row(msgspec.Struct, frozen=True):
    """Figures of one place ``at``: labels of the suite's grid, the text, the draft and the arm."""

    at: dict[str, str]
    figures: dict[str, Figure]


def median_of(values: Sequence[float], unit: Unit) -> Figure:
    """The median of repeats, with the interval of the sign test, which six of them have.

    Of n repeats k or fewer lie below the median of what they are drawn from with the probability
    P(k) of k or fewer heads in n throws of a coin, whatever the distribution. With the largest k of
    P(k) <= 2.5 %, the interval leaves out the k smallest and the k largest.
    """
    ordered, number = sorted(values), len(values)
    tail, below = (1 - COVERAGE) / 2 * 2**number, 1
    if below > tail:
        return Figure(value=median(ordered), unit=unit)
    left_out = 0
    while (below := below + math.comb(number, left_out + 1)) <= tail:
        left_out += 1
    low, high = ordered[left_out], ordered[-1 - left_out]
    return Figure(value=median(ordered), unit=unit, low=low, high=high)


def write_figures(path: Path | None, figures: Mapping[str, Figure] | Sequence[Row]) -> None:
    """What a script measured, into the file that ``--json`` names, if it does: all at one place, or rows."""
    if path is not None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(figures)) + b"\n")


def read_rows(path: Path) -> list[Row]:
    """What a script has written.

    Raises:
        RunFolderError: it wrote nothing, or something else.
    """
    either: Any = dict[str, Figure] | list[Row]
    found = read_json(path, either, "has no figures")
    return found if isinstance(found, list) else [Row({}, found)]
