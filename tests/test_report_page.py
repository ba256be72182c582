"""The page of a report: its figures, and that it needs nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import msgspec
import pytest

from cosched.report.sheets import units_line
from cosched.report.svg import PALETTE, arm_mark, line_style
from cosched.report.table import arm_cells, load_summary, summary_table
from cosched.telemetry.metrics import RunSummary
from tests.helpers.made_up_runs import ALL_ARMS, make_run, page_of, summary_of

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
    """Five figures, wide and narrow, each with a title and a description of its numbers for who cannot

    see it.
    """
    summary = make_run(tmp_path / "run")
    page = page_of(tmp_path / "run")
    assert page.count("<svg") == page.count('role="img"') == 10
    for name in ("tau", "depth", "time", "speed", "learning-draft"):
        assert f'<title id="{name}-wide-title">' in page
        assert f'<title id="{name}-narrow-title">' in page
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


@pytest.mark.slow
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
    assert page.count("<svg") == 8
    assert "config.yaml is missing" in page
    assert "What was said" not in page


def test_page_says_how_sure_its_figures_are(tmp_path: Path) -> None:
    """With six requests every span, place and stage has an interval, and the page says over what; with
    fewer they are of these texts, and a run that has none says so."""
    make_run(tmp_path / "many", num_requests=7)
    page = page_of(tmp_path / "many")
    for caption in ("by generated position", "by place in the drafted block", "token by stage"):
        table = page[page.index(f"{caption}, with 95 %") :].partition("</table>")[0]
        assert re.search(r"<td>[\d.]+(\xa0%)? \([\d.]+\u2013[\d.]+\)</td>", table), caption
    assert "a jackknife over requests: they speak of texts like these" in page
    one = make_run(tmp_path / "one", ("adapted",), num_requests=1)
    assert "those speak of these texts only" in units_line(one)
    assert "There are no intervals" in units_line(RunSummary(run={}, arms={}))


def test_guard_is_drawn_with_its_bound(tmp_path: Path) -> None:
    """Evidence of the guard's verdicts, as shares of what they take; a guard that has none draws none."""
    make_run(tmp_path / "run")
    page = page_of(tmp_path / "run")
    assert "evidence at last 1.20 of its bound that learning is better, -0.60" in page
    assert ">bound<" in page
    events = tmp_path / "run/events.jsonl"
    events.write_text(
        re.sub(r'"evidence_\w+":[-\d.]+', '"evidence_better":null', events.read_text())
    )
    assert ">bound<" not in page_of(tmp_path / "run")


@pytest.mark.slow
def test_memory_and_command_are_told(tmp_path: Path) -> None:
    """What the run was asked with, escaped, and what it was reckoned to take, without what takes nothing."""
    sizes = [("draft weights", 3 << 20, "<all>"), ("Adam moments", 0, ""), ("target", None, "")]
    make_run(tmp_path / "run", memory=sizes)
    page = page_of(tmp_path / "run")
    assert "cosched run -c &lt;made_up&gt;.yaml" in page
    table = page[page.index("Memory of the arm that takes most") :].partition("</table>")[0]
    assert "<td>3 MiB</td><td>&lt;all&gt;</td>" in table
    assert "Adam moments" not in table
    make_run(tmp_path / "run", memory={"of": "another version"})
    assert "What took memory?" not in page_of(tmp_path / "run")


def test_no_text_and_no_line_is_faint() -> None:
    """WCAG 2: text has a contrast of 4.5 to its ground, lines and areas that carry meaning 3, in both
    themes; numbers on a bar are text."""
    for theme, card in ((0, "#ffffff"), (1, "#1c2128")):
        shades = {name: both[theme] for name, both in PALETTE.items()}
        for name, shade in shades.items():
            if name in ("ink", "muted"):
                assert contrast(shade, card) >= 4.5, name
            elif name.startswith("stage-"):
                assert contrast(shades["ink"], shade) >= 4.5, name
            elif name != "grid":
                assert contrast(shade, card) >= 3, name


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(shade: str) -> float:
    parts = [int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_arms_can_be_told_apart_without_colour() -> None:
    """Marker and dash together are different for all arms of a draft."""
    arms = [*ALL_ARMS, "tts", "osd", "tts+window", "osd+window"]
    looks = [(arm_mark(arm, arms), line_style(arm)) for arm in arms]
    assert len(set(looks)) == len(arms)
