"""Whole runs on the tiny world: the command line, traces, documents."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cosched.engines.embedded.target import Target
from cosched.runs.experiment import TURN_TOKENS, Experiment
from cosched.settings.load import load_config
from tests.helpers.cli import cosched_process, run_cli
from tests.helpers.experiments import events_of, new_folder, rounds_of, turns_of, write

if TYPE_CHECKING:
    from collections.abc import Iterable


@pytest.mark.slow
def test_a_run_leaves_its_folder(tmp_path: Path, settings: dict) -> None:
    """Four arms, equal greedy tokens, and every file that design.md names."""
    settings["workload"]["max_new_tokens"] = 24
    code, out, err = run_cli("run", "-c", write(tmp_path, settings))
    assert code == 0, err
    assert "report.html" in out
    folder = tmp_path / "runs" / "one"
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["arms"]) == settings["arms"]
    for arm in summary["arms"].values():
        assert arm["lossless_mismatches"] == 0
        assert arm["tokens"] == summary["arms"]["plain"]["tokens"]
    adapted = summary["arms"]["adapted"]
    assert adapted["versions"] == adapted["updates"] > 0
    assert adapted["tau"] > 1
    kinds = [json.loads(line)["kind"] for line in events_of(folder)]
    expected = {"round", "request", "decision", "update", "verdict", "publication"}
    assert expected <= set(kinds)
    for arm, name in ((a, a) for a in settings["arms"]):
        rounds = summary["arms"][arm]["rounds"]
        found = sum(
            (e := json.loads(line))["kind"] == "round" and e["arm"] == name
            for line in events_of(folder)
        )
        assert found == rounds
    assert (folder / "report.html").stat().st_size > 10_000
    assert summary["run"]["command"].startswith("cosched run -c ")
    assert all(takes > 0 for what, takes, _ in summary["run"]["memory"] if what == "draft weights")
    for turn in turns_of(folder):
        assert sum(turn["stages"].values()) <= turn["seconds"]
    again = load_config(folder / "config.yaml")  # fully resolved, and readable as an experiment
    assert again.run.name == "one"
    saved = folder / "checkpoints" / "adapted" / "model.safetensors"
    assert saved.exists()
    code, out, _ = run_cli("report", folder)
    assert code == 0
    assert "adapted" in out


def in_a_row(said: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """How many tokens each arm has decoded before another one went on."""
    return [
        (arm, sum(number for _, number in turn))
        for arm, turn in itertools.groupby(said, key=lambda one: one[0])
    ]


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.long)])
def test_arms_take_turns(tmp_path: Path, settings: dict, background: bool) -> None:
    """A few tokens at a time, and more where an update would go on in the time of the others."""
    settings["arms"] = ["frozen", "adapted"]
    settings["adapt"]["trainer"] = {"background": background}
    config, said = load_config(write(tmp_path, settings)), []
    folder = new_folder(config)
    summary = Experiment(config).run(folder, lambda arm, number: said.append((arm, number)))
    turns, kept = in_a_row(said), turns_of(folder.path)
    longest = config.drafter_settings.num_draft_tokens + TURN_TOKENS
    assert all(turn["tokens"] <= (48 if background else longest) for turn in kept)
    assert in_a_row((turn["arm"], turn["tokens"]) for turn in kept) == turns
    groups = [turn["group"] for turn in kept]
    assert groups == sorted(groups)
    for group in (1, 2):  # an arm that had a longer turn may be through its answer before the other
        arms = [turn["arm"] for turn in kept if turn["group"] == group]
        together = 2 * min(map(arms.count, settings["arms"]))
        assert together
        assert arms[:together] == settings["arms"] * (together // 2)
    if background:
        assert len(turns) <= 8
    else:
        assert len(turns) == 8
        assert groups == [1] * 4 + [2] * 4
    for name, arm in summary.arms.items():
        seconds = sum(turn["seconds"] for turn in kept if turn["arm"] == name)
        assert seconds == pytest.approx(arm.seconds["wall"], rel=0.05)


@pytest.mark.slow
@pytest.mark.long
def test_a_saved_draft_is_a_draft(tmp_path: Path, settings: dict) -> None:
    """The adapted checkpoint loads as a drafter, and drafts better on the same text than before."""
    settings["arms"] = ["frozen", "adapted"]
    settings["workload"]["max_new_tokens"] = 96
    config = load_config(write(tmp_path, settings))
    folder = new_folder(config)
    first = Experiment(config).run(folder)
    settings["drafter"]["path"] = str(folder.path / "checkpoints" / "adapted")
    settings["run"]["name"] = "two"
    settings["arms"] = ["frozen"]
    config = load_config(write(tmp_path, settings))
    second = Experiment(config).run(new_folder(config))
    assert second.arms["frozen"].tau > first.arms["frozen"].tau


@pytest.mark.slow
@pytest.mark.parametrize("computed", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("max_batch", [1, 2])
def test_trace_equals_engine(
    tmp_path: Path,
    settings: dict,
    max_batch: int,
    computed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A frozen greedy arm has the same rounds from the trace as from the engine, one by one, whether
    the target's rows are read or computed again."""
    settings["arms"] = ["frozen", "frozen+window"]
    settings["engine"]["max_batch"] = max_batch
    settings["workload"] |= {"max_new_tokens": 96, "max_prompts": 2}
    config = load_config(write(tmp_path, settings))
    folder = new_folder(config)
    live = Experiment(config, record=True).run(folder)
    settings["engine"] |= {"kind": "trace", "trace": str(folder.path / "trace")}
    settings["engine"]["live"] = computed
    settings["run"]["name"] = "replayed"
    config = load_config(write(tmp_path, settings))
    replayed_folder = new_folder(config)
    passes: list[object] = []

    def forward(*arguments: Any, **named: Any) -> Any:
        passes.append(arguments)
        return compute(*arguments, **named)

    compute = Target.forward
    monkeypatch.setattr(Target, "forward", forward)
    replayed = Experiment(config).run(replayed_folder)
    assert live.arms["frozen"].rounds < live.arms["frozen"].tokens  # drafts were accepted
    for arm in settings["arms"]:
        assert replayed.arms[arm].tau == live.arms[arm].tau
        rows = [rounds_of(f.path, arm) for f in (folder, replayed_folder)]
        assert rows[0] == rows[1]
    assert (len(passes) >= replayed.arms["frozen"].rounds / max_batch) is computed


