"""``report.html``: one file that needs nothing else, no network and no script."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from cosched.report import plots, sheets, spending, timeline
from cosched.report.by_text import TEXT_COLUMNS, text_rows
from cosched.report.events import RunEvents, read_events
from cosched.report.findings import headline, is_replay
from cosched.report.memory import in_units
from cosched.report.remarks import (
    cautions,
    decay_lines,
    interval_line,
    length_lines,
    lossless_line,
    repetition_lines,
    text_remark,
)
from cosched.report.svg import NARROW, PALETTE, WIDE, arm_colour_name
from cosched.report.table import COLUMNS, DASH, arm_cells, load_summary
from cosched.telemetry.run_folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from cosched.report.shares import Interval
    from cosched.report.svg import Frame
    from cosched.telemetry.metrics import RunSummary

SAMPLE_CHARACTERS = 600
# Control characters are no legal HTML, and a model may say any of them: show their pictures.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure, drawn twice."""

    wide: Markup
    narrow: Markup


@dataclass(frozen=True, slots=True)
class Sample:
    """The beginning of what one or several arms said to a request."""

    arms: list[str]
    request: str
    text: str
    cut: bool


def write_report(run_dir: Path) -> Path:
    """Render ``report.html`` of a finished or interrupted run; returns its path.

    Raises:
        RunFolderError: the folder has no readable summary, or the page cannot be written.
    """
    summary = load_summary(run_dir)
    events = read_events(run_dir)
    intervals = spending.stage_intervals(summary, events)
    page = template("report.html.j2").render(
        palette=PALETTE,
        run=summary.run,
        drafted=_drafted(summary.run),
        found=headline(summary, events),
        cautions=cautions(summary, (run_dir / "trace").is_dir(), events.num_damaged),
        columns=COLUMNS,
        text_columns=TEXT_COLUMNS,
        by_text=_by_text(summary),
        rows=[_row(summary, name) for name in summary.arms],
        figures=_figures(summary, intervals),
        learning=_learning(summary, events),
        judged=any(events.of(name).evidence for name in summary.arms),
        tau_sheet=sheets.tau_sheet(summary),
        places_sheet=sheets.places_sheet(summary),
        time_sheet=sheets.time_sheet(summary, intervals),
        memory_sheet=sheets.memory_sheet(summary),
        units=sheets.units_line(summary),
        command=summary.run.get("command"),
        replay=is_replay(summary),
        decay=decay_lines(summary),
        lengths=length_lines(summary),
        repetition=repetition_lines(summary),
        lossless=lossless_line(summary),
        intervals=interval_line(summary),
        text_remark=text_remark(summary),
        samples=_samples(summary, events),
        facts=_facts(summary),
        peak=in_units(max((arm.peak_bytes for arm in summary.arms.values()), default=0)),
        config=_config(run_dir / "config.yaml"),
    )
    return RunFolder(run_dir).write("report.html", page)


