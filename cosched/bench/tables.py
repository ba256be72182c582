"""The rows of a result as a table, for a page and for a terminal."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from cosched.errors import ConfigError
from cosched.report.table import DASH, percent

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cosched.bench.figures import Figure, Row
    from cosched.bench.result import SuiteResult
    from cosched.bench.suite import View

DIGITS = {
    "tokens": 0,
    "count": 0,
    "rows": 0,
    "tokens/s": 1,
    "times": 2,
    "tokens a round": 2,
}
TITLES = {
    "tau": "τ", "tau_novel": "τ novel", "tau_novel_behind": "τ novel behind", "tokens_per_s": "tokens/s",
}  # fmt: skip
FIELD = re.compile(r"\{(?:([^:{}]+): *)?(\w+)\}")


@dataclass(frozen=True, slots=True)
class Cells:
    """Headers, and lines of as many cells."""

    headers: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        rows = [self.headers, ["---"] * len(self.headers), *self.lines]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def for_terminal(self, title: str) -> Table:
        table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for header in self.headers:
            table.add_column(Text(header), overflow="fold")
        for line in self.lines:
            table.add_row(*(Text(cell.replace("**", "")) for cell in line))
        return table


def table_of(result: SuiteResult, view: View) -> Cells:
    """The table that a view asks for.

    Raises:
        ConfigError: it names a figure or an axis that the result has not.
    """
    rows = _chosen(result.rows, view)
    known = {name for row in rows for name in row.figures}
    if not known:
        raise ConfigError("nothing is left by what `only` keeps")
    fields = FIELD.findall(view.cell or "")
    asked = [name for _, name in fields] if view.cell else list(view.figures)
    if unknown := [name for name in asked if name not in known]:
        raise ConfigError(f"no figure {unknown[0]!r}; there are {', '.join(sorted(known))}")
    if view.down != "arm" and not all(arm for arm, _ in fields):
        raise ConfigError(f"cell: {view.cell!r} names no arm; use {{ARM: FIGURE}}, or down: arm")
    if view.cell:
        return _grid(rows, view, view.cell)
    if all(not row.at for row in rows):
        return _list(rows, asked, view)
    return _lines(rows, asked or _all_figures(rows), view)


def shown(figure: Figure, interval: bool = True, digits: int | None = None) -> str:
    """A figure in the digits of its unit, or so many, with its interval behind it."""
    ends = ""
    if interval and figure.low is not None and figure.high is not None:
        low, high = (_number(end, figure.unit, digits) for end in (figure.low, figure.high))
        ends = f" ({low}{DASH}{high})"
    return f"{_number(figure.value, figure.unit, digits)}{ends}"


def _number(value: float, unit: str, digits: int | None) -> str:
    if unit == "share":
        return percent(value)
    if unit == "ms" and digits is None:
        return f"{value:.3g}" if value < 100 else f"{value:,.0f}"  # of any size
    return f"{value:,.{DIGITS[unit] if digits is None else digits}f}"


def _chosen(rows: Sequence[Row], view: View) -> list[Row]:
    """Those that ``only`` keeps, in its order."""
    kept = list(rows)
    for axis, labels in view.only.items():
        kept = [row for row in kept if row.at.get(axis) in labels]
        kept.sort(key=lambda row: labels.index(row.at[axis]))
    return kept


def _all_figures(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.figures))


def _lines(rows: Sequence[Row], figures: Sequence[str], view: View) -> Cells:
    axes = list(dict.fromkeys(axis for row in rows for axis in row.at))
    lines: list[list[str]] = []
    for row in rows:
        labels = [view.names.get(label, label) for axis in axes for label in [row.at.get(axis, "")]]
        lines.append([*labels, *(_cell(row, name) for name in figures)])
    return Cells([*axes, *(_title(name) for name in figures)], lines)


def _list(rows: Sequence[Row], figures: Sequence[str], view: View) -> Cells:
    """One figure a line, with its unit."""
    lines = [
        [view.names.get(name, name), shown(figure), figure.unit]
        for row in rows
        for name, figure in row.figures.items()
        if not figures or name in figures
    ]
    return Cells(["figure", "measured", "unit"], lines)


def _grid(rows: Sequence[Row], view: View, cell: str) -> Cells:
    there = {
        (row.at.get(view.down), row.at.get(view.across), row.at.get("arm")): row for row in rows
    }

    def filled(field: re.Match[str], down: str, across: str) -> str:
        return _cell(there.get((down, across, field[1] or down)), field[2], view.intervals)

    downs, acrosses = (
        list(dict.fromkeys(label for row in rows if (label := row.at.get(axis)) is not None))
        for axis in (view.down, view.across)
    )
    lines: list[list[str]] = []
    for down in downs:
        cells = [FIELD.sub(partial(filled, down=down, across=across), cell) for across in acrosses]
        lines.append([view.names.get(down, down), *cells])
    return Cells(["", *(view.names.get(across, across) for across in acrosses)], lines)


def _title(name: str) -> str:
    return TITLES.get(name, name.replace("_", " "))


def _cell(row: Row | None, name: str, interval: bool = True) -> str:
    """A ratio that is above 1 as far as the runs can tell is bold."""
    figure = None if row is None else row.figures.get(name)
    if figure is None:
        return DASH
    text = shown(figure, interval)
    sure = figure.unit == "times" and figure.low is not None and figure.low > 1
    return f"**{text}**" if sure else text
