"""The figures of acceptance: along the answer, and inside a block. None where there is nothing.

The arms of each draft have a panel of their own. What is drawn around a point is the interval of
``cosched.report.shares``: a band where few arms share a panel, else whiskers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.ticker import PercentFormatter

from cosched.report.remarks import MIN_ROUNDS, span
from cosched.report.shares import interval
from cosched.report.svg import (
    SMALL,
    arm_colour_name,
    arm_mark,
    by_draft,
    colour,
    line_style,
    new_figure,
    styled,
    to_svg,
)
from cosched.settings.arms import DRAFT_MARK, draft_of
from cosched.telemetry.parts import NO_PARTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cosched.report.shares import Interval
    from cosched.report.svg import Frame
    from cosched.telemetry.metrics import ArmSummary, Bucket, RunSummary

MOST_BANDS = 3  # in a panel; more of them hide each other
MOST_LEVEL = 4  # labels of spans
SHIFT = 0.07  # between arms, of the distance of two places
SPREAD = 0.3  # that all of them may take


class Look(NamedTuple):
    """How a line is drawn, and what it is called."""

    name: str
    shade: str
    mark: str
    style: str


class Point(NamedTuple):
    """One value of a line, with its interval; one that is not ``solid`` rests on little."""

    x: float
    y: float
    ends: Interval | None
    solid: bool = True


def arm_look(summary: RunSummary, name: str) -> Look:
    """An arm's, the same in all figures; which draft it has is for its panel to say."""
    arms = list(summary.arms)
    shade = colour(arm_colour_name(name, arms))
    own = name.removeprefix(f"{draft_of(name)}{DRAFT_MARK}")
    return Look(own, shade, arm_mark(name, arms), line_style(name))


def drafting(summary: RunSummary) -> dict[str, ArmSummary]:
    """The arms that drafted anything."""
    return {name: arm for name, arm in summary.arms.items() if arm.position_acceptance}


def draw_lines(axes: Axes, lines: Mapping[Look, Sequence[Point]]) -> None:
    """Lines with what is known of their points; beside each other where they would hide each other."""
    step = min(SHIFT, SPREAD / max(1, len(lines)))
    bands = len(lines) <= MOST_BANDS
    for index, (look, points) in enumerate(lines.items()):
        shift = 0 if bands else step * (index - (len(lines) - 1) / 2)
        _draw_line(axes, look, [p._replace(x=p.x + shift) for p in points], bands)
        axes.plot([], [], color=look.shade, linestyle=look.style, marker=look.mark, markersize=4.5,
                  label=look.name)  # fmt: skip


def _draw_line(axes: Axes, look: Look, points: Sequence[Point], bands: bool) -> None:
    axes.plot([p.x for p in points], [p.y for p in points], color=look.shade,
              linestyle=look.style, linewidth=1.5)  # fmt: skip
    known = [(p, p.ends) for p in points if p.ends is not None]
    places = [p.x for p, _ in known]
    lows, highs = [ends[0] for _, ends in known], [ends[1] for _, ends in known]
    if bands and len(known) > 1:
        axes.fill_between(places, lows, highs, color=look.shade, alpha=0.16, linewidth=0)
    # Also in a band, for print and for who sees no pale colours.
    axes.vlines(places, lows, highs, color=look.shade, linewidth=1)
    for solid in (True, False):
        chosen = [p for p in points if p.solid == solid]
        axes.plot([p.x for p in chosen], [p.y for p in chosen], look.mark, markersize=4.5,
                  color=look.shade, fillstyle="full" if solid else "none")  # fmt: skip


