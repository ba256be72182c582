"""What each arm did on each of several files: a draft gains on one kind of text, and not on another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from cosched.report.intervals import cut
from cosched.report.table import COLUMNS, MEASURED, measured_cells
from cosched.telemetry.metrics import TextFigures, round_figures

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cosched.telemetry.metrics import RequestLog, RunSummary, Turn

TEXT_COLUMNS = (("text", "the file that it comes from"), COLUMNS[0], *MEASURED)


def figures_by_text(
    logs: Mapping[str, Sequence[RequestLog]],
    turns: Mapping[str, Sequence[Turn]],
    of_groups: Sequence[str | None],
) -> dict[str, dict[str, TextFigures]]:
    """Of every arm, its figures on each text; none where there is one.

    ``of_groups`` says of which text each group of requests is, the first of which is number 1.
    """
    found: dict[str, dict[str, TextFigures]] = {arm: {} for arm in logs}
    for text in dict.fromkeys(source for source in of_groups if source is not None):
        own = {
            arm: [turn for turn in some if of_groups[turn.group - 1] == text]
            for arm, some in turns.items()
        }
        parts, _ = cut(own)
        for arm, some in logs.items():
            figures = round_figures(log for log in some if log.source == text)
            seconds = sum(turn.seconds for turn in own[arm])
            found[arm][text] = TextFigures(
                tokens=figures.tokens,
                rounds=figures.rounds,
                requests=figures.requests,
                tau=figures.tau,
                tau_novel=figures.tau_novel,
                tokens_per_s=figures.tokens / seconds if seconds else 0.0,
                parts=parts[arm],
            )
    return found


def text_rows(summary: RunSummary) -> list[list[str]]:
    """The cells under ``TEXT_COLUMNS``, text by text; none where there is one text."""
    texts = dict.fromkeys(text for arm in summary.arms.values() for text in arm.by_text)
    return [
        [text, name, *measured_cells(arms, name)]
        for text in texts
        for arms in [{name: arm.by_text[text] for name, arm in summary.arms.items()}]
        for name in arms
    ]


def text_table(summary: RunSummary) -> Table | None:
    """The rows for a terminal, each text above its arms, which leaves figures the room that they need.

    None where there is one text.
    """
    rows = text_rows(summary)
    if not rows:
        return None
    table = Table(
        title="by text",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, (header, _) in enumerate(TEXT_COLUMNS[1:]):
        justify = "right" if index else "left"
        table.add_column(header, justify=justify, vertical="bottom", no_wrap=True)
    before = None
    for text, arm, *cells in rows:
        if text != before:
            if before is not None:
                table.add_section()
            table.add_row(Text(text))
        table.add_row(Text(arm, "bold"), *cells)
        before = text
    return table
