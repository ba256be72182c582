"""``cosched report``: the report of a run written again, or several runs beside each other."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  typer reads the annotation
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cosched.errors import ConfigError

if TYPE_CHECKING:
    from cosched.telemetry.metrics import RunSummary

COMPARISON = "comparison.html"


def report(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR…", help="Folders that cosched run has written.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help=f"Where a comparison goes; else {COMPARISON} of the first."
        ),
    ] = None,
) -> None:
    """Write the report of a run again, and print its table; of several runs, compare them.

    A comparison says which settings differ and holds every run against the first: acceptance length
    and speed of the same arms, with paired intervals where the runs said the same texts.
    """
    console = Console()
    if len(run_dirs) > 1:
        path = _compare(run_dirs, output, console)
    elif output is not None:
        raise ConfigError("--output: the report of one run goes into its folder")
    else:
        from cosched.report.html import write_report
        from cosched.report.table import load_summary

        print_tables(load_summary(run_dirs[0]), console)
        path = write_report(run_dirs[0])
    console.print(f"report: [bold]{path}[/]", soft_wrap=True)


def _compare(run_dirs: list[Path], output: Path | None, console: Console) -> Path:
    from cosched.report.compare import findings, lines, load_runs, text_line
    from cosched.report.compare_page import page, tables
    from cosched.telemetry.run_folder import RunFolder

    runs = load_runs(run_dirs)
    found = lines(runs)
    for table in tables(runs, found):
        console.print(table)
    for line in (*findings(found, runs[0].label), text_line(found)):
        console.print(line, markup=False, highlight=False)
    output = output or run_dirs[0] / COMPARISON
    return RunFolder(output.parent).write(output.name, page(runs, found))


def print_tables(summary: RunSummary, console: Console) -> None:
    """What a terminal shows of a run."""
    from cosched.report.by_text import text_table
    from cosched.report.table import summary_table

    console.print(summary_table(summary))
    if (by_text := text_table(summary)) is not None:
        console.print(by_text)
