"""The report of a run: its table and what is said of it."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import msgspec
import pytest
from rich.console import Console

from cosched.errors import RunFolderError
from cosched.records import RoundRow
from cosched.report.events import ArmEvents, read_events
from cosched.report.findings import comparisons, headline
from cosched.report.html import write_report
from cosched.report.remarks import lossless_line, text_remark
from cosched.report.table import arm_cells, load_summary, summary_table
from cosched.report.timeline import tokens_at
from tests.helpers.made_up_runs import ALL_ARMS, make_run, page_of

if TYPE_CHECKING:
    from pathlib import Path


# --- the summary and its table ---------------------------------------------------------------


def test_summary_round_trip(tmp_path: Path) -> None:
    """What a run wrote is what a reader gets."""
    written = make_run(tmp_path / "run")
    assert load_summary(tmp_path / "run") == written


def test_non_finite_loss_is_readable(tmp_path: Path) -> None:
    """JSON has no NaN: msgspec writes null, which must not make the whole run unreadable."""
    make_run(tmp_path / "run", losses=(0.5, float("nan")))
    first, second = load_summary(tmp_path / "run").arms["adapted"].losses
    assert first == 0.5
    assert second is None
    assert len(read_events(tmp_path / "run").of("adapted").losses) == 1
    write_report(tmp_path / "run")


@pytest.mark.parametrize("content", [None, b"", b'{"run": {', b'{"run": {}}', b"[1]", b"\xff"])
def test_missing_or_damaged_summary(tmp_path: Path, content: bytes | None) -> None:
    """A folder without a whole summary is one message that names it, never a traceback."""
    if content is not None:
        (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=re.escape(str(tmp_path))):
        load_summary(tmp_path)
    with pytest.raises(RunFolderError, match="no such folder"):
        load_summary(tmp_path / "absent")


@pytest.mark.parametrize(("width", "num_columns"), [(124, 11), (100, 8), (80, 6), (60, 5)])
def test_table_rows(tmp_path: Path, width: int, num_columns: int) -> None:
    """One row per arm in the order of the run; a narrow terminal loses columns, never digits."""
    summary = make_run(tmp_path / "run")
    output = io.StringIO()
    Console(file=output, width=width, color_system=None).print(summary_table(summary))
    printed = output.getvalue().replace("\u00a0", "").replace("\u00d7 (", "\u00d7(")
    rows = [line.split() for line in printed.splitlines() if line.startswith(ALL_ARMS, 1)]
    assert [row[0] for row in rows] == list(ALL_ARMS)
    assert {len(row) for row in rows if row[0] == "plain"} == {num_columns}
    assert "\u2026" not in printed, "a cell was cut off"
    assert ("no room here for: tokens" in " ".join(printed.split())) == (num_columns < 11)


def test_table_ratios(tmp_path: Path) -> None:
    """Speeds are divided by those of plain and of frozen; requests are counted for the texts."""
    summary = make_run(tmp_path / "run")
    cells = arm_cells(summary, "adapted")
    assert cells[5] == "180.0"
    assert cells[6].startswith("1.80\u00d7 (1.7")
    assert cells[7].startswith("1.20\u00d7 (1.1")
    assert cells[-1] == "0 of 3"
    assert arm_cells(summary, "plain")[-1] == "ref."


def test_table_without_plain_or_text_to_compare(tmp_path: Path) -> None:
    """A ratio to an arm that is not there, or a comparison of sampled texts, is a dash."""
    summary = make_run(tmp_path / "run", ("frozen", "adapted"))
    summary.arms["adapted"].lossless_mismatches = None
    cells = arm_cells(summary, "adapted")
    assert (cells[6], cells[7][:5], cells[-1]) == ("\u2013", "1.20\u00d7", "\u2013")


# --- what is said of it ----------------------------------------------------------------------


def test_headline_has_the_numbers(tmp_path: Path) -> None:
    """The first sentence has both acceptance lengths and the ratio of speeds of matched arms."""
    summary = make_run(tmp_path / "run")
    ours, theirs = summary.arms["adapted"].tau, summary.arms["frozen"].tau
    page = page_of(tmp_path / "run")
    sentence = headline(summary, read_events(tmp_path / "run")).sentence
    assert f"adapted committed {ours:.2f}" in sentence
    assert f"frozen {theirs:.2f}" in sentence
    assert f"(+{100 * (ours / theirs - 1):.0f}\u00a0%" in sentence
    assert re.search(r"1\.20\u00d7 \(1\.1\d\u20131\.2\d\) the speed of frozen", sentence)
    assert sentence in page


@pytest.mark.parametrize(
    ("adapted", "window", "verdict", "words"),
    [
        (180.0, 160.0, "paid", "Adaptation paid"),
        (150.5, 140.0, "even", "broke even"),
        (120.0, 140.0, "lost", "did not pay"),
        (180.0, 200.0, "lost", "frozen+window, which costs nothing, is faster"),
    ],
)
def test_verdict(tmp_path: Path, adapted: float, window: float, verdict: str, words: str) -> None:
    """Adaptation pays only if it beats its control and the fastest arm that learns nothing."""
    speeds = {"plain": 100.0, "frozen": 150.0, "frozen+window": window, "adapted": adapted}
    summary = make_run(tmp_path / "run", ALL_ARMS[:4], speeds=speeds)
    found = headline(summary, read_events(tmp_path / "run"))
    assert found.verdict == verdict
    assert words in found.sentence


def test_time_that_learning_cost_and_saved(tmp_path: Path) -> None:
    """Cost of learning per token minus what it saved is the difference of the arms' times."""
    speeds = {"frozen": 100.0, "adapted": 80.0}
    summary = make_run(tmp_path / "run", ("frozen", "adapted"), speeds=speeds)
    details = " ".join(headline(summary, read_events(tmp_path / "run")).details)
    # 12.5 ms a token, a fifth of it learning; the other 10 ms are what frozen takes.
    assert "learning cost 2.50 ms (2.50 training, 0.00 publishing)" in details
    assert "everything else became 0.00 ms" in details


