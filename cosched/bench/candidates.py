"""How soon a guard tells text that a draft can learn from other text: what became of first candidates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from cosched.bench.figures import Figure, Row, median_of
from cosched.telemetry.run_folder import explained

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from cosched.bench.plan import BenchRun


def candidate_rows(runs: Sequence[BenchRun]) -> list[Row]:
    """Of each point of the grid and text: how many served, how many were given up, after how many rows."""
    outcomes: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for run in runs:
        found = first_candidates(_events(run.job.config.run_folder / "events.jsonl"))
        outcomes.setdefault(tuple(run.labels.items()), []).extend(found)
    return [Row(dict(labels), _figures(found)) for labels, found in outcomes.items()]


def first_candidates(events: Iterable[dict[str, Any]]) -> Iterator[int]:
    """Rows on which each request's first candidate was judged: negative if it was seen to be worse."""
    judged, open_ = 0, True
    for event in events:
        if event["kind"] == "reset":
            judged, open_ = 0, True
        verdict = event.get("verdict")
        if not open_ or verdict is None or verdict["candidate_score"] is None:
            continue
        judged += verdict["num_rows"]
        if verdict["action"] != "wait":
            open_ = False
            yield judged if verdict["action"] == "publish" else -judged


def _figures(outcomes: Sequence[int]) -> dict[str, Figure]:
    served = [rows for rows in outcomes if rows > 0]
    given_up = [-rows for rows in outcomes if rows < 0]
    figures = {
        "served": Figure(value=len(served), unit="count"),
        "given_up": Figure(value=len(given_up), unit="count"),
    }
    for name, rows in {"rows_to_serve": served, "rows_to_give_up": given_up}.items():
        if rows:
            figures[name] = median_of(rows, "rows")
    return figures


def _events(path: Path) -> Iterator[dict[str, Any]]:
    with explained(path, "read"):
        lines = path.read_bytes().splitlines()
    yield from map(msgspec.json.decode, lines)
