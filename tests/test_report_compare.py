"""``cosched report A B``: settings that differ, and the same arms with paired intervals."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from cosched.errors import RunFolderError
from cosched.report.compare import differing_settings, findings, lines, load_runs, text_line
from cosched.report.compare_page import page
from tests.helpers.cli import run_cli
from tests.helpers.made_up_runs import make_run

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = "run: {name: NAME, dir: x}\nengine: {max_batch: 1}\nadapt: {trainer: {lr: LR}}\n"


def two_runs(folder: Path, slower: float = 150.0, num_requests: int = 7) -> list[Path]:
    """The second has another learning rate, and an adapted arm that is slower."""
    made = []
    for name, speed, rate in (("one", 180.0, "0.001"), ("two", slower, "0.002")):
        speeds = {"frozen": 150.0, "adapted": speed}
        make_run(folder / name, ("frozen", "adapted"), num_requests, speeds)
        text = CONFIG.replace("NAME", name).replace("LR", rate)
        (folder / name / "config.yaml").write_text(text)
        made.append(folder / name)
    return made


def change_events(folder: Path, change: dict[str, str]) -> None:
    path = folder / "events.jsonl"
    text = path.read_text()
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def test_only_settings_that_differ_are_told(tmp_path: Path) -> None:
    """By their dotted keys, with the value in each run; a run's own name is no setting of what it did."""
    runs = load_runs(two_runs(tmp_path))
    assert [run.label for run in runs] == ["one", "two"]
    assert differing_settings(runs) == [["adapt.trainer.lr", "0.001", "0.002"]]


def test_same_texts_are_paired(tmp_path: Path) -> None:
    """Equal rounds of equal texts are equal for sure; another speed has an interval, and is found."""
    runs = load_runs(two_runs(tmp_path))
    found = {(line.arm, line.run): line for line in lines(runs)}
    assert found["adapted", "one"].tau_ratio is None
    second = found["adapted", "two"]
    assert second.same_texts
    assert second.tau_ratio is not None
    assert (second.tau_ratio.low, second.tau_ratio.high) == (1.0, 1.0)
    assert second.speed_ratio is not None
    assert second.speed_ratio.value == pytest.approx(150 / 180)
    assert second.speed_ratio.below
    said = findings(lines(runs), "one")
    assert said == [f"adapted in two: tokens/s {second.cells()[-1]} that of one."]
    assert "paired" in text_line(lines(runs))


def test_other_texts_have_no_interval(tmp_path: Path) -> None:
    """What one run said otherwise is not the same text: a ratio is given, and nothing claimed of it."""
    made = two_runs(tmp_path)
    change_events(made[1], {"more \\u001b[0m p3": "other words"})
    found = {(line.arm, line.run): line for line in lines(load_runs(made))}
    second = found["adapted", "two"]
    assert second.same_texts is False
    assert second.speed_ratio is not None
    assert not second.speed_ratio.known
    assert second.tau_ratio is not None
    assert not second.tau_ratio.known
    assert findings(list(found.values()), "one")[0].startswith("No arm differs")


def test_requests_in_another_order_are_still_paired(tmp_path: Path) -> None:
    """Seeds shuffle prompts: turns go to the request that they are of, not to its place in the run."""
    made = two_runs(tmp_path)
    for folder in made:  # p0 is hard for both: paired with another it would make the interval wide
        path = folder / "events.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()]
        for event in events:
            if event["kind"] == "turn" and event["turn"]["group"] == 1:
                event["turn"]["seconds"] *= 9
        path.write_text("".join(json.dumps(event) + "\n" for event in events))
    for event in events:  # p0 comes last
        if event["kind"] == "turn":
            event["turn"]["group"] = (event["turn"]["group"] - 2) % 7 + 1
    late = [e for e in events if e.get("id") == "p0" or e.get("row", {}).get("request_id") == "p0"]
    others = [event for event in events if event not in late]
    path.write_text("".join(json.dumps(event) + "\n" for event in [*others, *late]))
    in_order = {line.arm: line for line in lines(load_runs(made)) if line.run == "two"}
    assert in_order["adapted"].same_texts
    assert in_order["adapted"].speed_ratio is not None
    low, high = in_order["adapted"].speed_ratio.low, in_order["adapted"].speed_ratio.high
    assert low is not None
    assert high is not None
    assert high - low < 0.1


def test_a_replay_has_no_speed_to_compare(tmp_path: Path) -> None:
    """Where no target ran, tokens a second are not those of a server."""
    made = two_runs(tmp_path)
    for folder in made:
        path = folder / "summary.json"
        path.write_text(path.read_text().replace('"embedded"', '"trace"'))
    assert all(line.speed_ratio is None for line in lines(load_runs(made)))


def test_a_run_is_not_compared_with_itself(tmp_path: Path) -> None:
    """Nor is a folder that is no run: one message, and it names the folder."""
    one, _ = two_runs(tmp_path)
    with pytest.raises(RunFolderError, match="every folder once"):
        load_runs([one, one / ".." / "one"])
    with pytest.raises(RunFolderError, match="no such folder"):
        load_runs([one, tmp_path / "absent"])


def test_the_command_fits_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is longer, no figure is cut, and the page stands where it says."""
    monkeypatch.setenv("COLUMNS", "80")
    one, two = two_runs(tmp_path)
    target = tmp_path / "side.html"
    code, out, err = run_cli("report", one, two, "--output", target)
    assert code == 0, err
    printed = [line for line in out.splitlines() if not line.startswith("report:")]
    assert max(map(len, printed)) <= 80
    assert "\u2026" not in out
    assert re.search(r"two +\d\.\d\d +1\.00. \(1\.00.1\.00\) +150\.0 +0\.83.", out)
    assert "adapt.trainer.lr" in target.read_text().replace("<wbr>", "")
    code, _, err = run_cli("report", one, "--output", target)
    assert code == 2
    assert "--output" in err


def test_the_page_needs_nothing_else_and_escapes_names(tmp_path: Path) -> None:
    """One file without scripts; what a folder or a setting is called is never markup."""
    made = two_runs(tmp_path)
    (made[1] / "config.yaml").write_text("adapt: {loss: <b>bold</b>}\n")
    runs = load_runs(made)
    text = page(runs, lines(runs))
    assert "<script" not in text
    assert "<b>bold" not in text
    assert "&lt;b&gt;bold" in text
    assert not re.search(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
