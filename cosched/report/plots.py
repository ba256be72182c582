"""The figures of the report. Each function returns an ``<svg>``, or None if there is nothing."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import matplotlib as mpl
from matplotlib.ticker import PercentFormatter

from cosched.report.remarks import MIN_ROUNDS, span
from cosched.report.svg import STYLE, arm_colour_name, colour, new_figure, to_svg
from cosched.report.table import arm_seconds, speed_ratio, times

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

    from cosched.telemetry.metrics import ArmSummary, RunSummary

P = ParamSpec("P")
R = TypeVar("R")

WIDTH = 8.4  # inches; the page scales it
STAGES = ("prefill", "verify", "draft", "update", "publish", "other")
LABEL_SHARE = 0.055  # a segment narrower than this share of the axis has no room for its number


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a drawing function under the report's style and restore what was there."""

    @functools.wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inner


def drafting(summary: RunSummary) -> dict[str, ArmSummary]:
    """The arms that drafted anything."""
    return {name: arm for name, arm in summary.arms.items() if arm.position_acceptance}


def arm_colour(summary: RunSummary, name: str) -> str:
    """The arm's colour, the same in all figures."""
    return colour(arm_colour_name(name, list(summary.arms)))


def line_style(name: str) -> str:
    """Dashed where the draft sees only a window."""
    return "--" if name.endswith("+window") else "-"


@styled
def tau_by_position(summary: RunSummary) -> str | None:
    """Acceptance length against generated position, on all and on novel positions."""
    arms = drafting(summary)
    rounds: dict[str, int] = {}  # of the arm that has fewest in the bucket
    starts: dict[str, int] = {}
    for arm in arms.values():
        for bucket in arm.tau_by_position:
            label = span(bucket)
            starts[label] = bucket.start
            rounds[label] = min(rounds.get(label, bucket.rounds), bucket.rounds)
    labels = sorted(starts, key=starts.__getitem__)
    if not labels:
        return None
    figure = new_figure(WIDTH, 3.3)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, novel in ((left, False), (right, True)):
        for index, name in enumerate(arms):
            _bucket_line(axes, summary, name, labels, novel, index - (len(arms) - 1) / 2)
        ticks = [f"{label}\n{_count(rounds[label])}" for label in labels]
        axes.set_xticks(range(len(labels)), ticks, fontsize=7.5)
        axes.set_xlim(-0.5, len(labels) - 0.5)
        axes.set_xlabel("generated position\n(below it: rounds of the arm with fewest)")
        axes.axhline(1, color=colour("plain"), linewidth=1, linestyle=":")
        axes.annotate("no draft", (0.995, 1), (0, 2), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="right", va="bottom", fontsize=7.5,
                      color=colour("muted"))  # fmt: skip
    left.set_title("all positions", pad=8)
    right.set_title("novel positions only", pad=8)
    left.set_ylabel("tokens per request and round (τ)")
    left.set_ylim(0.85, max(1.6, left.get_ylim()[1]))
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=5)
    told = "; ".join(
        f"{name}: " + ", ".join(f"{span(b)} {b.tau:.2f}" for b in arm.tau_by_position)
        for name, arm in arms.items()
    )
    return to_svg(figure, "tau", "Acceptance length by generated position", told)


def _bucket_line(
    axes: Axes, summary: RunSummary, name: str, labels: list[str], novel: bool, shift: float
) -> None:
    buckets = summary.arms[name].tau_by_position
    points = [
        (labels.index(span(bucket)) + 0.05 * shift, tau, bucket.rounds)
        for bucket in buckets
        if (tau := bucket.tau_novel if novel else bucket.tau) is not None
    ]
    shade = arm_colour(summary, name)
    axes.plot([x for x, _, _ in points], [tau for _, tau, _ in points], color=shade,
              linestyle=line_style(name), linewidth=1.6)  # fmt: skip
    for solid in (True, False):
        chosen = [(x, tau) for x, tau, count in points if (count >= MIN_ROUNDS) == solid]
        axes.plot([x for x, _ in chosen], [tau for _, tau in chosen], "o", markersize=5,
                  color=shade, fillstyle="full" if solid else "none")  # fmt: skip
    axes.plot([], [], color=shade, linestyle=line_style(name), marker="o", markersize=5, label=name)


def _count(number: int) -> str:
    return f"{number / 1000:.1f}k" if number >= 10_000 else f"{number:,}"


