"""The report of a run: its table, its figures, and the page."""

from __future__ import annotations

import io
import random
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import msgspec
import pytest
from rich.console import Console

from cosched.errors import RunFolderError
from cosched.records import RoundRow
from cosched.report.events import ArmEvents, read_events
from cosched.report.findings import comparisons, headline
from cosched.report.html import write_report
from cosched.report.intervals import cut
from cosched.report.remarks import lossless_line, text_remark
from cosched.report.table import arm_cells, load_summary, summary_table
from cosched.report.timeline import tokens_at
from cosched.telemetry.metrics import ArmSummary, RequestLog, RunSummary, Turn, round_figures

if TYPE_CHECKING:
    from pathlib import Path

ALL_ARMS = ("plain", "frozen", "frozen+window", "adapted", "adapted+window")
CHANCE = {"frozen": 0.4, "frozen+window": 0.5, "adapted": 0.7, "adapted+window": 0.7}
TEXT = "<script>alert('x')</script> & more \x1b[0m"
SPEEDS = {"plain": 100.0, "frozen": 150.0, "frozen+window": 160.0, "adapted": 180.0}


class EventLines(list[bytes]):
    """``events.jsonl`` in the making."""

    def emit(self, kind: str, **fields: object) -> None:
        self.append(msgspec.json.encode({"kind": kind, **fields}) + b"\n")


def make_run(
    folder: Path,
    arms: tuple[str, ...] = ALL_ARMS,
    num_requests: int = 3,
    speeds: dict[str, float] | None = None,
    losses: tuple[float, ...] = (0.5, 0.4),
    **run: object,
) -> RunSummary:
    """A run folder with made-up rounds whose figures are computed as in a real run."""
    folder.mkdir(exist_ok=True)
    log = EventLines()
    found: dict[str, ArmSummary] = {}
    for arm in arms:
        logs = [_request(arm, f"p{number}", log) for number in range(num_requests)]
        if arm.startswith("adapted"):
            for version, loss in enumerate(losses, 1):
                _update(log, arm, version, loss)
        found[arm] = _summary(arm, logs, (speeds or SPEEDS).get(arm, 90.0), losses)
    parts, parts_of = cut({arm: _turns(arm, one, num_requests) for arm, one in found.items()})
    for arm, own in parts.items():
        found[arm].parts = own
    (folder / "events.jsonl").write_bytes(b"".join(log))
    facts = {"name": "made up", "engine": "embedded", "text": "greedy", "interrupted": False}
    facts |= {"lossless_reference": arms[0] if arms else None, "seconds": 1.5}
    facts |= {"parts_of": parts_of}
    summary = RunSummary(run=facts | run, arms=found)
    (folder / "summary.json").write_bytes(msgspec.json.encode(summary))
    (folder / "config.yaml").write_text("run:\n  name: <made up>\nengine:\n  max_batch: 1\n")
    return summary


def _request(arm: str, name: str, log: EventLines) -> RequestLog:
    rng = random.Random(f"{arm} {name}")
    drafted = 0 if arm == "plain" else 3
    tokens = [rng.randrange(1000) for _ in range(150)]
    rows: list[RoundRow] = []
    position = 1
    while position < len(tokens):
        accepted = 0
        while accepted < drafted and rng.random() < CHANCE[arm]:
            accepted += 1
        committed = min(accepted + 1, len(tokens) - position)
        version = min(2, position // 50) if arm.startswith("adapted") else 0
        rows.append(RoundRow(name, position, version, drafted, accepted, committed))
        position += committed
    for row in rows:
        log.emit("round", arm=arm, row=row)
    log.emit("request", arm=arm, id=name, text=TEXT + f" {name}")
    return RequestLog(name, [1, 2, 3], tokens, rows)


def _update(log: EventLines, arm: str, version: int, loss: float) -> None:
    log.emit("update", arm=arm, round=10 * version, result={"losses": [loss, loss / 2]})
    log.emit("verdict", arm=arm, round=10 * version, verdict={"action": "publish", "reason": ""})
    log.emit("publication", arm=arm, round=10 * version, version={"version": version})


def _summary(
    arm: str, logs: list[RequestLog], speed: float, losses: tuple[float, ...]
) -> ArmSummary:
    figures = round_figures(logs)
    adapted = arm.startswith("adapted")
    wall = figures.tokens / speed
    seconds = {
        "prefill": 0.05,
        "draft": 0.1,
        "verify": 0.6,
        "update": 0.2 * adapted,
        "publish": 0.0,
    }
    seconds = {stage: share * wall for stage, share in seconds.items()} | {"wall": wall}
    return ArmSummary(
        **msgspec.structs.asdict(figures),
        tokens_per_s=speed if figures.tokens else 0.0,
        seconds=seconds,
        lossless_mismatches=0,
        versions=2 * adapted,
        updates=2 * adapted,
        skipped_steps=0,
        losses=list(losses) if adapted else [],
        peak_bytes=1 << 20,
    )


def _turns(arm: str, summary: ArmSummary, num_requests: int) -> list[Turn]:
    """Ten of each request, not all equally fast; together they take the arm's wall time."""
    rng = random.Random(arm)
    shares = [rng.uniform(0.98, 1.02) for _ in range(10 * num_requests)]
    seconds = summary.seconds["wall"] / sum(shares)
    return [Turn(turn // 10, 15, share * seconds) for turn, share in enumerate(shares)]


def page_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


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


# --- the page --------------------------------------------------------------------------------


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
    empty = _summary("adapted", [], 1.0, ())
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


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"text": "sampled", "lossless_reference": None}, "the arms say different texts"),
        ({"text": "document"}, "\u03a3 min(p, q)"),
        ({"engine": "trace", "text": "sampled"}, "min(1, q/p)"),
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
