"""Figures on pages and the results that they come from."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cosched.bench.figures import Figure
from cosched.bench.machine import Machine
from cosched.bench.render import render
from cosched.bench.result import RunRecord, SuiteResult, write_result
from cosched.bench.rows import Row
from cosched.bench.suite import View
from cosched.bench.tables import shown, table_of
from cosched.errors import ConfigError, RunFolderError
from tests.helpers.cli import run_cli
from tests.helpers.paths import ROOT

MACHINE = Machine(
    cpu="Abacus 9", flags=[], cores=2, memory_bytes=1, device=None, python="3", packages={}
)
VIEWS = {
    "table": {"figures": ["tau", "of_plain"]},
    "worth": {
        "cell": "{frozen: of_plain} → {adapted: of_plain}",
        "names": {"eagle3": "EAGLE-3", "far": "far text"},
        "only": {"draft": ["pard", "eagle3"]},
    },
}


def row(text: str, draft: str, arm: str, ratio: float, low: float) -> Row:
    figures = {
        "tau": Figure(value=1.5, unit="tokens a round", low=1.25, high=1.75),
        "of_plain": Figure(value=ratio, unit="times", low=low, high=2 * ratio),
    }
    return Row({"text": text, "draft": draft, "arm": arm}, figures)


ROWS = [
    row(text, draft, arm, ratio, low)
    for text in ("near", "far")
    for draft in ("eagle3", "pard")
    for arm, ratio, low in (("frozen", 0.9, 0.8), ("adapted", 1.2, 1.1))
]


def result(**changes: object) -> SuiteResult:
    run = RunRecord(
        name="r", seed=0, seconds=1.0, finished_at="2026-11-30T10:00:00", commit="abc", dirty=False,
        machine=MACHINE,
    )  # fmt: skip
    whole = SuiteResult(
        name="own", about="?", command="cosched bench own", commit="abc", dirty=False,
        date="2026-11-30", machine=MACHINE, seconds=2.0, suite={"views": VIEWS}, overrides=[],
        runs=[run, msgspec.structs.replace(run, seed=1)], rows=ROWS,
    )  # fmt: skip
    return msgspec.structs.replace(whole, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_result(result(), tmp_path / "benchmarks" / "results", "own.json")
    return tmp_path


def test_the_pages_of_the_repository_say_what_their_results_say() -> None:
    """A figure that is quoted and not measured, or was measured again, is found here: `cosched bench render`."""
    assert render(ROOT, check=True) == []


def test_a_block_is_filled_once_and_then_stays(folder: Path) -> None:
    """What is rendered is what the check expects; text around it is left alone."""
    page = folder / "README.md"
    page.write_text("Before.\n\n<!-- bench: own table -->\nold\n<!-- /bench -->\n\nBehind.\n")
    assert render(folder, check=True) == ["README.md: own table"]
    assert "old" in page.read_text()
    assert render(folder) == ["README.md: own table"]
    text = page.read_text()
    assert text.startswith("Before.\n\n<!-- bench: own table -->\n\n| text | draft | arm | τ |")
    assert text.endswith("<!-- /bench -->\n\nBehind.\n")
    assert "| near | eagle3 | adapted | 1.50 (1.25\u20131.75) | **1.20 (1.10\u20132.40)** |" in text
    assert "`cosched bench own`: 2026-11-30, commit abc, 2 cores of an Abacus 9, 2 seeds" in text
    assert render(folder, check=True) == []


def test_a_figure_in_a_sentence(folder: Path) -> None:
    """It is named by as many labels as it takes; too few or unknown ones are refused."""
    page = folder / "docs" / "page.md"
    page.parent.mkdir()
    mark = "<!-- bench: own figure=tau text=far draft=pard arm=frozen{} -->?<!-- /bench -->"
    page.write_text(f"τ is {mark.format('')}, {mark.format(' interval=yes')}.")
    render(folder)
    assert "-->1.50<!-- /bench -->, " in page.read_text()
    assert "-->1.50 (1.25\u20131.75)<!-- /bench -->." in page.read_text()
    page.write_text(mark.format(" digits=1"))
    render(folder)
    assert "-->1.5<!-- /bench -->" in page.read_text()
    page.write_text("<!-- bench: own figure=tau text=far -->?<!-- /bench -->")
    with pytest.raises(ConfigError, match=r"page.md: .*4 places have that figure"):
        render(folder)


def test_a_grid_fills_its_cells_from_two_arms(folder: Path) -> None:
    """Drafts by texts, in the order and under the names that the view gives; a sure gain is bold."""
    view = msgspec.convert(VIEWS["worth"], View)
    cells = table_of(result(), view)
    assert cells.headers == ["", "near", "far text"]
    assert [line[0] for line in cells.lines] == ["pard", "EAGLE-3"]
    assert cells.lines[0][1] == "0.90 → **1.20**"


def test_a_grid_may_have_a_line_for_each_arm(folder: Path) -> None:
    """Its cells are of that arm, with intervals where they are asked for."""
    view = View(down="arm", cell="{tau}", only={"draft": ("eagle3",), "arm": ("frozen",)})
    plain = table_of(result(), view)
    asked = table_of(result(), msgspec.structs.replace(view, intervals=True))
    assert [line[0] for line in plain.lines] == ["frozen"]
    assert "(" in asked.lines[0][1]
    assert asked.lines[0][1].startswith(f"{plain.lines[0][1]} (")


def test_a_cell_of_no_arm_is_refused() -> None:
    """A page of dashes was right by the check of pages."""
    with pytest.raises(ConfigError, match="names no arm"):
        table_of(result(), View(cell="{tau}"))


def test_a_label_of_several_words_is_quoted(folder: Path) -> None:
    """As arms of a script may be."""
    own = [Row({"arm": "one of two"}, {"tau": Figure(value=1.5, unit="tokens a round")})]
    write_result(result(rows=own), folder / "benchmarks" / "results", "own.json")
    page = folder / "README.md"
    page.write_text('<!-- bench: own figure=tau arm="one of two" -->?<!-- /bench -->')
    render(folder)
    assert "-->1.50<!--" in page.read_text()
    page.write_text('<!-- bench: own figure=tau arm="one -->?<!-- /bench -->')
    with pytest.raises(ConfigError, match="closing quotation"):
        render(folder)


def test_what_a_page_shows_as_code_is_no_block(folder: Path) -> None:
    """The documentation shows how a block is written."""
    text = "```\n<!-- bench: gone table -->\n<!-- /bench -->\n```\n`<!-- bench: gone -->x<!-- /bench -->`\n"
    (folder / "README.md").write_text(text)
    assert render(folder) == []
    assert (folder / "README.md").read_text() == text


@pytest.mark.parametrize(
    ("block", "error", "says"),
    [
        ("gone table", RunFolderError, r"no .*gone.json.*--keep"),
        ("own other", ConfigError, r"no view 'other'.*table, worth"),
    ],
)
def test_a_block_without_a_result_or_a_view_is_refused(
    folder: Path, block: str, error: type[Exception], says: str
) -> None:
    """Else a figure could stand there that nobody has measured."""
    (folder / "README.md").write_text(f"<!-- bench: {block} -->\n<!-- /bench -->")
    with pytest.raises(error, match=says):
        render(folder, check=True)


def test_a_view_of_figures_that_there_are_not_is_refused() -> None:
    """A renamed figure would be an empty column."""
    with pytest.raises(ConfigError, match=r"no figure 'tao'; there are of_plain, tau"):
        table_of(result(), View(figures=("tao",)))


def test_a_script_s_table_has_a_line_for_each_figure() -> None:
    """Its figures have nothing in common but their form."""
    own = [Row({}, {"a / b": Figure(value=1.5, unit="times"), "c": Figure(value=0.5, unit="ms")})]
    cells = table_of(result(rows=own), View())
    assert cells.lines == [["a / b", "1.50", "times"], ["c", "0.5", "ms"]]


def test_figures_have_the_digits_of_their_unit() -> None:
    """More would be noise, fewer would hide what was measured."""
    assert shown(Figure(value=12345.0, unit="tokens")) == "12,345"
    assert (
        shown(Figure(value=56.13, unit="tokens/s", low=50.2, high=62.0)) == "56.1 (50.2\u201362.0)"
    )
    assert shown(Figure(value=0.553, unit="share")) == "55\u00a0%"
    times = [shown(Figure(value=ms, unit="ms")) for ms in (0.0042, 41.375, 1234.5)]
    assert times == ["0.0042", "41.4", "1,234"]


def test_the_command_fills_and_checks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what a test of a page calls, and fails as one."""
    monkeypatch.chdir(folder)
    (folder / "README.md").write_text("<!-- bench: own table -->\n<!-- /bench -->")
    code, out, err = run_cli("bench", "render", "--check")
    assert (code, "README.md: own table" in out) == (1, True), err
    assert run_cli("bench", "render")[0] == 0
    assert run_cli("bench", "render", "--check")[0] == 0
