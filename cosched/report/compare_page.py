"""A comparison of runs, as a page and for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from cosched.report.compare import (
    HEADER,
    NOVEL,
    differing_facts,
    differing_settings,
    findings,
    shared_arms,
    text_line,
)
from cosched.report.html import drawn, template
from cosched.report.plots import Look, all_panels, draw_lines, legend, position_ticks, tau_points
from cosched.report.remarks import span
from cosched.report.sheets import Sheet
from cosched.report.svg import (
    PALETTE,
    SPARE,
    SPARE_MARKS,
    colour,
    new_figure,
    styled,
    to_svg,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.report.compare import Line, Run
    from cosched.report.svg import Frame

STYLES = ("-", "--", "-.", ":")


def page(runs: Sequence[Run], found: Sequence[Line]) -> str:
    """The whole page, which needs nothing else; ``found`` is what ``lines`` says of the runs."""
    return template("compare.html.j2").render(
        palette=PALETTE,
        labels=[run.label for run in runs],
        found=findings(found, runs[0].label),
        text_line=text_line(found),
        arms=_by_arm(found),
        header=HEADER,
        settings=_sheet("setting", runs, differing_settings(runs)),
        facts=_sheet("fact", runs, differing_facts(runs)),
        figure_of_tau=drawn(lambda frame: tau_of_runs(runs, frame)),
    )


def _by_arm(found: Sequence[Line]) -> dict[str, list[Line]]:
    by_arm: dict[str, list[Line]] = {}
    for line in found:
        by_arm.setdefault(line.arm, []).append(line)
    return by_arm


def _sheet(what: str, runs: Sequence[Run], rows: Sequence[Sequence[str]]) -> Sheet | None:
    header = (what, *(run.label for run in runs))
    return Sheet(f"Each {what} that differs", header, rows, words=True) if rows else None


@styled
def tau_of_runs(runs: Sequence[Run], frame: Frame) -> str | None:
    """Acceptance length against generated position, a panel for each arm, a line for each run."""
    arms = [
        arm
        for arm in shared_arms(runs)
        if any(run.summary.arms[arm].position_acceptance for run in runs if arm in run.summary.arms)
    ]
    if not arms:
        return None
    across = 1 if frame.narrow else 2
    figure = new_figure(frame.width, 0.6 + 2.2 * -(-len(arms) // across))
    panels = all_panels(figure, len(arms), across)
    told: list[str] = []
    for number, (axes, arm) in enumerate(zip(panels, arms, strict=True)):
        having = [(place, run) for place, run in enumerate(runs) if arm in run.summary.arms]
        buckets = {place: run.summary.arms[arm].tau_by_position for place, run in having}
        starts = {span(b): b.start for some in buckets.values() for b in some}
        labels = sorted(starts, key=starts.__getitem__)
        shown = {_look(place, run): tau_points(buckets[place], labels) for place, run in having}
        draw_lines(axes, shown)
        position_ticks(axes, labels)
        axes.set_title(arm)
        if number % across == 0:
            axes.set_ylabel("tokens per round (τ)")
        told += [
            f"{arm} in {run.label}: " + ", ".join(f"{span(b)} {b.tau:.2f}" for b in buckets[place])
            for place, run in having
        ]
    legend(figure, panels, frame)
    title = "Acceptance length by generated position, run by run"
    return to_svg(figure, f"runs-{frame.name}", title, "; ".join(told))


def _look(place: int, run: Run) -> Look:
    shade = colour(SPARE[place % len(SPARE)])
    return Look(
        run.label, shade, SPARE_MARKS[place % len(SPARE_MARKS)], STYLES[place % len(STYLES)]
    )


def tables(runs: Sequence[Run], found: Sequence[Line]) -> list[Table]:
    """The same for a terminal of 80 columns: arms above their runs, settings one under another."""
    shown = [number for number, name in enumerate(HEADER) if name != NOVEL]
    measured = _table("the same arms", ("run", *(HEADER[number] for number in shown)))
    for arm, some in _by_arm(found).items():
        measured.add_section()
        measured.add_row(Text(arm, "bold"))
        for line in some:
            cells = line.cells()
            measured.add_row(Text(line.run), *(cells[number] for number in shown))
    differing = _table("settings that differ", ("setting", "run", "value"), right=False)
    for key, *values in differing_settings(runs):
        differing.add_section()
        for number, (run, value) in enumerate(zip(runs, values, strict=True)):
            differing.add_row("" if number else Text(key), Text(run.label), Text(value))
    return [measured, differing]


def _table(title: str, header: Sequence[str], right: bool = True) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, name in enumerate(header):
        # What is measured is never cut; a long name or value goes on in the next line.
        table.add_column(
            name,
            justify="right" if right and index else "left",
            no_wrap=right and index > 0,
            overflow="fold",
        )
    return table
