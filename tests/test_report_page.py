"""The page of a report: its figures, and that it needs nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import msgspec
import pytest

from cosched.report.table import arm_cells, load_summary, summary_table
from tests.helpers.made_up_runs import make_run, page_of, summary_of

if TYPE_CHECKING:
    from pathlib import Path


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    """No script and no reference that leaves the page; every reference inside it resolves."""
    make_run(tmp_path / "run")
    page = page_of(tmp_path / "run")
    elements = Elements(page).found
    ids = [attributes["id"] for _, attributes in elements if attributes.get("id")]
    assert len(ids) == len(set(ids)), "two figures share an id"
    assert not {tag for tag, _ in elements} & {"script", "link", "img", "iframe", "object", "base"}
    for _, attributes in elements:
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.removeprefix("#") in ids
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert "url(" not in re.sub(r"url\(#", "", page)
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?://", without_namespaces)


def test_page_has_every_figure(tmp_path: Path) -> None:
    """Five figures, each with a title and a description of its numbers for who cannot see it."""
    summary = make_run(tmp_path / "run")
    page = page_of(tmp_path / "run")
    assert page.count("<svg") == page.count('role="img"') == 5
    for name in ("tau", "depth", "time", "speed", "learning"):
        assert f'<title id="{name}-title">' in page
    assert f"{summary.arms['adapted'].position_acceptance[0]:.2f}" in page


def test_report_is_reproducible(tmp_path: Path) -> None:
    """The same folder gives the same page, byte for byte."""
    make_run(tmp_path / "run")
    assert page_of(tmp_path / "run") == page_of(tmp_path / "run")


def test_text_is_escaped(tmp_path: Path) -> None:
    """What a model says is shown, never executed; control characters do not break the page."""
    make_run(tmp_path / "run", name="<i>name</i>")
    page = page_of(tmp_path / "run")
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page
    assert "<i>name</i>" not in page
    assert "name: &lt;made up&gt;" in page
    assert "\x1b" not in page


@pytest.mark.parametrize("arms", [("plain",), ("frozen",), ("adapted",), ("plain", "adapted"), ()])
def test_any_subset_of_arms(tmp_path: Path, arms: tuple[str, ...]) -> None:
    """A run need not have every arm, nor any."""
    summary = make_run(tmp_path / "run", arms)
    page = page_of(tmp_path / "run")
    assert page.count('<span class="dot"') == len(arms)
    assert ("Acceptance length by generated position" in page) == bool({*arms} - {"plain"})
    summary_table(summary)


def test_interrupted_run(tmp_path: Path) -> None:
    """An arm that got nowhere, and a half-written last line, cost their figures and no more."""
    folder = tmp_path / "run"
    summary = make_run(folder, interrupted=True)
    empty = summary_of("adapted", [], 1.0, ())
    summary.arms["adapted"] = empty
    (folder / "summary.json").write_bytes(msgspec.json.encode(summary))
    with (folder / "events.jsonl").open("ab") as events:
        events.write('{"kind":"request","arm":"plain","id":"p9","text":"caf\u00e9'.encode()[:-1])
    page = page_of(folder)
    assert "interrupted" in page
    assert "No round was measured of: adapted." in page
    assert "1 unreadable line(s)" in page
    assert "adapted+window committed" in page, "the other pair of arms still makes the headline"
    cells = arm_cells(load_summary(folder), "adapted")
    assert cells[2:8] == ["\u2013"] * 6


def test_missing_events_and_config(tmp_path: Path) -> None:
    """The summary alone makes a report; what came from the other files is left out."""
    folder = tmp_path / "run"
    make_run(folder)
    (folder / "events.jsonl").unlink()
    (folder / "config.yaml").unlink()
    page = page_of(folder)
    assert page.count("<svg") == 4
    assert "config.yaml is missing" in page
    assert "What was said" not in page