def template(name: str) -> jinja2.Template:
    """A page of this folder; all of them include ``style.css.j2``, which wants ``palette``."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cosched", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _row(summary: RunSummary, name: str) -> dict[str, Any]:
    return {
        "colour": arm_colour_name(name, list(summary.arms)),
        "cells": arm_cells(summary, name),
    }


def _by_text(summary: RunSummary) -> dict[str, list[list[str]]]:
    found: dict[str, list[list[str]]] = {}
    for text, *cells in text_rows(summary):
        found.setdefault(text, []).append(cells)
    return found


def drawn(draw: Callable[[Frame], str | None]) -> Drawing | None:
    """A figure for a wide page and for a narrow one."""
    wide, narrow = draw(WIDE), draw(NARROW)
    # Matplotlib escapes the text in its drawings.
    return Drawing(Markup(wide), Markup(narrow)) if wide and narrow else None


def _figures(
    summary: RunSummary, intervals: Mapping[str, Mapping[str, Interval | None]]
) -> dict[str, Drawing | None]:
    return {
        "tau": drawn(lambda frame: plots.tau_by_position(summary, frame)),
        "depth": drawn(lambda frame: plots.position_acceptance(summary, frame)),
        "time": drawn(lambda frame: spending.time_per_token(summary, intervals, frame)),
        "speed": drawn(lambda frame: spending.speed(summary, frame)),
    }


def _learning(summary: RunSummary, events: RunEvents) -> list[tuple[str | None, Drawing]]:
    """One figure for each draft that learnt."""
    found: list[tuple[str | None, Drawing]] = []
    for draft in timeline.learners(summary, events):

        def draw(frame: Frame, draft: str | None = draft) -> str | None:
            return timeline.adaptation(summary, events, draft, frame)

        if drawing := drawn(draw):
            found.append((draft, drawing))
    return found


def _samples(summary: RunSummary, events: RunEvents) -> list[Sample]:
    """The same request of every arm if they have one in common; equal beginnings stand once."""
    texts = {name: events.of(name).texts for name in summary.arms if events.of(name).texts}
    if not texts:
        return []
    first = next(iter(texts.values()))
    common = [request for request in first if all(request in said for said in texts.values())]
    samples: list[Sample] = []
    for name, said in texts.items():
        request = common[0] if common else next(iter(said))
        shown = said[request][:SAMPLE_CHARACTERS].translate(VISIBLE)
        same = [one for one in samples if (one.request, one.text) == (request, shown)]
        if same:
            same[0].arms.append(name)
        else:
            cut = len(said[request]) > SAMPLE_CHARACTERS
            samples.append(Sample([name], request, shown, cut))
    return samples


def _facts(summary: RunSummary) -> list[tuple[str, str]]:
    run = summary.run
    peak = max((arm.peak_bytes for arm in summary.arms.values()), default=0)
    given = {
        **_drafts(run),
        "engine": run.get("engine"),
        "text": run.get("text"),
        "temperature": run.get("temperature"),
        "acceptance": None if run.get("text") == "greedy" else run.get("acceptance"),
        "device": run.get("device"),
        "CPU threads": run.get("num_threads"),
        "machine": run.get("machine"),
        "cosched": run.get("cosched"),
        "Python": run.get("python"),
        "torch": run.get("torch"),
        "seconds in all": f"{run['seconds']:.1f}" if "seconds" in run else None,
        "finished at": run.get("finished_at"),
        "peak memory of the process": in_units(peak) if peak else None,
    }
    return [(name, DASH if value is None else str(value)) for name, value in given.items()]


def _drafts(run: dict[str, Any]) -> dict[str, Any]:
    """What drafted; of a run without ``drafts`` also that nothing is known of it."""
    named: dict[str, dict[str, Any]] = run.get("drafts", {})
    facts: dict[str, Any] = {}
    if "drafter" in run or not named:
        facts = {
            "drafter": run.get("drafter"),
            "tokens drafted per round": _length(run),
            "window of the +window arms": run.get("window") or "none",
        }
    for name, one in named.items():
        facts[f"draft {name}"] = (
            f"{one['drafter']}, {_length(one)} tokens drafted per round, window "
            f"{one['window'] or 'none'}"
        )
    return facts


def _drafted(run: dict[str, Any]) -> str:
    """The same in half a line."""
    named: dict[str, dict[str, Any]] = run.get("drafts", {})
    found = [f"{name} {_length(one)}" for name, one in named.items()]
    if found and "drafter" in run:
        found.insert(0, f"{run['drafter']} {_length(run)}")
    if found:
        return f"tokens drafted per round: {', '.join(found)}"
    return f"{run.get('drafter', 'draft')}, {_length(run) or '?'} tokens drafted per round"


def _length(one: dict[str, Any]) -> str | None:
    """How many tokens a draft drafts; of a run that does not say, None."""
    number, kind = one.get("num_draft_tokens"), one.get("length", "fixed")
    if number is None:
        return None
    return str(number) if kind == "fixed" else f"up to {number} ({kind})"


def _config(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").translate(VISIBLE)
    except OSError:
        return None
