"""A sweep's results on the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from cosched.report.table import DASH, percent
from cosched.sweep.results import effects, points, texts_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cosched.sweep.results import Effect, Point, SweepSummary

SHOWN = 8
CAPTION = (
    "gain: of τ on novel positions over the frozen draft on the same text, mean of the texts; "
    "vs window: over the frozen draft that sees a window only"
)


def tables(summary: SweepSummary) -> Iterator[Table]:
    """The best points of each drafter, and what each setting did."""
    for drafter, some in points(summary).items():
        yield _best(drafter, some)
    yield from _effects(summary)


def _best(drafter: str, some: list[Point]) -> Table:
    texts = texts_of(some)
    table = Table(
        title=f"{drafter}: {min(SHOWN, len(some))} best of {len(some)} points",
        title_justify="left",
        caption=CAPTION,
        caption_justify="left",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("settings", overflow="fold", style="bold")
    for name in ("gain", "vs window", *texts):
        # A name that is too long breaks where it may.
        table.add_column(name.replace("-", "-\n").replace(" ", "\n"), justify="right")
    for point in some[:SHOWN]:
        table.add_row(point.label, *point_cells(point, texts))
    return table


def point_cells(point: Point, texts: list[str]) -> list[str]:
    """Mean gain, mean gain over a window, and the gain on each text."""
    over = [c.gain_novel_over_window for c in point.cells if c.gain_novel_over_window is not None]
    by_text = point.by_text
    return [
        percent(point.gain, signed=True),
        percent(sum(over) / len(over), signed=True) if over else DASH,
        *(percent(by_text[text], signed=True) if text in by_text else DASH for text in texts),
    ]


def _effects(summary: SweepSummary) -> Iterator[Table]:
    found = effects(summary)
    if not found:
        return
    table = Table(
        "drafter",
        "setting",
        "value",
        title="what each setting did",
        title_justify="left",
        caption="* what holds where another setting varies",
        caption_justify="left",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("gain", "difference", "points"):
        table.add_column(name, justify="right")
    before = None
    for one in found:
        if before is not None and (one.drafter, one.axis) != before:
            table.add_section()
        same = (one.drafter, one.axis) == before
        before = (one.drafter, one.axis)
        table.add_row(
            "" if same else one.drafter,
            "" if same else one.axis,
            *effect_cells(one),
        )
    yield table


def effect_cells(one: Effect) -> list[str]:
    """Label, mean gain, difference to the axis's middle, and of how many points."""
    return [
        one.label + " *" * one.is_default,
        percent(one.gain, signed=True),
        percent(one.difference, signed=True),
        str(one.num_points),
    ]