@pytest.mark.slow
def test_parts_are_what_the_arms_did(tmp_path: Path, settings: dict) -> None:
    """Six requests make six parts: the same text in each arm, and all of it."""
    settings["arms"] = ["plain", "frozen"]
    settings["workload"] |= {"max_new_tokens": 8, "max_prompts": 6}
    config = load_config(write(tmp_path, settings))
    folder = new_folder(config)
    summary = Experiment(config).run(folder)
    assert summary.run["parts_of"] == "requests"
    for arm in summary.arms.values():
        assert [part.tokens for part in arm.parts] == [8] * 6
        wall = arm.seconds["wall"]
        assert sum(part.seconds for part in arm.parts) == pytest.approx(wall, rel=0.05)


@pytest.mark.slow
@pytest.mark.long
def test_a_sampled_trace_agrees_with_sampling_in_the_mean(tmp_path: Path, settings: dict) -> None:
    """Acceptance on recorded samples estimates that of sampling: within four standard errors."""
    settings["arms"] = ["frozen"]
    settings["workload"] |= {"max_new_tokens": 256, "max_prompts": 6, "temperature": 1.0}
    config = load_config(write(tmp_path, settings))
    folder = new_folder(config)
    live = Experiment(config, record=True).run(folder).arms["frozen"]
    settings["engine"] |= {"kind": "trace", "trace": str(folder.path / "trace")}
    settings["run"]["name"] = "replayed"
    config = load_config(write(tmp_path, settings))
    replayed = Experiment(config).run(new_folder(config))
    standard_error = 1.1 * (2 / live.rounds) ** 0.5  # K = 3 commits 1 to 4 tokens a round
    assert abs(replayed.arms["frozen"].tau - live.tau) < 4 * standard_error


@pytest.mark.slow
def test_documents_are_forced(tmp_path: Path, settings: dict, tinyworld: Path) -> None:
    """With documents every arm commits the document, whatever it drafts."""
    settings["workload"] = {
        "documents": str(tinyworld / "documents" / "code.jsonl"),
        "prompt_tokens": 16,
        "max_new_tokens": 80,
        "max_prompts": 2,
    }
    config = load_config(write(tmp_path, settings))
    summary = Experiment(config).run(new_folder(config))
    assert {arm.tokens for arm in summary.arms.values()} == {160}
    assert all(arm.lossless_mismatches == 0 for arm in summary.arms.values())
    assert summary.arms["frozen"].tau > 1.2
    assert summary.arms["plain"].tau == 1


@pytest.mark.slow
@pytest.mark.long
def test_no_compiler_is_needed(tmp_path: Path, settings: dict) -> None:
    """A run that trains goes through where neither a compiler nor ninja is on the path."""
    settings["arms"] = ["plain", "adapted"]
    settings["workload"]["max_new_tokens"] = 24
    empty = tmp_path / "bin"
    empty.mkdir()
    extensions = tmp_path / "extensions"
    process = cosched_process(
        ["run", "-c", str(write(tmp_path, settings))],
        PATH=str(empty),
        TORCH_EXTENSIONS_DIR=str(extensions),
    )
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    summary = json.loads((tmp_path / "runs" / "one" / "summary.json").read_text())
    assert summary["arms"]["adapted"]["updates"] > 0
    assert not extensions.exists()  # nothing was compiled, nothing was cached


@pytest.mark.slow
@pytest.mark.parametrize(("max_tokens", "dropped"), [(32, True), (64, False)])
def test_requests_without_room_in_the_buffer_are_in_the_summary(
    tmp_path: Path, settings: dict, max_tokens: int, dropped: bool
) -> None:
    """A buffer of 32 rows holds one of two requests: the arm that learns says so, and the report."""
    settings["arms"] = ["frozen", "adapted"]
    settings["engine"]["max_batch"] = 2
    settings["workload"]["max_new_tokens"] = 16
    settings["adapt"]["memory"] = {"max_tokens": max_tokens}
    code, _, err = run_cli("run", "-c", write(tmp_path, settings))
    assert code == 0, err
    folder = tmp_path / "runs" / "one"
    arms = json.loads((folder / "summary.json").read_text())["arms"]
    assert arms["frozen"]["evicted_requests"] == 0
    assert (arms["adapted"]["evicted_requests"] > 0) is dropped
    assert (
        "the replay buffer dropped a request" in (folder / "report.html").read_text()
    ) is dropped
