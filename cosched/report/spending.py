"""The figures of time: what a token cost by stage, and how many a second there were."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.patches import Patch

from cosched.report.intervals import Ratio, cut
from cosched.report.shares import interval
from cosched.report.svg import SMALL, arm_colour_name, colour, new_figure, styled, to_svg
from cosched.report.table import arm_seconds, speed_ratio, times
from cosched.telemetry.metrics import Turn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from cosched.report.events import RunEvents
    from cosched.report.shares import Interval
    from cosched.report.svg import Frame
    from cosched.telemetry.metrics import ArmSummary, RunSummary

STAGES = ("prefill", "verify", "draft", "update", "publish", "other")
HATCHES = ("", "", "//", "xx", "\\\\", "")
LABEL_SHARE = 0.075  # a segment narrower than this share of the axis has no room for its number
TOTAL = "all"
WHISKER = 0.2  # below the middle of a bar, beside its numbers


def timed(summary: RunSummary) -> dict[str, ArmSummary]:
    """The arms that have times."""
    return {name: arm for name, arm in summary.arms.items() if arm.tokens and arm_seconds(arm)}


def stage_ms(arm: ArmSummary) -> dict[str, float]:
    """Milliseconds per committed token by stage."""
    named = {stage: arm.seconds.get(stage, 0.0) for stage in STAGES if stage != "other"}
    named["other"] = max(0.0, arm_seconds(arm) - sum(named.values()))
    return {stage: 1000 * seconds / arm.tokens for stage, seconds in named.items()}


def stage_intervals(
    summary: RunSummary, events: RunEvents
) -> dict[str, dict[str, Interval | None]]:
    """Of each arm the intervals of ``stage_ms``, and of the whole, over the parts of the text.

    ``cut`` goes by tokens alone, so that seconds of one stage are cut like those of all.
    """
    turns = {name: events.of(name).turns for name in timed(summary)}
    found: dict[str, dict[str, Interval | None]] = {name: {} for name in turns}
    for stage in (*STAGES, TOTAL):
        seconds = {
            name: [Turn(t.group, t.tokens, _seconds(t, stage)) for t in some]
            for name, some in turns.items()
        }
        parts, _ = cut(seconds)
        for name, some in turns.items():
            known = stage == TOTAL or all(turn.stages for turn in some)
            pairs = [(1000 * part.seconds, part.tokens) for part in parts[name]]
            found[name][stage] = interval(pairs) if known else None
    return found


def _seconds(turn: Turn, stage: str) -> float:
    if stage == TOTAL:
        return turn.seconds
    if stage == "other":
        return max(0.0, turn.seconds - sum(turn.stages.values()))
    return turn.stages.get(stage, 0.0)


@styled
def time_per_token(
    summary: RunSummary, intervals: Mapping[str, Mapping[str, Interval | None]], frame: Frame
) -> str | None:
    """Milliseconds per committed token of each arm, stacked by stage."""
    arms = timed(summary)
    if not arms:
        return None
    stages = {name: stage_ms(arm) for name, arm in arms.items()}
    longest = max(sum(parts.values()) for parts in stages.values())
    figure = new_figure(frame.width, 0.9 + (0.48 if frame.narrow else 0.36) * len(arms))
    axes = figure.subplots()
    for row, (name, parts) in enumerate(stages.items()):
        _stacked(axes, row, parts, longest)
        total, ends = sum(parts.values()), intervals.get(name, {}).get(TOTAL)
        if ends is not None:
            axes.plot(
                ends, (row + WHISKER, row + WHISKER), color=colour("ink"), linewidth=1.2, marker="|"
            )
        reach = max(total, ends[1] if ends else 0.0)
        axes.annotate(f"{total:.2f} ms", (reach, row), (5, 0), textcoords="offset points",
                      va="center", fontweight="bold")  # fmt: skip
        longest = max(longest, reach)
    limit = (1.3 if frame.narrow else 1.13) * longest
    _horizontal(axes, list(arms), limit, "milliseconds per committed token", frame)
    patches = [
        Patch(facecolor=colour(f"stage-{stage}"), edgecolor=colour("ink"), linewidth=0.5,
              hatch=hatch, label=stage)
        for stage, hatch in zip(STAGES, HATCHES, strict=True)
    ]  # fmt: skip
    figure.legend(handles=patches, loc="outside upper left", ncols=3 if frame.narrow else 6)
    told = "; ".join(
        f"{name}: " + ", ".join(f"{stage} {ms:.2f} ms" for stage, ms in parts.items())
        for name, parts in stages.items()
    )
    return to_svg(figure, f"time-{frame.name}", "Time per committed token by stage", told)


def _stacked(axes: Axes, row: int, parts: Mapping[str, float], longest: float) -> None:
    """One bar of an arm's stages; the hatch tells them apart where colours do not."""
    left = 0.0
    for stage, hatch in zip(STAGES, HATCHES, strict=True):
        ms = parts[stage]
        if ms > 0:
            axes.barh(row, ms, 0.6, left=left, color=colour(f"stage-{stage}"), hatch=hatch,
                      edgecolor=colour("ink"), linewidth=0.5)  # fmt: skip
        if ms > LABEL_SHARE * longest:
            axes.annotate(f"{ms:.2f}", (left + ms / 2, row), ha="center", va="center",
                          fontsize=SMALL, bbox=_ground(stage, hatch))  # fmt: skip
        left += ms


