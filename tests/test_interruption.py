"""Runs that were interrupted: what stays, and going on from there."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch

from cosched.engines.embedded.engine import EngineSeconds
from cosched.loop.counters import Counters
from cosched.runs.experiment import Experiment
from cosched.runs.resume import ArmProgress, Progress, RunOrigin, load, save, states_of
from cosched.settings.load import load_config
from cosched.telemetry.metrics import Turn
from cosched.telemetry.run_folder import RunFolder
from tests.helpers.cli import cosched_process, heed_ctrl_c, run_cli
from tests.helpers.experiments import new_folder, rounds_of, turns_of, write

ORIGIN = RunOrigin("target", "text", {})


@pytest.mark.slow
@pytest.mark.long
def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, settings: dict) -> None:
    """SIGINT in the middle: exit code 1, and a readable summary, report and event log."""
    settings["workload"] |= {"max_new_tokens": 2000, "max_prompts": 6}
    process = cosched_process(["run", "-c", str(write(tmp_path, settings))], heed_ctrl_c)
    events = tmp_path / "runs" / "one" / "events.jsonl"
    deadline = time.monotonic() + 100
    while not events.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    summary = json.loads((tmp_path / "runs" / "one" / "summary.json").read_text())
    assert summary["run"]["interrupted"] is True
    assert sum(arm["tokens"] for arm in summary["arms"].values()) > 50
    assert (tmp_path / "runs" / "one" / "report.html").exists()
    for line in events.read_text().splitlines():
        json.loads(line)


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_run_goes_on_exactly(tmp_path: Path, settings: dict) -> None:
    """Interrupted after the first request and resumed, all arms do what they do in one go."""
    settings["workload"] |= {"max_new_tokens": 64, "max_prompts": 2}
    path = write(tmp_path, settings)
    config = load_config(path)
    whole = Experiment(load_config(path, ["run.name=whole"]))
    expected = whole.run(new_folder(whole.config))

    folder = new_folder(config)
    committed = 0

    def interrupt(_arm: str, number: int) -> None:
        nonlocal committed
        committed += number
        if committed > 4 * 64 + 40:  # in the middle of the second request
            raise KeyboardInterrupt

    cut = Experiment(config)
    assert cut.run(folder, interrupt).run["interrupted"]
    code, _, err = run_cli("run", "-c", path, "--resume", "adapt.trainer.lr=0.5")
    assert (code, "lr" in err) == (1, True), err
    code, _, err = run_cli("run", "-c", path, "--resume")
    assert code == 0, err
    resumed = json.loads((folder.path / "summary.json").read_text())
    for arm, figures in expected.arms.items():
        assert resumed["arms"][arm]["tau"] == figures.tau
        assert resumed["arms"][arm]["tokens"] == figures.tokens
        assert resumed["arms"][arm]["lossless_mismatches"] == 0
        assert rounds_of(folder.path, arm) == rounds_of(tmp_path / "runs" / "whole", arm)
        done = [
            [(turn["group"], turn["tokens"]) for turn in turns_of(path) if turn["arm"] == arm]
            for path in (folder.path, tmp_path / "runs" / "whole")
        ]
        assert done[0] == done[1], "turns before the interruption are kept, half ones are not"
    code, _, err = run_cli("run", "-c", path, "--resume")
    assert (code, "nothing to resume" in err) == (1, True)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_cut_in_its_first_request_can_be_resumed(tmp_path: Path, settings: dict) -> None:
    """There is a point to go on from before anything is done."""
    settings["arms"] = ["plain", "adapted"]
    path = write(tmp_path, settings)

    def interrupt(_arm: str, _number: int) -> None:
        raise KeyboardInterrupt

    config = load_config(path)
    assert Experiment(config).run(new_folder(config), interrupt).run["interrupted"]
    code, _, err = run_cli("run", "-c", path, "--resume")
    assert code == 0, err
    summary = json.loads((config.run_folder / "summary.json").read_text())
    assert summary["arms"]["plain"]["tokens"] == 2 * 48
    assert summary["arms"]["adapted"]["lossless_mismatches"] == 0


def test_progress_with_a_loss_that_was_not_finite_is_readable(tmp_path: Path) -> None:
    """JSON has no NaN: a skipped step must not make an interrupted run unreadable."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    counters = Counters(losses=[0.5, None], skipped_steps=1)
    arm = ArmProgress([], 1.0, EngineSeconds(), counters, 1, [Turn(1, 32, 0.5)])
    save(states_of(folder), Progress(1, 0, {"adapted": arm}, ORIGIN), {"adapted": {}})
    assert load(folder)[0].arms["adapted"] == arm


def test_the_progress_before_goes_where_the_newest_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk alters a file: it is named, and not loaded."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    for groups in range(4):
        weights = {"adapted": {"w": torch.full((3,), groups)}}
        save(states_of(folder), Progress(groups, 10 * groups, {}, ORIGIN), weights)
    assert load(folder)[0].groups_done == 3
    newest = sorted((folder.path / "resume").glob("0*"))[-1]
    data = bytearray((newest / "adapted.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "adapted.safetensors").write_bytes(data)
    progress, tensors = load(folder)
    assert progress.groups_done == 2
    assert tensors["adapted"]["w"].tolist() == [2, 2, 2]
    assert f"{newest}/adapted.safetensors is not as it was written" in caplog.text


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_was_killed_goes_on_exactly(tmp_path: Path, settings: dict) -> None:
    """SIGKILL in the middle of a request: nothing is said, and nothing but that request is lost."""
    settings["workload"] |= {"max_new_tokens": 96, "max_prompts": 3}
    settings["arms"] = ["adapted"]
    path = write(tmp_path, settings)
    whole = Experiment(load_config(path, ["run.name=whole"]))
    expected = whole.run(new_folder(whole.config)).arms["adapted"]
    process = cosched_process(["run", "-c", str(path)])
    second = tmp_path / "runs" / "one" / "resume" / "00000002"  # behind the first request
    until = time.monotonic() + 100
    while not second.exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    code, _, err = run_cli("run", "-c", path, "--resume")
    assert code == 0, err
    found = json.loads((tmp_path / "runs" / "one" / "summary.json").read_text())["arms"]["adapted"]
    for field in ("tau", "rounds", "versions", "losses", "tokens"):
        assert found[field] == getattr(expected, field), field
