"""The numbers behind the figures, as tables: for who cannot see a figure, or wants its digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from cosched.report.memory import in_units
from cosched.report.plots import drafting
from cosched.report.remarks import span
from cosched.report.shares import interval
from cosched.report.spending import STAGES, TOTAL, stage_ms, timed
from cosched.report.table import DASH, percent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cosched.report.shares import Interval
    from cosched.telemetry.metrics import ArmSummary, RunSummary
    from cosched.telemetry.parts import Parts


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table of a page; the first ``num_names`` columns of a row say what it is of.

    One of ``words`` has cells that may go on in another line.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_names: int = 1
    words: bool = False


def tau_sheet(summary: RunSummary) -> Sheet:
    """Acceptance length by position."""
    rows = [
        [
            name,
            span(bucket),
            f"{bucket.rounds:,}",
            _within(bucket.tau, interval(bucket.parts.pairs, least=1)),
            f"{bucket.rounds_novel:,}",
            DASH
            if bucket.tau_novel is None
            else _within(bucket.tau_novel, interval(bucket.parts_novel.pairs, least=1)),
        ]
        for name, arm in drafting(summary).items()
        for bucket in arm.tau_by_position
    ]
    header = ("arm", "positions", "rounds", "τ", "novel rounds", "τ novel")
    return Sheet("Acceptance length by generated position, with 95 % intervals", header, rows, 2)


def places_sheet(summary: RunSummary) -> Sheet:
    """Acceptance by place in the block."""
    rows: list[list[str]] = []
    for name, arm in drafting(summary).items():
        for place, share in enumerate(arm.position_acceptance):
            known = (
                interval(arm.position_parts[place].pairs, most=1) if arm.position_parts else None
            )
            ends = "" if known is None else f" ({_percents(known)})"
            rows.append([name, str(place + 1), percent(share) + ends])
    header = ("arm", "place", "accepted, if reached")
    return Sheet("Acceptance by place in the drafted block, with 95 % intervals", header, rows, 2)


def time_sheet(
    summary: RunSummary, intervals: Mapping[str, Mapping[str, Interval | None]]
) -> Sheet:
    """Milliseconds per token by stage."""
    rows: list[list[str]] = []
    for name, arm in timed(summary).items():
        stages = stage_ms(arm)
        whole = {TOTAL: sum(stages.values())} | stages
        known = intervals.get(name, {})
        rows.append([name, *(_within(ms, known.get(stage)) for stage, ms in whole.items())])
    header = ("arm", TOTAL, *STAGES)
    return Sheet("Milliseconds per committed token by stage, with 95 % intervals", header, rows)


def memory_sheet(summary: RunSummary) -> Sheet | None:
    """What the arm that takes most was reckoned to take, without what takes nothing."""
    try:
        found = msgspec.convert(summary.run.get("memory"), list[tuple[str, int | None, str]])
    except msgspec.ValidationError:
        return None  # a run that did not say, or that said other things
    rows = [[what, DASH if n is None else in_units(n), why] for what, n, why in found if n != 0]
    caption = "Memory of the arm that takes most, reckoned before the run (cosched check)"
    return Sheet(caption, ("what", "takes", "because"), rows, words=True)


def units_line(summary: RunSummary) -> str:
    """What the intervals of acceptance are over."""
    kinds = {parts.of for arm in drafting(summary).values() for parts in _parts_of(arm)} - {None}
    if not kinds:
        return "There are no intervals: they take six requests, or stretches of 48 rounds of each span."
    if kinds == {"requests"}:
        return "Intervals are 95 %, a jackknife over requests: they speak of texts like these."
    return (
        "Intervals are 95 %, a jackknife over requests where there are six, else over stretches of "
        "the text: those speak of these texts only."
    )


def _parts_of(arm: ArmSummary) -> list[Parts]:
    by_position = [p for bucket in arm.tau_by_position for p in (bucket.parts, bucket.parts_novel)]
    return [*arm.position_parts, *by_position]


def _within(value: float, ends: Interval | None) -> str:
    return f"{value:.2f}" if ends is None else f"{value:.2f} ({ends[0]:.2f}{DASH}{ends[1]:.2f})"


def _percents(ends: Interval) -> str:
    return f"{100 * ends[0]:.0f}{DASH}{100 * ends[1]:.0f}"