def legend(figure: Figure, panels: Sequence[Axes], frame: Frame) -> None:
    """One above the whole figure; what is in several panels stands in it once."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(list(found.values()), list(found), loc="outside upper left",
                  ncols=2 if frame.narrow else 5)  # fmt: skip


def all_panels(figure: Figure, number: int, across: int, sharey: bool = True) -> list[Axes]:
    """So many panels, in rows of ``across``."""
    down = -(-number // across)
    panels: list[Axes] = list(figure.subplots(down, across, squeeze=False, sharey=sharey).flatten())
    for axes in panels[number:]:
        axes.set_visible(False)
    return panels[:number]


@styled
def tau_by_position(summary: RunSummary, frame: Frame) -> str | None:
    """Acceptance length against generated position, on all and on novel positions."""
    arms = {name: arm for name, arm in drafting(summary).items() if arm.tau_by_position}
    if not arms:
        return None
    groups = by_draft(list(arms))
    across = 1 if frame.narrow else 2
    figure = new_figure(frame.width, 0.5 + 2 * len(groups) / across * 2.3)
    panels = all_panels(figure, 2 * len(groups), across)
    for number, (draft, names) in enumerate(groups.items()):
        for novel in (False, True):
            axes = panels[2 * number + novel]
            _tau_panel(axes, summary, {name: arms[name] for name in names}, novel)
            what = "novel positions only" if novel else "all positions"
            axes.set_title(what if draft is None else f"{draft}: {what}")
            if frame.narrow or not novel:
                axes.set_ylabel("tokens per round (τ)")
    panels[0].set_ylim(0.85, max(1.6, panels[0].get_ylim()[1]))
    legend(figure, panels, frame)
    told = "; ".join(
        f"{name}: " + ", ".join(f"{span(b)} {b.tau:.2f}" for b in arm.tau_by_position)
        for name, arm in arms.items()
    )
    return to_svg(figure, f"tau-{frame.name}", "Acceptance length by generated position", told)


def _tau_panel(
    axes: Axes, summary: RunSummary, arms: Mapping[str, ArmSummary], novel: bool
) -> None:
    starts = {span(b): b.start for arm in arms.values() for b in arm.tau_by_position}
    labels = sorted(starts, key=starts.__getitem__)
    lines: dict[Look, list[Point]] = {}
    for name, arm in arms.items():
        lines[arm_look(summary, name)] = tau_points(arm.tau_by_position, labels, novel)
    draw_lines(axes, lines)
    position_ticks(axes, labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.axhline(1, color=colour("muted"), linewidth=1, linestyle=":")
    axes.annotate("no draft", (0.995, 1), (0, 2), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", va="bottom", fontsize=SMALL,
                  color=colour("muted"))  # fmt: skip


def position_ticks(axes: Axes, labels: Sequence[str]) -> None:
    """Spans of the answer below the axes, turned where there are too many to stand side by side."""
    many = len(labels) > MOST_LEVEL
    axes.set_xticks(range(len(labels)), labels, fontsize=SMALL, rotation=30 if many else 0,
                    ha="right" if many else "center", rotation_mode="anchor")  # fmt: skip
    axes.set_xlabel("generated position")


def tau_points(
    buckets: Sequence[Bucket], labels: Sequence[str], novel: bool = False
) -> list[Point]:
    """A point for each bucket that has any, at the place of its label."""
    found: list[Point] = []
    for b in buckets:
        tau, parts, rounds = b.tau, b.parts, b.rounds
        if novel:
            tau, parts, rounds = b.tau_novel, b.parts_novel, b.rounds_novel
        if tau is not None:
            x = labels.index(span(b))
            found.append(Point(x, tau, interval(parts.pairs, least=1), rounds >= MIN_ROUNDS))
    return found


@styled
def position_acceptance(summary: RunSummary, frame: Frame) -> str | None:
    """Chance of drafted token k, given that those before it stood."""
    arms = drafting(summary)
    if not arms:
        return None
    groups = by_draft(list(arms))
    depth = max(len(arm.position_acceptance) for arm in arms.values())
    across = 1 if frame.narrow else min(3, len(groups))
    figure = new_figure(frame.width, 0.5 + -(-len(groups) // across) * 2.2)
    panels = all_panels(figure, len(groups), across)
    for number, (axes, (draft, names)) in enumerate(zip(panels, groups.items(), strict=True)):
        draw_lines(axes, {arm_look(summary, name): _places(arms[name]) for name in names})
        axes.set_xticks(range(1, depth + 1))
        axes.set_xlim(0.6, depth + 0.4)
        axes.set_xlabel("place in the drafted block")
        if number % across == 0:
            axes.set_ylabel("accepted, if reached")
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        if draft is not None:
            axes.set_title(draft)
    legend(figure, panels, frame)
    told = "; ".join(
        f"{name}: " + ", ".join(f"{share:.2f}" for share in arm.position_acceptance)
        for name, arm in arms.items()
    )
    return to_svg(figure, f"depth-{frame.name}", "Acceptance by place in the drafted block", told)


def _places(arm: ArmSummary) -> list[Point]:
    parts = arm.position_parts or [NO_PARTS] * len(arm.position_acceptance)
    return [
        Point(k, share, interval(own.pairs, most=1))
        for k, (share, own) in enumerate(zip(arm.position_acceptance, parts, strict=True), 1)
    ]