def _ground(stage: str, hatch: str) -> dict[str, object] | None:
    """A number on a hatch needs its ground plain."""
    if not hatch:
        return None
    return {"facecolor": colour(f"stage-{stage}"), "edgecolor": "none", "pad": 1.0}


def _horizontal(axes: Axes, names: Sequence[str], limit: float, label: str, frame: Frame) -> None:
    """The manners of a bar chart that is read from the top; names above the bars of a phone."""
    axes.set_xlim(0, limit)
    axes.set_ylim(len(names) - 0.5, -0.9 if frame.narrow else -0.5)
    axes.set_xlabel(label)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.tick_params(axis="y", length=0, labelcolor=colour("ink"))
    axes.set_yticks(range(len(names)), [""] * len(names) if frame.narrow else list(names))
    for row, name in enumerate(names if frame.narrow else ()):
        axes.annotate(name, (0, row - 0.34), (1, 1), textcoords="offset points", va="bottom")


@styled
def speed(summary: RunSummary, frame: Frame) -> str | None:
    """Tokens per second of each arm."""
    arms = {name: arm for name, arm in summary.arms.items() if arm.tokens_per_s}
    if not arms:
        return None
    figure = new_figure(frame.width, 0.5 + (0.48 if frame.narrow else 0.33) * len(arms))
    axes = figure.subplots()
    most = max(arm.tokens_per_s for arm in arms.values())
    for row, (name, arm) in enumerate(arms.items()):
        shade = colour(arm_colour_name(name, list(summary.arms)))
        axes.barh(row, arm.tokens_per_s, 0.5 if frame.narrow else 0.66, color=shade)
        ends = interval([(part.tokens, part.seconds) for part in arm.parts])
        if ends is not None:
            axes.plot(
                ends, (row + WHISKER, row + WHISKER), color=colour("ink"), linewidth=1.2, marker="|"
            )
        reach = max(arm.tokens_per_s, ends[1] if ends else 0.0)
        axes.annotate(_speed_note(summary, name, frame), (reach, row), (5, 0),
                      textcoords="offset points", va="center")  # fmt: skip
        most = max(most, reach)
    limit = (1.5 if frame.narrow else 1.36) * most
    _horizontal(axes, list(arms), limit, "tokens per second", frame)
    told = "; ".join(f"{name}: {arm.tokens_per_s:.1f}" for name, arm in arms.items())
    return to_svg(figure, f"speed-{frame.name}", "Tokens per second", told)


def _speed_note(summary: RunSummary, name: str, frame: Frame) -> str:
    pace = f"{summary.arms[name].tokens_per_s:.1f}"
    ratio = speed_ratio(summary.arms, name, "plain")
    if ratio is None or name == "plain":
        return pace
    if frame.narrow:
        return f"{pace} · {times(Ratio(ratio.value))}"
    return f"{pace} · {times(ratio)} plain"