def test_replay_says_nothing_about_speed(tmp_path: Path) -> None:
    """In a replayed trace the target costs nothing, so no sentence may compare speeds."""
    summary = make_run(tmp_path / "run", engine="trace")
    found = headline(summary, read_events(tmp_path / "run"))
    assert found.verdict == "none"
    assert "speed of" not in " ".join([found.sentence, *found.details])


def test_gain_error_is_none_for_one_request_and_zero_for_equal_ones(tmp_path: Path) -> None:
    """The jackknife needs two requests; requests that all gain the same leave no uncertainty."""
    one = make_run(tmp_path / "one", num_requests=1)
    assert comparisons(one, read_events(tmp_path / "one"))[0].gain_error is None
    events = read_events(tmp_path / "one")
    for arm in events.arms.values():
        arm.rows += [msgspec.structs.replace(row, request_id="twin") for row in arm.rows]
    assert comparisons(one, events)[0].gain_error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"text": "sampled", "lossless_reference": None}, "the arms say different texts"),
        ({"text": "document"}, "\u03a3 min(p, q)"),
        ({"text": "document", "acceptance": "target_only"}, "best token stands with probability p"),
        ({"engine": "trace", "text": "sampled"}, "min(1, q/p)"),
        (
            {"engine": "trace", "text": "sampled", "acceptance": "target_only"},
            "while it is the target's own choice",
        ),
        ({"text": "greedy"}, "Lossless: every arm said exactly the same tokens as plain"),
    ],
)
def test_text_kind_is_explained(tmp_path: Path, run: dict[str, object], words: str) -> None:
    """The page says where the text came from and what that allows to conclude."""
    summary = make_run(tmp_path / "run", **run)
    assert words in text_remark(summary) + lossless_line(summary)


def test_mismatches_are_named(tmp_path: Path) -> None:
    """An arm that said something else than the reference is named with its number of requests."""
    summary = make_run(tmp_path / "run")
    summary.arms["adapted"].lossless_mismatches = 2
    line = lossless_line(summary)
    assert line.startswith("Not the same tokens as plain: adapted in 2 of 3 requests.")


# --- events in the order of time -------------------------------------------------------------


def test_rows_of_a_batch_are_interleaved() -> None:
    """Requests of a batch run side by side although the file has them one after the other."""
    rows = [RoundRow(name, place, 0, 1, 1, 2) for name in "abc" for place in range(2)]
    order = [(row.request_id, row.position) for row in ArmEvents(rows).in_time(2)]
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("c", 0), ("c", 1)]
    files = {"a": "one", "b": "two", "c": "two"}  # of several files a group is of one
    found = ArmEvents(rows, sources=files).in_time(2)
    order = [(row.request_id, row.position) for row in found]
    assert order == [("a", 0), ("a", 1), ("b", 0), ("c", 0), ("b", 1), ("c", 1)]


def test_publications_lie_where_their_version_begins() -> None:
    """A publication stands at the tokens committed before the first row of its version."""
    rows = [
        RoundRow("a", 0, 0, 1, 1, 2),
        RoundRow("a", 2, 0, 1, 1, 2),
        RoundRow("a", 4, 1, 1, 0, 1),
    ]
    arm = ArmEvents(rows=rows, losses=[(1, 0.1), (2, 0.1)], publications=[(2, 1)])
    assert tokens_at(arm, [1, 2], max_batch=1) == [2.0, 4.0]