@styled
def position_acceptance(summary: RunSummary) -> str | None:
    """Chance of drafted token k, given that those before it stood: grouped bars."""
    arms = drafting(summary)
    if not arms:
        return None
    depth = max(len(arm.position_acceptance) for arm in arms.values())
    figure = new_figure(WIDTH, 2.7)
    axes = figure.subplots()
    width = 0.8 / len(arms)
    for index, (name, arm) in enumerate(arms.items()):
        places = [k + 1 - 0.4 + width * (index + 0.5) for k in range(len(arm.position_acceptance))]
        bars = axes.bar(places, arm.position_acceptance, width * 0.9, label=name,
                        color=arm_colour(summary, name))  # fmt: skip
        if len(arms) * depth <= 24:
            axes.bar_label(bars, fmt="%.2f", fontsize=6.5, padding=1, color=colour("muted"))
    axes.set_xticks(range(1, depth + 1))
    axes.set_xlabel("place in the drafted block")
    axes.set_ylabel("accepted, if reached")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=5)
    told = "; ".join(
        f"{name}: " + ", ".join(f"{share:.2f}" for share in arm.position_acceptance)
        for name, arm in arms.items()
    )
    return to_svg(figure, "depth", "Acceptance by place in the drafted block", told)


@styled
def time_per_token(summary: RunSummary) -> str | None:
    """Milliseconds per committed token of each arm, stacked by stage."""
    arms = {name: arm for name, arm in summary.arms.items() if arm.tokens and arm_seconds(arm)}
    if not arms:
        return None
    stages = {name: _stage_ms(arm) for name, arm in arms.items()}
    longest = max(sum(parts.values()) for parts in stages.values())
    figure = new_figure(WIDTH, 0.75 + 0.36 * len(arms))
    axes = figure.subplots()
    for stage in STAGES:
        before = [
            sum(parts[earlier] for earlier in STAGES[: STAGES.index(stage)])
            for parts in stages.values()
        ]
        lengths = [parts[stage] for parts in stages.values()]
        bars = axes.barh(list(arms), lengths, 0.66, left=before, label=stage,
                         color=colour(f"stage-{stage}"))  # fmt: skip
        labels = [f"{ms:.2f}" if ms > LABEL_SHARE * longest else "" for ms in lengths]
        axes.bar_label(bars, labels, label_type="center", fontsize=7.5)
    for row, parts in enumerate(stages.values()):
        total = sum(parts.values())
        axes.annotate(f"{total:.2f} ms", (total, row), (4, 0), textcoords="offset points",
                      va="center", fontweight="bold")  # fmt: skip
    _horizontal(axes, 1.13 * longest, "milliseconds per committed token")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=6)
    told = "; ".join(
        f"{name}: " + ", ".join(f"{stage} {ms:.2f} ms" for stage, ms in parts.items())
        for name, parts in stages.items()
    )
    return to_svg(figure, "time", "Time per committed token by stage", told)


def _stage_ms(arm: ArmSummary) -> dict[str, float]:
    named = {stage: arm.seconds.get(stage, 0.0) for stage in STAGES if stage != "other"}
    named["other"] = max(0.0, arm_seconds(arm) - sum(named.values()))
    return {stage: 1000 * seconds / arm.tokens for stage, seconds in named.items()}


def _horizontal(axes: Axes, limit: float, label: str) -> None:
    """The manners of a bar chart that is read from the top, with names at the left."""
    axes.set_xlim(0, limit)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.tick_params(axis="y", length=0, labelcolor=colour("ink"))


@styled
def speed(summary: RunSummary) -> str | None:
    """Tokens per second of each arm."""
    arms = {name: arm for name, arm in summary.arms.items() if arm.tokens_per_s}
    if not arms:
        return None
    figure = new_figure(WIDTH, 0.5 + 0.33 * len(arms))
    axes = figure.subplots()
    shades = [arm_colour(summary, name) for name in arms]
    axes.barh(list(arms), [arm.tokens_per_s for arm in arms.values()], 0.66, color=shades)
    for row, (name, arm) in enumerate(arms.items()):
        ratio = speed_ratio(summary.arms, name, "plain")
        note = f" · {times(ratio)} plain" if ratio and name != "plain" else ""
        axes.annotate(f"{arm.tokens_per_s:.1f}{note}", (arm.tokens_per_s, row), (4, 0),
                      textcoords="offset points", va="center")  # fmt: skip
    _horizontal(axes, 1.36 * max(arm.tokens_per_s for arm in arms.values()), "tokens per second")
    told = "; ".join(f"{name}: {arm.tokens_per_s:.1f}" for name, arm in arms.items())
    return to_svg(figure, "speed", "Tokens per second", told)
