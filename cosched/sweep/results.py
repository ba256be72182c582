"""What a sweep found: figures of every cell, and what each setting did.

A gain is of acceptance length on novel positions, pooled, over the frozen draft on the same recorded
text. A *point* is one way of setting the axes; its gain is the mean over the texts.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

import msgspec

from cosched.errors import RunFolderError
from cosched.report.table import load_summary
from cosched.settings.arms import FROZEN, WINDOW_SUFFIX
from cosched.sweep.plan import AxisInfo

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from cosched.sweep.plan import Cell, Plan
    from cosched.telemetry.metrics import ArmSummary

AS_SET = "all as set"


class CellResult(msgspec.Struct, frozen=True, kw_only=True):
    """One cell in ``sweep.json``; gains are relative, over the frozen arms of the same text.

    ``gain`` counts all positions; None where there is no such position or no such arm.
    """

    id: str
    drafter: str
    text: str
    arm: str
    settings: dict[str, str]
    tokens: int
    tau: float
    tau_novel: float | None
    tau_frozen_novel: float | None
    gain: float
    gain_novel: float | None
    gain_novel_over_window: float | None
    repeat_fraction: float
    updates: int
    versions: int
    update_seconds: float
    seconds: float


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A cell that has no figures, and why."""

    id: str
    drafter: str
    text: str
    settings: dict[str, str]
    message: str


class SweepSummary(msgspec.Struct, kw_only=True):
    """``sweep.json``; fields are added, never renamed."""

    sweep: dict[str, Any]
    axes: dict[str, AxisInfo]
    cells: list[CellResult]
    failures: list[Failure]
    num_missing: int


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A way of setting the axes, over all texts."""

    drafter: str
    settings: dict[str, str]
    gain: float
    cells: list[CellResult]

    @property
    def label(self) -> str:
        return named(self.settings)

    @property
    def by_text(self) -> dict[str, float]:
        return {c.text: c.gain_novel for c in self.cells if c.gain_novel is not None}


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """What one label of an axis brought: mean gain of the points that have it, and how many.

    ``difference`` is to the points around which it varies, or in a grid to the mean of its axis.
    """

    drafter: str
    axis: str
    label: str
    gain: float
    difference: float
    num_points: int
    is_default: bool


def named(settings: dict[str, str]) -> str:
    """The settings of a point in words."""
    return ", ".join(f"{axis}={label}" for axis, label in settings.items()) or AS_SET


def finished(run_dir: Path) -> bool:
    """Whether a folder has the figures of a whole run."""
    try:
        return not load_summary(run_dir).run.get("interrupted")
    except RunFolderError:
        return False


def read_cell(plan: Plan, cell: Cell) -> CellResult:
    """The figures of a cell that was run, against those of its control.

    Raises:
        RunFolderError: one of them is missing or damaged.
    """
    arm = load_summary(cell.job.config.run_folder).arms[cell.arm]
    controls = load_summary(plan.controls[cell.control].config.run_folder).arms
    frozen, window = controls[FROZEN], controls.get(FROZEN + WINDOW_SUFFIX)
    return CellResult(
        id=cell.job.id,
        drafter=cell.drafter,
        text=cell.text,
        arm=cell.arm,
        settings=cell.settings,
        tokens=arm.tokens,
        tau=arm.tau,
        tau_novel=arm.tau_novel,
        tau_frozen_novel=frozen.tau_novel,
        gain=arm.tau / frozen.tau - 1 if frozen.tau else 0.0,
        gain_novel=_gain_novel(arm, frozen),
        gain_novel_over_window=_gain_novel(arm, window),
        repeat_fraction=arm.repeat_fraction,
        updates=arm.updates,
        versions=arm.versions,
        update_seconds=arm.seconds.get("update", 0.0) + arm.seconds.get("publish", 0.0),
        seconds=arm.seconds.get("wall", 0.0),
    )


def _gain_novel(arm: ArmSummary, control: ArmSummary | None) -> float | None:
    if control is None or not arm.tau_novel or not control.tau_novel:
        return None
    return arm.tau_novel / control.tau_novel - 1


def points(summary: SweepSummary) -> dict[str, list[Point]]:
    """By drafter, the best first; a cell without novel positions has no say."""
    groups: dict[tuple[str, str], list[CellResult]] = {}
    for cell in summary.cells:
        if cell.gain_novel is not None:
            groups.setdefault((cell.drafter, named(cell.settings)), []).append(cell)
    found: dict[str, list[Point]] = {}
    for (drafter, _), cells in groups.items():
        gain = fmean(cell.gain_novel or 0.0 for cell in cells)
        point = Point(drafter=drafter, settings=cells[0].settings, gain=gain, cells=cells)
        found.setdefault(drafter, []).append(point)
    return {d: sorted(some, key=lambda p: -p.gain) for d, some in found.items()}


def texts_of(some: Iterable[Point]) -> list[str]:
    """Names of the texts that points were judged on, in order."""
    return list(dict.fromkeys(cell.text for point in some for cell in point.cells))


def effects(summary: SweepSummary) -> list[Effect]:
    """What each label of each axis brought, by drafter, in the order of the file."""
    found: list[Effect] = []
    grid = {name for name, axis in summary.axes.items() if axis.default is None}
    for drafter, some in points(summary).items():
        centre = [p for p in some if p.settings.keys() <= grid]
        for name, axis in summary.axes.items():
            having = {
                label: [p for p in some if p.settings.get(name) == label] for label in axis.labels
            }
            if axis.default is not None:
                having = {axis.default: centre, **{n: p for n, p in having.items() if p}}
                against = centre
            else:
                against = [point for with_label in having.values() for point in with_label]
            having = {label: with_label for label, with_label in having.items() if with_label}
            if len(having) < 2:
                continue  # nothing varied for this drafter: no effect to speak of
            middle = fmean(point.gain for point in against) if against else 0.0
            found += [
                Effect(
                    drafter=drafter,
                    axis=name,
                    label=label,
                    gain=(gain := fmean(point.gain for point in with_label)),
                    difference=gain - middle,
                    num_points=len(with_label),
                    is_default=label == axis.default,
                )
                for label, with_label in having.items()
            ]
    return found
