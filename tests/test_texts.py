"""A workload of several files: what requests are called, and figures by file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from cosched.engines.embedded.target import Target
from cosched.errors import ConfigError, WorkloadError
from cosched.report.by_text import figures_by_text, text_rows
from cosched.report.html import write_report
from cosched.report.table import load_summary
from cosched.runs.experiment import Experiment
from cosched.settings.load import check_paths, load_config, resolved
from cosched.settings.sections import WorkloadSettings
from cosched.telemetry.metrics import RequestLog, Turn
from cosched.telemetry.run_folder import RunFolder
from cosched.workload.requests import load_requests
from tests.helpers.cli import run_cli
from tests.helpers.paths import TINYWORLD


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """Two files with the same ids, as lines that have none are called by their numbers."""
    names = []
    for name, words in (("code", "def f(a):\n    return a\n"), ("manuals", "Das ist ein Satz. ")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": words * (20 + n)}) + "\n" for n in range(3)))
        names.append(str(path))
    return names


def requests(target: Target, **settings: object) -> list:
    made = WorkloadSettings(max_new_tokens=8, prompt_tokens=16, **settings)
    return load_requests(made, target.tokenizer, target.max_length, torch.device("cpu"))


def test_ids_of_several_files_begin_with_their_names(tiny_target: Target, two: list[str]) -> None:
    """In the order of the list, the first of each file; samples are told apart as in one file."""
    found = requests(tiny_target, documents=tuple(two), max_prompts=2)
    assert [(one.id, one.source) for one in found] == [
        ("code:1", "code"),
        ("code:2", "code"),
        ("manuals:1", "manuals"),
        ("manuals:2", "manuals"),
    ]
    found = requests(tiny_target, prompts=tuple(two), max_prompts=1, samples=2)
    assert [one.id for one in found] == ["code:1", "manuals:1", "code:1#2", "manuals:1#2"]


def test_files_of_the_same_name_are_told_apart(
    tiny_target: Target, tmp_path: Path, two: list[str]
) -> None:
    (tmp_path / "other").mkdir()
    same = tmp_path / "other" / "code.jsonl"
    same.write_text(Path(two[0]).read_text())
    found = requests(tiny_target, prompts=(two[0], str(same)), max_prompts=1)
    assert [one.source for one in found] == [two[0], str(same)]


def test_one_file_in_a_list_is_one_file(tiny_target: Target, two: list[str]) -> None:
    found = requests(tiny_target, prompts=(two[0],))
    assert [(one.id, one.source) for one in found] == [("1", None), ("2", None), ("3", None)]


def settings(tmp_path: Path, files: object, **sections: object) -> Path:
    raw = {
        "run": {"name": "two", "dir": str(tmp_path / "runs")},
        "engine": {"num_threads": 1},
        "target": {"path": str(TINYWORLD / "target")},
        "drafter": {"kind": "eagle3", "path": str(TINYWORLD / "eagle3"), "num_draft_tokens": 3},
        "workload": {"documents": files, "prompt_tokens": 16, "max_new_tokens": 24},
        "arms": ["plain", "frozen"],
        **sections,
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_bad_lists_are_named(tmp_path: Path, two: list[str], tiny_target: Target) -> None:
    with pytest.raises(ConfigError, match=r"workload\.documents\[1\]: nothing at nowhere"):
        check_paths(load_config(settings(tmp_path, [two[0], "nowhere"])))
    with pytest.raises(ConfigError, match=r"workload\.documents.*stands twice; name it once"):
        load_config(settings(tmp_path, [two[0], two[0]]))
    with pytest.raises(ConfigError, match=r"workload\.documents: .*length >= 1"):
        load_config(settings(tmp_path, []))
    with pytest.raises(ConfigError, match=r"workload\.documents.*got 3"):
        load_config(settings(tmp_path, [two[0], 3]))
    with pytest.raises(ConfigError, match="give exactly one of prompts and documents"):
        load_config(settings(tmp_path, two), [f"workload.prompts={two[0]}"])
    Path(two[1]).write_text('{"no": 1}\n')
    with pytest.raises(WorkloadError, match=r"workload\.prompts\[1\]: line 1 of .*manuals\.jsonl"):
        requests(tiny_target, prompts=tuple(two))


def test_what_is_written_out_is_as_it_was_given(tmp_path: Path, two: list[str]) -> None:
    """One file stays one, so that what was run before can be resumed and is known to sweeps."""
    one, several = (load_config(settings(tmp_path, files)) for files in (two[0], two))
    assert resolved(one)["workload"]["documents"] == two[0]
    assert list(resolved(several)["workload"]["documents"]) == two


def test_figures_of_a_text_are_of_its_own_turns(two: list[str]) -> None:
    """Tokens and seconds of one file are not mixed into those of another, and add up to all."""
    logs = [RequestLog("code:1", [1], [2] * 6, [], source="code")]
    logs += [RequestLog(f"manuals:{n}", [1], [2] * 9, [], source="manuals") for n in (1, 2)]
    turns = [Turn(1, 6, 2.0), Turn(2, 9, 1.0), Turn(3, 9, 2.0)]
    found = figures_by_text({"a": logs}, {"a": turns}, ["code", "manuals", "manuals"])["a"]
    assert {text: (one.tokens, one.tokens_per_s) for text, one in found.items()} == {
        "code": (6, 3.0),
        "manuals": (18, 6.0),
    }
    assert figures_by_text({"a": logs[:1]}, {"a": turns[:1]}, [None]) == {"a": {}}


@pytest.mark.slow
def test_a_run_tells_figures_by_file(tmp_path: Path, two: list[str]) -> None:
    """In the summary, the report and on the terminal; batches are of one file, a trace keeps it."""
    path = settings(tmp_path, two)
    code, out, err = run_cli("run", "-c", path, "--record", "engine.max_batch=2")
    assert code == 0, err
    folder = tmp_path / "runs" / "two"
    summary = load_summary(folder)
    for arm in summary.arms.values():
        assert list(arm.by_text) == ["code", "manuals"]
        assert sum(one.rounds for one in arm.by_text.values()) == arm.rounds
        assert sum(one.tokens for one in arm.by_text.values()) == arm.tokens
    code_tau, manuals_tau = (one.tau for one in summary.arms["frozen"].by_text.values())
    assert code_tau != manuals_tau
    rows = text_rows(summary)
    assert [row[:2] for row in rows] == [
        [text, arm] for text in ("code", "manuals") for arm in ("plain", "frozen")
    ]
    page = (folder / "report.html").read_text()
    assert "<h2>By text</h2>" in page
    assert "by text" in out
    turns = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert {one["turn"]["group"] for one in turns if one["kind"] == "turn"} == {1, 2, 3, 4}

    trace = ["engine.kind=trace", f"engine.trace={folder / 'trace'}", "workload.max_prompts=1"]
    config = load_config(path, ["run.name=again", "arms=[frozen]", *trace])
    again = RunFolder(config.run_folder)
    again.create()
    replayed = Experiment(config).run(again).arms["frozen"]
    assert {text: one.requests for text, one in replayed.by_text.items()} == {
        "code": 1,
        "manuals": 1,
    }


def test_of_one_file_nothing_is_told_by_text(tmp_path: Path, two: list[str]) -> None:
    config = load_config(settings(tmp_path, two[0], arms=["plain"]))
    folder = RunFolder(config.run_folder)
    folder.create()
    summary = Experiment(config).run(folder)
    assert text_rows(summary) == []
    assert "By text" not in write_report(folder.path).read_text()
    assert '"source"' not in (folder.path / "events.jsonl").read_text()
