"""The figures of what adaptation did: loss, evidence, versions and acceptance along the text."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from cosched.report.plots import arm_look, legend
from cosched.report.svg import SMALL, by_draft, colour, new_figure, styled, to_svg
from cosched.settings.arms import control_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from cosched.records import RoundRow
    from cosched.report.events import ArmEvents, RunEvents
    from cosched.report.svg import Frame
    from cosched.telemetry.metrics import RunSummary

WINDOW = 64  # rounds of the moving mean, unless the run is very short or very long
MAX_POINTS = 400  # of a line; more cannot be seen and make the page heavy
MAX_TICKS = 300
MAX_MARKERS = 120
LOWEST = -1.5  # share of a bound: what is further from it is as far from any verdict


def learners(summary: RunSummary, events: RunEvents) -> dict[str | None, list[str]]:
    """The arms of each draft that were updated."""
    return by_draft(
        [name for name in summary.arms if events.of(name).losses and events.of(name).rows]
    )


@styled
def adaptation(
    summary: RunSummary, events: RunEvents, draft: str | None, frame: Frame
) -> str | None:
    """Of one draft: loss of each update, the guard's evidence, versions, moving acceptance length."""
    adapted = learners(summary, events).get(draft, [])
    if not adapted:
        return None
    controls = [control_of(name) for name in adapted]
    shown = [name for name in dict.fromkeys([*controls, *adapted]) if events.of(name).rows]
    window = _window(min(len(events.of(name).rows) for name in shown))
    judged = [name for name in adapted if events.of(name).evidence]
    heights = [1.2, *([1.2] if judged else []), 0.2 + 0.16 * len(adapted), 1.6]
    figure = new_figure(frame.width, 0.6 + 1.1 * sum(heights))
    panels: list[Axes] = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    ticks, below = panels[-2:]
    for row, name in enumerate(adapted):
        _losses(panels[0], summary, name, events)
        _versions(ticks, summary, name, events, row)
    if judged:
        _evidence(panels[1], summary, judged, events)
    for name in shown:
        rows = events.of(name).in_time(events.max_batch)
        _moving_tau(below, summary, name, rows, window)
    panels[0].set_ylabel("loss, before\nthe first step")
    _bare(ticks, len(adapted))
    for axes in panels[:-1]:
        axes.tick_params(axis="x", length=0)
    below.set_ylabel(f"τ, mean of\n{window} rounds")
    below.set_xlabel("tokens committed by the arm so far")
    below.margins(x=0.01)
    legend(figure, [below], frame)
    told = "; ".join(_told(name, events.of(name)) for name in adapted)
    name = f"learning-{draft or 'draft'}-{frame.name}"
    return to_svg(figure, name, "Loss, guard, versions and acceptance over time", told)


def _told(name: str, arm: ArmEvents) -> str:
    judged = ""
    if arm.evidence:
        last = arm.evidence[-1]
        judged = (
            f", evidence at last {last.better:.2f} of its bound that learning is better, "
            f"{last.worse:.2f} that it is worse"
        )
    return (
        f"{name}: {len(arm.losses)} updates, loss {arm.losses[0][1]:.3f} at first and "
        f"{arm.losses[-1][1]:.3f} at last, {len(arm.publications)} publications, "
        f"{len(arm.rollbacks)} rollbacks{judged}"
    )


def _window(num_rows: int) -> int:
    """Short runs get a shorter mean, or nothing would be left; long ones a longer, or only noise."""
    return max(4, min(WINDOW, num_rows // 6), num_rows // 40)


def _bare(ticks: Axes, number: int) -> None:
    """A row of ticks for each arm, and no axes around them."""
    ticks.set_ylim(number - 0.4, -0.6)
    ticks.set_yticks([])
    ticks.grid(visible=False)
    ticks.spines[["left", "bottom"]].set_visible(False)
    ticks.set_ylabel("versions", rotation=0, ha="right", va="center", fontsize=SMALL)


def _losses(axes: Axes, summary: RunSummary, name: str, events: RunEvents) -> None:
    arm, look = events.of(name), arm_look(summary, name)
    tokens = tokens_at(arm, [at for at, _ in arm.losses], events.max_batch)
    kept = _thinned(len(arm.losses), MAX_POINTS)
    few = len(kept) <= MAX_MARKERS
    axes.plot([tokens[i] for i in kept], [arm.losses[i][1] for i in kept],
              marker=look.mark if few else "", markersize=2.4, linewidth=0.9,
              linestyle=look.style if few else "-", color=look.shade)  # fmt: skip


def _evidence(axes: Axes, summary: RunSummary, names: Sequence[str], events: RunEvents) -> None:
    """Shares of the bound that a verdict takes: up is that learning is better, dotted that it is worse."""
    highest = 1.3
    for name in names:
        arm, look = events.of(name), arm_look(summary, name)
        tokens = tokens_at(arm, [one.round for one in arm.evidence], events.max_batch)
        kept = _thinned(len(arm.evidence), MAX_POINTS)
        for style, values in (
            (look.style, [one.better for one in arm.evidence]),
            (":", [one.worse for one in arm.evidence]),
        ):
            shown = [max(LOWEST, values[i]) for i in kept]
            highest = max(highest, *(min(3.0, value) for value in shown))
            axes.plot([tokens[i] for i in kept], shown, color=look.shade, linewidth=1.2,
                      linestyle=style, marker=look.mark if style != ":" else "x",
                      markersize=2.6)  # fmt: skip
    axes.axhline(1, color=colour("ink"), linewidth=1)
    axes.annotate("bound", (0.005, 1), (0, 2), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="left", va="bottom", fontsize=SMALL)  # fmt: skip
    axes.set_ylim(top=1.1 * highest)
    axes.set_ylabel("evidence, share\nof its bound")


def _versions(axes: Axes, summary: RunSummary, name: str, events: RunEvents, row: int) -> None:
    """A tick where one was published, a cross where the guard went back, a triangle at a reset."""
    arm, look = events.of(name), arm_look(summary, name)
    tokens = tokens_at(arm, [at for at, _ in arm.publications], events.max_batch)
    kept = _thinned(len(tokens), MAX_TICKS)
    # One broken line instead of many: a tick is two points and a gap.
    xs = [x for i in kept for x in (tokens[i], tokens[i], float("nan"))]
    ys = [y for _ in kept for y in (row - 0.3, row + 0.3, float("nan"))]
    axes.plot(xs, ys, color=look.shade, linewidth=1)
    for mark, rounds in (("x", arm.rollbacks), ("v", arm.resets)):
        places = tokens_at(arm, rounds[:MAX_TICKS], events.max_batch)
        axes.plot(places, [row] * len(places), mark, color=colour("ink"), markersize=4)
    if arm.publications:
        axes.annotate(f"v{arm.publications[-1][1]}", (1, row), (2, 0), va="center",
                      xycoords=("axes fraction", "data"), textcoords="offset points",
                      fontsize=SMALL, annotation_clip=False)  # fmt: skip


def _moving_tau(
    axes: Axes, summary: RunSummary, name: str, rows: Sequence[RoundRow], window: int
) -> None:
    look = arm_look(summary, name)
    tokens = [0, *accumulate(row.num_committed for row in rows)]
    ends = range(window, len(tokens))
    kept = [ends[i] for i in _thinned(len(ends), MAX_POINTS)]
    means = [(tokens[end] - tokens[end - window]) / window for end in kept]
    axes.plot([tokens[end] for end in kept], means, linewidth=1.4, label=look.name,
              linestyle=look.style, color=look.shade, marker=look.mark, markersize=4,
              markevery=0.1)  # fmt: skip


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
