"""``report.html`` of a sweep: one plot, one table, and what each setting did."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup
from matplotlib.ticker import PercentFormatter

from cosched.report.html import template
from cosched.report.svg import PALETTE, SPARE, WIDE, colour, new_figure, styled, to_svg
from cosched.report.table import percent
from cosched.sweep.results import effects, points, texts_of
from cosched.sweep.table import CAPTION, effect_cells, point_cells
from cosched.telemetry.run_folder import RunFolder

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from cosched.sweep.results import Point, SweepSummary

MOST = 40  # points that a drafter's plot shows
LABEL = 70  # characters of a point's name beside the plot


def write_page(folder: Path, summary: SweepSummary, marker: str) -> Path:
    """Render the page beside ``sweep.json``; returns its path.

    Raises:
        RunFolderError: it cannot be written.
    """
    by_drafter = points(summary)
    texts = texts_of(point for some in by_drafter.values() for point in some)
    svg = gains(by_drafter)
    page = template("sweep.html.j2").render(
        palette=PALETTE,
        sweep=summary.sweep,
        found=[_sentence(drafter, some) for drafter, some in by_drafter.items()],
        plot=Markup(svg) if svg else None,
        most=MOST,
        texts=texts,
        caption=CAPTION,
        drafters={
            drafter: [(point.label, point_cells(point, texts), _ids(point)) for point in some]
            for drafter, some in by_drafter.items()
        },
        effects=[
            (one.drafter, one.axis, *effect_cells(one)) for one in effects(summary)
        ],
        failures=summary.failures,
        num_missing=summary.num_missing,
        plan=(folder / marker).read_text(encoding="utf-8"),
    )  # fmt: skip
    return RunFolder(folder, marker).write("report.html", page)


def _ids(point: Point) -> str:
    return ", ".join(cell.id for cell in point.cells)


def _sentence(drafter: str, some: list[Point]) -> str:
    best = some[0]
    line = f"{drafter}: best with {best.label}, {percent(best.gain, signed=True)} over frozen"
    as_set = next((point for point in some if not point.settings), None)
    if as_set is None or as_set is best:
        return f"{line}, on novel positions."
    return f"{line}, on novel positions; as set it is {percent(as_set.gain, signed=True)}."


@styled
def gains(by_drafter: dict[str, list[Point]]) -> str | None:
    """Gain of every point, the best above: a bar for the mean of the texts, a dot for each text."""
    if not by_drafter:
        return None
    texts = texts_of(point for some in by_drafter.values() for point in some)
    shown = {drafter: some[:MOST] for drafter, some in by_drafter.items()}
    heights = [0.5 + 0.2 * len(some) for some in shown.values()]
    figure = new_figure(WIDE.width, 0.4 + sum(heights))
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True, height_ratios=heights)
    for (drafter, some), axes in zip(shown.items(), panels[:, 0], strict=True):
        _panel(axes, some, texts)
        axes.set_title(drafter)
    panels[-1, 0].set_xlabel("gain in τ over frozen, novel positions")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    told = "; ".join(
        f"{drafter}: " + ", ".join(f"{p.label} {percent(p.gain, signed=True)}" for p in some)
        for drafter, some in shown.items()
    )
    return to_svg(figure, "gains", "Gain over the frozen draft by setting", told)


def _panel(axes: Axes, some: list[Point], texts: list[str]) -> None:
    rows = range(len(some))
    axes.barh(rows, [point.gain for point in some], 0.7, color=colour("grid"), label="mean")
    for number, text in enumerate(texts):
        dots = [
            (point.by_text[text], row) for row, point in enumerate(some) if text in point.by_text
        ]
        shade = colour(SPARE[number % len(SPARE)])
        axes.plot([x for x, _ in dots], [y for _, y in dots], "o", markersize=4, color=shade,
                  label=text)  # fmt: skip
    labels = [p.label if len(p.label) <= LABEL else p.label[: LABEL - 1] + "…" for p in some]
    axes.set_yticks(rows, labels, fontsize=7.5)
    axes.invert_yaxis()
    axes.axvline(0, color=colour("muted"), linewidth=1)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.tick_params(axis="y", length=0, labelcolor=colour("ink"))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
