"""The figure of what adaptation did: loss, publications and acceptance along the text."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from cosched.report.plots import WIDTH, arm_colour, line_style, styled
from cosched.report.svg import new_figure, to_svg
from cosched.settings.arms import control_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from cosched.records import RoundRow
    from cosched.report.events import ArmEvents, RunEvents
    from cosched.telemetry.metrics import RunSummary

WINDOW = 64  # rounds of the moving mean, unless the run is very short or very long
MAX_POINTS = 500  # of a line; more cannot be seen and make the page heavy
MAX_TICKS = 300
MAX_MARKERS = 120


@styled
def adaptation(summary: RunSummary, events: RunEvents) -> str | None:
    """Loss of each update above, moving acceptance length with publications below."""
    adapted = [name for name in summary.arms if events.of(name).losses and events.of(name).rows]
    if not adapted:
        return None
    controls = [control_of(name) for name in adapted]
    shown = [name for name in dict.fromkeys([*controls, *adapted]) if events.of(name).rows]
    window = _window(min(len(events.of(name).rows) for name in shown))
    figure = new_figure(WIDTH, 4.6)
    above, ticks, below = figure.subplots(
        3, 1, sharex=True, height_ratios=[1, 0.1 + 0.09 * len(adapted), 1.35]
    )
    for row, name in enumerate(adapted):
        _losses(above, summary, name, events)
        _publications(ticks, summary, name, events, row)
    for name in shown:
        rows = events.of(name).in_time(events.max_batch)
        _moving_tau(below, summary, name, rows, window)
    above.set_ylabel("loss of the update\n(before its first step)")
    ticks.set_ylim(len(adapted) - 0.4, -0.6)
    ticks.set_yticks([])
    ticks.grid(visible=False)
    ticks.spines[["left", "bottom"]].set_visible(False)
    for axes in (above, ticks):
        axes.tick_params(axis="x", length=0)
    ticks.set_ylabel("published", rotation=0, ha="right", va="center", fontsize=7.5)
    below.set_ylabel(f"τ, mean of {window} rounds")
    below.set_xlabel("tokens committed by the arm so far")
    below.margins(x=0.01)
    figure.legend(*below.get_legend_handles_labels(), loc="outside upper left", ncols=5)
    told = "; ".join(
        f"{name}: {len(events.of(name).losses)} updates, loss {events.of(name).losses[0][1]:.3f} "
        f"at first and {events.of(name).losses[-1][1]:.3f} at last, "
        f"{len(events.of(name).publications)} publications"
        for name in adapted
    )
    return to_svg(figure, "learning", "Loss, publications and acceptance over time", told)


def _window(num_rows: int) -> int:
    """Short runs get a shorter mean, or nothing would be left; long ones a longer, or only noise."""
    return max(4, min(WINDOW, num_rows // 6), num_rows // 40)


def _losses(axes: Axes, summary: RunSummary, name: str, events: RunEvents) -> None:
    arm = events.of(name)
    tokens = tokens_at(arm, [at for at, _ in arm.losses], events.max_batch)
    kept = _thinned(len(arm.losses), MAX_POINTS)
    few = len(kept) <= MAX_MARKERS
    axes.plot([tokens[i] for i in kept], [arm.losses[i][1] for i in kept],
              marker="o" if few else "", markersize=2.2, linewidth=0.9,
              linestyle=line_style(name) if few else "-",
              color=arm_colour(summary, name))  # fmt: skip


def _publications(axes: Axes, summary: RunSummary, name: str, events: RunEvents, row: int) -> None:
    arm = events.of(name)
    tokens = tokens_at(arm, [at for at, _ in arm.publications], events.max_batch)
    kept = _thinned(len(tokens), MAX_TICKS)
    # One broken line instead of many: a tick is two points and a gap.
    xs = [x for i in kept for x in (tokens[i], tokens[i], float("nan"))]
    ys = [y for _ in kept for y in (row - 0.35, row + 0.35, float("nan"))]
    axes.plot(xs, ys, color=arm_colour(summary, name), linewidth=1)


def _moving_tau(
    axes: Axes, summary: RunSummary, name: str, rows: Sequence[RoundRow], window: int
) -> None:
    tokens = [0, *accumulate(row.num_committed for row in rows)]
    ends = range(window, len(tokens))
    kept = [ends[i] for i in _thinned(len(ends), MAX_POINTS)]
    means = [(tokens[end] - tokens[end - window]) / window for end in kept]
    axes.plot([tokens[end] for end in kept], means, linewidth=1.5, label=name,
              linestyle=line_style(name), color=arm_colour(summary, name))  # fmt: skip


def tokens_at(arm: ArmEvents, rounds: Sequence[int], max_batch: int) -> list[float]:
    """How many tokens the arm had committed at rounds of the co-scheduler.

    A round may serve several requests and a row does not say which round it was, but the version
    that drafted it is known: a publication lies where the rows of its version begin, and other
    rounds between the publications around them.
    """
    rows = arm.in_time(max_batch)
    tokens = [0, *accumulate(row.num_committed for row in rows)]
    first_row: dict[int, int] = {}
    for index, row in enumerate(rows):
        first_row.setdefault(row.draft_version, index)
    known = {0: 0}
    for at, version in arm.publications:
        if version in first_row:
            known[at] = tokens[first_row[version]]
    last = max([at for at, _ in (*arm.publications, *arm.losses)], default=0)
    known.setdefault(max(last, *known), tokens[-1])
    places = sorted(known)
    return np.interp(list(rounds), places, [known[at] for at in places]).tolist()


def _thinned(number: int, limit: int) -> list[int]:
    """At most ``limit`` of ``number`` indices, evenly spread, both ends kept."""
    if number <= limit:
        return list(range(number))
    return sorted({round(i * (number - 1) / (limit - 1)) for i in range(limit)})
